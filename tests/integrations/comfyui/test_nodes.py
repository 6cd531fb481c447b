"""The ComfyUI nodes: found as custom nodes, served calls equal the host's, inputs unchanged, the rest left alone."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swifti2v_kernels.integrations.comfyui as folder
from swifti2v_kernels.integrations import calls
from swifti2v_kernels.integrations.comfyui.attention import KEY, accelerate_attention, make_override
from swifti2v_kernels.integrations.comfyui.vae import accelerate_vae
from swifti2v_kernels.integrations.recipe import HostChanged
from swifti2v_kernels.integrations.sdpa import AttentionCalls
from tests.support import comfyui_standin as comfy
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_comfyui import WanVAE
from tests.support.wan_original import wan_vae as original_vae

FOLDER = Path(folder.__file__).parent
NODES = folder.NODE_CLASS_MAPPINGS


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_any_traced", False)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    comfy.SEEN.clear()
    comfy.LOADED.clear()
    return comfy.install(monkeypatch)


def linked(path: Path) -> None:
    path.symlink_to(FOLDER)


def copied(path: Path) -> None:
    shutil.copytree(FOLDER, path)


def imported(path: Path) -> None:
    path.mkdir()
    line = folder.__doc__.split("\n\n")[2].strip()
    (path / "__init__.py").write_text(line)


@pytest.mark.parametrize("install", [linked, copied, imported])
def test_found_in_custom_nodes_and_nothing_of_comfyui_is_imported(install, tmp_path):
    install(tmp_path / "swifti2v")
    classes, names = comfy.load_custom_node(tmp_path / "swifti2v")
    assert set(classes) == set(names) == {"SwiftI2VAttention", "SwiftI2VVAE"}
    assert classes == NODES
    assert "comfy" not in sys.modules


@pytest.mark.parametrize(("name", "kind"), [("SwiftI2VAttention", "MODEL"), ("SwiftI2VVAE", "VAE")])
def test_a_node_describes_itself(name, kind):
    node = NODES[name]
    assert (kind,) == node.RETURN_TYPES
    assert callable(getattr(node, node.FUNCTION))
    assert node.CATEGORY
    assert node.DESCRIPTION
    assert len(node.OUTPUT_TOOLTIPS) == 1
    (first, (given, options)), (second, (toggle, default)) = node.INPUT_TYPES()["required"].items()
    assert (first, given, second, toggle) == (kind.lower(), kind, "enabled", "BOOLEAN")
    assert options["tooltip"]
    assert default["default"] is True


@pytest.mark.parametrize("name", NODES)
def test_switched_off_a_node_passes_its_input_on(name, host):
    (kind,) = NODES[name].RETURN_TYPES
    given = object()
    assert comfy.execute(NODES[name], **{kind.lower(): given, "enabled": False}) == (given,)


# Attention


def diffusion_model(kind: type[nn.Module] = comfy.WanModel) -> tuple[comfy.ModelPatcher, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return comfy.ModelPatcher(comfy.BaseModel(kind())), (torch.randn(2, 7, 48), torch.randn(2, 5, 48))


def test_the_attention_node_changes_its_output_alone(host):
    model, inputs = diffusion_model()
    expected = comfy.run(model, *inputs)
    (patched,) = comfy.execute(NODES["SwiftI2VAttention"], model=model)
    assert patched is not model
    assert patched.model is model.model
    assert model.model_options == {"transformer_options": {}}
    assert KEY in patched.model_options["transformer_options"]
    # On a CPU there is no kernel: the host computes.
    assert torch.equal(comfy.run(patched, *inputs), expected)
    assert torch.equal(comfy.run(model, *inputs), expected)


@pytest.mark.compatibility("attention", model="ComfyUI, any model", host="stand-in")
def test_served_calls_of_a_model_equal_the_hosts_and_are_counted(host):
    model, inputs = diffusion_model()
    expected = comfy.run(model, *inputs)
    comfy.SEEN.clear()
    patched, calls = accelerate_attention(model, backend="torch")
    assert relative_error(comfy.run(patched, *inputs), expected) < PARITY
    assert dict(calls.implementations) == {"reference": 4}
    assert not calls.not_served
    assert not comfy.SEEN
    assert torch.equal(comfy.run(model, *inputs), expected)
    assert calls.served == 4


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"enable_gqa": True, "low_precision_attention": False}], ids=str)
def test_every_layout_that_attention_is_called_with(skip_reshape, skip_output_reshape, extra):
    calls = AttentionCalls()
    options = {KEY: make_override(calls, None, "torch")}
    shape = (2, 3, 7, 8) if skip_reshape else (2, 7, 24)
    given = [*(torch.randn(shape) for _ in range(3)), 3]
    extra = {**extra, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    expected = comfy.attention_pytorch(*given, **extra)
    actual = comfy.attention_pytorch(*given, **extra, transformer_options=options)
    assert relative_error(actual, expected) < PARITY
    assert calls.served == 1


@comfy.wrap_attn
def attention_float32(q: Tensor, k: Tensor, v: Tensor, heads: int, **rest: Any) -> Tensor:
    """Attention that leaves autocast's dtype, as ComfyUI's ``attention_sub_quad`` and ``attention_split`` do."""
    return comfy.attention_pytorch(q, k, v, heads, **rest).float()


@pytest.mark.parametrize(
    ("function", "dtype"), [(comfy.attention_pytorch, torch.bfloat16), (attention_float32, torch.float32)]
)
def test_under_autocast_attention_has_the_hosts_dtype_and_values(function, dtype):
    q, k, v = torch.randn(3, 2, 7, 24)
    calls = AttentionCalls()
    options = {KEY: make_override(calls, None, "torch")}
    with torch.autocast("cpu", torch.bfloat16):
        expected = function(q, k, v, 3)
        actual = function(q, k, v, 3, transformer_options=options)
    assert actual.dtype == expected.dtype == dtype
    assert torch.equal(actual, expected)
    assert dict(calls.not_served) == {"autocast is on, under which ComfyUI's attention functions differ": 1}


UNSERVED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "mask is given": ((2, 7, 24), (2, 7, 24), {"mask": torch.zeros(7, 7)}),
    "attn_precision torch.float64 for torch.float32": ((2, 7, 24), (2, 7, 24), {"attn_precision": torch.float64}),
    "enable_gqa: fewer heads of keys than of queries": ((2, 7, 24), (2, 7, 8), {"enable_gqa": True}),
    "scale is not positive": ((2, 7, 24), (2, 7, 24), {"scale": -1.0}),
    "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu": ((2, 7, 24), (2, 5, 24), {}),
}


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "after another override"])
@pytest.mark.parametrize("reason", UNSERVED)
def test_other_calls_go_where_they_went_before(reason, chained):
    """Other calls go, as given and counted by reason, to the override that was there or to the host's function."""
    queries, keys, extra = UNSERVED[reason]
    q, k, v = torch.randn(queries), torch.randn(keys), torch.randn(keys)
    seen = []

    def previous(function, *args, **kwargs):
        seen.append(kwargs["transformer_options"])
        return function(*args, **kwargs)

    calls = AttentionCalls()
    options = {KEY: make_override(calls, previous if chained else None)}
    expected = comfy.attention_pytorch(q, k, v, 3, **extra)
    assert torch.equal(comfy.attention_pytorch(q, k, v, 3, **extra, transformer_options=options), expected)
    assert dict(calls.not_served) == {reason: 1}
    assert seen == ([options] if chained else [])


