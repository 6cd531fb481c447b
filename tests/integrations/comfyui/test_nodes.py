"""The ComfyUI nodes: found as custom nodes, served calls equal the host's, inputs unchanged, the rest left alone."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swifti2v_kernels.integrations.comfyui as folder
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


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    comfy.SEEN.clear()
    comfy.LOADED.clear()
    return comfy.install(monkeypatch)


def linked(path: Path) -> None:
    path.symlink_to(FOLDER)


def imported(path: Path) -> None:
    path.mkdir()
    line = folder.__doc__.split("\n\n")[2].strip()
    (path / "__init__.py").write_text(line)


@pytest.mark.parametrize("install", [linked, imported])
def test_found_in_custom_nodes_and_nothing_of_comfyui_is_imported(install, tmp_path):
    install(tmp_path / "swifti2v")
    classes, names = comfy.load_custom_node(tmp_path / "swifti2v")
    assert set(classes) == set(names) == {"SwiftI2VAttention", "SwiftI2VVAE"}
    assert {name: node.DESCRIPTION for name, node in classes.items()} == {k: v.DESCRIPTION for k, v in NODES.items()}
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
    given = object()
    assert comfy.execute(node, **{first: given, "enabled": False}) == (given,)


# Attention


def diffusion_model(kind: type[nn.Module] = comfy.WanModel) -> tuple[comfy.ModelPatcher, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return comfy.ModelPatcher(nn.ModuleDict({"diffusion_model": kind()})), (
        torch.randn(2, 7, 48),
        torch.randn(2, 5, 48),
    )


@pytest.mark.compatibility("attention", model="ComfyUI, any model", host="stand-in")
def test_served_calls_of_a_model_equal_the_hosts_and_are_counted(host):
    """The node changes its output alone: the model that it is given computes by itself as before."""
    model, inputs = diffusion_model()
    expected = comfy.run(model, *inputs)
    comfy.SEEN.clear()
    patched, calls = accelerate_attention(model, backend="torch")
    assert patched is not model
    assert patched.model is model.model
    assert model.model_options == {"transformer_options": {}}
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


UNSERVED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "mask is given": ((2, 7, 24), (2, 7, 24), {"mask": torch.zeros(7, 7)}),
    "attn_precision torch.float64 for torch.float32": ((2, 7, 24), (2, 7, 24), {"attn_precision": torch.float64}),
    "enable_gqa: fewer heads of keys than of queries": ((2, 7, 24), (2, 7, 8), {"enable_gqa": True}),
    "autocast is on, under which ComfyUI's attention functions differ": ((2, 7, 24), (2, 7, 24), {}),
    "scale is not positive": ((2, 7, 24), (2, 7, 24), {"scale": -1.0}),
    "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu": ((2, 7, 24), (2, 5, 24), {}),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_other_calls_go_where_they_went_before(reason):
    """Other calls go, as given and counted by reason, to the host's function."""
    queries, keys, extra = UNSERVED[reason]
    q, k, v = torch.randn(queries), torch.randn(keys), torch.randn(keys)
    calls = AttentionCalls()
    options = {KEY: make_override(calls, None)}
    with torch.autocast("cpu", torch.bfloat16, enabled=reason.startswith("autocast")):
        expected = comfy.attention_pytorch(q, k, v, 3, **extra)
        assert torch.equal(comfy.attention_pytorch(q, k, v, 3, **extra, transformer_options=options), expected)
    assert dict(calls.not_served) == {reason: 1}


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
    """Returns what was logged since it was last taken, with its level."""
    said = [f"{record.levelname} {record.getMessage()}" for record in log.records]
    log.clear()
    return said


def totals(line: str) -> list[str]:
    return [f"INFO SwiftI2V attention of WanModel, in this run: attention calls\n{line}"]


def test_each_run_ends_with_its_own_totals(host, log):
    """Nothing is claimed before a run; totals are of one run, and repeated nodes count nothing twice."""
    model, inputs = diffusion_model()
    comfy.execute(NODES["SwiftI2VAttention"], model=model)
    offered = "will be offered to the kernels; totals follow after each run"
    assert taken(log) == [
        f"INFO SwiftI2V attention: calls that WanModel makes of ComfyUI's optimized attention {offered}",
        f"WARNING SwiftI2V attention: no kernel runs here, ComfyUI computes: {NO_GPU}",
    ]
    patched, calls = accelerate_attention(model, backend="torch")
    taken(log)
    comfy.sample(patched, *inputs, steps=3)
    assert taken(log) == totals("      12  served by reference")
    comfy.sample(patched, *inputs)
    assert taken(log) == totals("       4  served by reference")
    comfy.run(patched, *inputs)  # no sampling run
    assert not taken(log)
    assert calls.served == 8
    again, _ = accelerate_attention(accelerate_attention(patched)[0])
    taken(log)
    comfy.sample(again, *inputs)
    assert taken(log) == totals(f"       4  not served: {NO_GPU}")
    comfy.sample(patched, *inputs)
    assert taken(log) == totals("       4  served by reference")
    assert not model.wrappers


def test_a_run_without_a_counted_call_is_a_warning(host, log):
    """A model that hands its options to nobody is told after a run, also a broken-off one, and computes as before."""
    model, inputs = diffusion_model(comfy.WanModel_S2V)
    expected = comfy.sample(model, *inputs)
    patched, _ = accelerate_attention(model, backend="torch")
    taken(log)
    assert torch.equal(comfy.sample(patched, *inputs), expected)
    with pytest.raises(TypeError):
        comfy.sample(patched)
    begins = "WARNING SwiftI2V attention: no call of the override by WanModel_S2V was counted in this run"
    assert [line.startswith(begins) for line in taken(log)] == [True, True]


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
        patched.decode(z)
        (decoded,) = taken(log)
        assert decoded.startswith("INFO SwiftI2V VAE: WanVAE, decode\n  served  ")
        assert re.search(f"{blocks} x ResidualBlock +WanVAE +{blocks} calls", decoded)
        assert "not counted" not in decoded
    vae.first_stage_model.decoder.mid_block.resnets[0].residual[2].register_forward_hook(lambda *_: None)
    patched.decode(z)
    (decoded,) = taken(log)
    assert re.search(
        r"handed back +1 x ResidualBlock +WanVAE\.decoder\.mid_block\.resnets\.0 +1 call: a hook on a layer in", decoded
    )
    vae.decode(z)
    assert not taken(log)


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
    ("owner", "attribute"), [("MODEL", "clone"), ("comfy.ldm.modules.attention", "wrap_attn"), ("VAE.patcher", "clone")]
)
def test_a_changed_host_is_one_message(owner, attribute, host, monkeypatch):
    monkeypatch.delattr(host if attribute == "wrap_attn" else comfy.ModelPatcher, attribute)
    vae = wan_vae()
    of_vae = owner == "VAE.patcher"
    node, given = ("SwiftI2VVAE", {"vae": vae}) if of_vae else ("SwiftI2VAttention", {"model": diffusion_model()[0]})
    with pytest.raises(HostChanged, match=f"{owner} has no attribute '{attribute}'; nothing was changed"):
        comfy.execute(NODES[node], **given)
    assert not vae.patcher.object_patches