def test_an_override_that_the_model_has_is_kept_behind_ours(host):
    model, inputs = diffusion_model()
    model.model_options["transformer_options"] |= {KEY: lambda function, *a, **k: 0 * function(*a, **k), "other": [1]}
    expected = comfy.run(model, *inputs)
    (patched,) = comfy.execute(NODES["SwiftI2VAttention"], model=model)
    assert torch.equal(comfy.run(patched, *inputs), expected)
    assert patched.model_options["transformer_options"]["other"] == [1]
    served, _ = accelerate_attention(model, backend="torch")
    assert not torch.equal(comfy.run(served, *inputs), expected)


NO_GPU = "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def taken(log: pytest.LogCaptureFixture) -> list[str]:
    """Returns what was logged since it was last taken, with its level, but for what a run says on its way."""
    said = [f"{record.levelname} {record.getMessage()}" for record in log.records]
    log.clear()
    return [text for text in said if "so far:" not in text]


@pytest.mark.parametrize("kind", [comfy.WanModel, comfy.WanModel_S2V])
def test_the_node_claims_nothing_before_a_run(kind, host, log):
    """The log says what the node will do with calls, not that there will be any, and that no kernel runs here."""
    comfy.execute(NODES["SwiftI2VAttention"], model=diffusion_model(kind)[0])
    offered = "will be offered to the kernels; totals follow after each run"
    assert taken(log) == [
        f"INFO SwiftI2V attention: calls that {kind.__name__} makes of ComfyUI's optimized attention {offered}",
        f"WARNING SwiftI2V attention: no kernel runs here, ComfyUI computes: {NO_GPU}",
    ]


def totals(*lines: str, how: str = "in this run", level: str = "INFO") -> list[str]:
    return ["\n".join([f"{level} SwiftI2V attention of WanModel, {how}: attention calls", *lines])]


def test_each_run_ends_with_its_own_totals(host, log):
    """Totals are of one run, whatever was counted before; nested and repeated nodes count nothing twice."""
    model, inputs = diffusion_model()
    patched, calls = accelerate_attention(model, backend="torch")
    taken(log)
    comfy.sample(patched, *inputs, steps=3)
    assert taken(log) == totals("      12  served by reference")
    comfy.sample(patched, *inputs)
    assert taken(log) == totals("       4  served by reference")
    comfy.run(patched, *inputs)  # no sampling run
    assert not taken(log)
    assert calls.served == 20
    comfy.sample(patched, *inputs, after=lambda i: comfy.sample(patched, *inputs, steps=2))
    assert taken(log) == totals("      12  served by reference")
    again, _ = accelerate_attention(accelerate_attention(patched)[0])
    taken(log)
    comfy.sample(again, *inputs)
    assert taken(log) == totals(f"       4  not served: {NO_GPU}")
    comfy.sample(patched, *inputs)
    assert taken(log) == totals("       4  served by reference")
    assert not model.wrappers


def test_an_override_that_is_never_called_is_a_warning(host, log):
    """A model that hands its options to nobody is told after every run, and computes as before."""
    model, inputs = diffusion_model(comfy.WanModel_S2V)
    expected = comfy.sample(model, *inputs)
    patched, _ = accelerate_attention(model, backend="torch")
    taken(log)
    for _ in range(2):
        assert torch.equal(comfy.sample(patched, *inputs), expected)
        (line,) = taken(log)
        assert line.startswith("WARNING SwiftI2V attention: WanModel_S2V never called the override in this run")
        assert "nothing was accelerated" in line


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_that_is_broken_off_tells_what_it_counted(steps, host, log):
    """The exception passes, nothing is said of calls that might still have come, and the next run counts anew."""
    model, inputs = diffusion_model()
    patched, _ = accelerate_attention(model, backend="torch")
    taken(log)

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    given = inputs if steps else ()
    with pytest.raises(KeyboardInterrupt if steps else TypeError):
        comfy.sample(patched, *given, steps=steps, after=interrupt)
    counted = "       4  served by reference" if steps else "       0  none seen"
    assert taken(log) == totals(counted, how="in this run, which was broken off")
    comfy.sample(patched, *inputs)
    assert taken(log) == totals("       4  served by reference")


@pytest.mark.parametrize("missing", ["module", "method"])
def test_a_host_without_wrappers_shows_kinds_of_calls_and_says_that_there_are_no_totals(
    missing, host, log, monkeypatch
):
    if missing == "module":
        monkeypatch.delitem(sys.modules, "comfy.patcher_extension")
    else:
        monkeypatch.delattr(comfy.ModelPatcher, "add_wrapper_with_key")
    model, inputs = diffusion_model()
    (patched,) = comfy.execute(NODES["SwiftI2VAttention"], model=model)
    assert "this version of ComfyUI lets no node show totals after a run" in log.text
    for _ in range(2):
        comfy.sample(patched, *inputs)
    assert log.text.count(f"so far: attention calls\n       1  not served: {NO_GPU}") == 1


def test_calls_in_compiled_code_are_not_taken_for_none(host, log):
    """A node may compile the model: its calls are not counted, and no warning says that there were none."""
    model, inputs = diffusion_model()
    patched, _ = accelerate_attention(model, backend="torch")
    taken(log)
    patched.model.diffusion_model.compile(backend="aot_eager")
    for _ in range(2):
        comfy.sample(patched, *inputs)
        assert taken(log) == totals(f"       ?  {calls.COMPILED}")


def test_a_changed_host_of_attention_is_one_message(host, monkeypatch):
    model, _ = diffusion_model()

    def refused(message: str) -> None:
        with pytest.raises(HostChanged, match=f"{message}; nothing was changed"):
            comfy.execute(NODES["SwiftI2VAttention"], model=model)

    with monkeypatch.context() as patch:
        patch.delattr(comfy.ModelPatcher, "clone")
        refused("MODEL has no attribute 'clone'")
    with monkeypatch.context() as patch:
        patch.delattr(host, "wrap_attn")
        refused("comfy.ldm.modules.attention has no attribute 'wrap_attn'")
    del model.model_options["transformer_options"]
    refused("MODEL.model_options has no 'transformer_options'")
    assert not model.model_options


# VAE


def wan_vae(residual: bool = False) -> comfy.VAE:
    torch.manual_seed(0)
    layout = {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]}
    return comfy.VAE(original_vae(WanVAE, residual, **layout))


@pytest.mark.compatibility("VAE encode", "VAE decode", model="ComfyUI, Wan VAE", host="stand-in")
@pytest.mark.parametrize("residual", [False, True], ids=["2.1", "2.2"])
@torch.no_grad()
def test_the_vae_node_changes_its_output_alone(residual, host):
    """Input and output share one module without a copy of its weights; each computes as it should, however loaded."""
    vae, z = wan_vae(residual), torch.randn(1, 4, 4, 4, 4)
    before = {name: x.data_ptr() for name, x in vae.first_stage_model.state_dict().items()}
    decoded = vae.decode(z)
    encoded = vae.encode(decoded)
    (patched,) = comfy.execute(NODES["SwiftI2VVAE"], vae=vae)
    assert patched is not vae
    assert not vae.patcher.object_patches
    for _ in range(2):
        actual = patched.decode(z)
        assert patched.first_stage_model.decoder.mid_block.resnets[0].forward.__module__.startswith("swifti2v_kernels.")
        assert relative_error(actual, decoded) < PARITY
        assert relative_error(patched.encode(decoded), encoded) < PARITY
        assert torch.equal(vae.decode(z), decoded)
        assert torch.equal(vae.encode(decoded), encoded)
    assert {name: x.data_ptr() for name, x in patched.first_stage_model.state_dict().items()} == before


@torch.no_grad()
def test_the_node_runs_again_while_its_patches_are_loaded(host):
    vae, z = wan_vae(), torch.randn(1, 4, 2, 4, 4)
    first, report = accelerate_vae(vae)
    expected = first.decode(z)
    second, again = accelerate_vae(vae)
    third, _ = accelerate_vae(first)
    assert str(again) == str(report)
    for vae in (second, third):
        assert set(vae.patcher.object_patches) == set(first.patcher.object_patches)
        assert torch.equal(vae.decode(z), expected)


@torch.no_grad()
def test_each_run_of_a_vae_ends_with_its_own_totals(host, log):
    """Replaced is not served: what a layer hands back is counted with the reason, in this run alone."""
    vae, z = wan_vae(), torch.randn(1, 4, 1, 4, 4)
    (patched,) = comfy.execute(NODES["SwiftI2VVAE"], vae=vae)
    told = taken(log)
    assert told[0].startswith("INFO SwiftI2V VAE: WanVAE\n  replaced ")
    assert told[0].endswith("no call so far; after a run this report says which were served")
    assert told[1:] == [f"WARNING SwiftI2V VAE: no kernel runs here, PyTorch computes: {NO_GPU}"]
    blocks = sum(type(m).__name__ == "ResidualBlock" for m in vae.first_stage_model.decoder.modules())
    for _ in range(2):
        frames = patched.decode(z)
        (decoded,) = taken(log)
        assert decoded.startswith("INFO SwiftI2V VAE: WanVAE, decode\n  served  ")
        assert re.search(f"{blocks} x ResidualBlock +WanVAE +{blocks} calls", decoded)
        assert "never called" not in decoded
    hook = vae.first_stage_model.decoder.mid_block.resnets[0].residual[2].register_forward_hook(lambda *_: None)
    patched.decode(z)
    (decoded,) = taken(log)
    assert re.search(
        r"handed back +1 x ResidualBlock +WanVAE\.decoder\.mid_block\.resnets\.0 +1 call: a hook on a layer in", decoded
    )
    hook.remove()
    again, _ = accelerate_vae(patched)
    taken(log)
    again.encode(frames)
    (encoded,) = taken(log)
    assert encoded.startswith("INFO SwiftI2V VAE: WanVAE, encode\n  served  ")
    assert "handed back" not in encoded
    vae.decode(z)
    assert not taken(log)


@torch.no_grad()
def test_a_run_of_a_vae_that_is_broken_off_or_calls_no_layer_is_told(host, log, monkeypatch):
    patched, _ = accelerate_vae(wan_vae())
    taken(log)
    patched.first_stage_model.decoder.mid_block.resnets[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patched.decode(torch.randn(1, 4, 1, 4, 4))
    (broken_off,) = taken(log)
    assert broken_off.startswith("INFO SwiftI2V VAE: WanVAE, decode, which was broken off\n  served  ")
    monkeypatch.setattr(WanVAE, "decode", lambda self, z: z)
    patched.decode(torch.randn(1, 4, 1, 4, 4))
    told = "none of the replaced layers was called, so nothing was accelerated"
    assert taken(log) == [f"WARNING SwiftI2V VAE: WanVAE, decode: {told}"]


class ResidualBlock(nn.Module):
    """A module of a common name that has nothing of Wan's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class AutoencoderKL(nn.Sequential):
    pass


@pytest.mark.parametrize("module", [AutoencoderKL(ResidualBlock()), None], ids=["another", "none"])
def test_what_is_not_a_wan_vae_is_passed_on_and_named(module, host, caplog):
    caplog.set_level(logging.INFO)
    vae = comfy.VAE(module)
    (same,) = comfy.execute(NODES["SwiftI2VVAE"], vae=vae)
    assert same is vae
    name = "NoneType" if module is None else "AutoencoderKL"
    assert f"SwiftI2V VAE: {name}" in caplog.text
    assert "not a Wan VAE; left as it is" in caplog.text


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [("VAE", "first_stage_model"), ("VAE", "patcher"), ("VAE.patcher", "clone"), ("VAE.patcher", "add_object_patch")],
)
def test_a_changed_host_of_the_vae_is_one_message(owner, attribute, host, monkeypatch):
    vae = wan_vae()
    if owner == "VAE":
        delattr(vae, attribute)
    else:
        monkeypatch.delattr(comfy.ModelPatcher, attribute)
    with pytest.raises(HostChanged, match=f"{owner} has no attribute '{attribute}'; nothing was changed"):
        comfy.execute(NODES["SwiftI2VVAE"], vae=vae)
    assert attribute == "patcher" or not vae.patcher.object_patches
