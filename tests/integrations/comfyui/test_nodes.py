"""The ComfyUI nodes: found as custom nodes, served calls equal the host's, inputs unchanged, the rest left alone."""

from __future__ import annotations

import logging
import shutil
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
from swifti2v_kernels.integrations.patching import HostChanged
from swifti2v_kernels.integrations.sdpa import AttentionCalls
from tests.support import comfyui_standin as comfy
from tests.support import wan_comfyui
from tests.support.tolerances import PARITY, relative_error

FOLDER = Path(folder.__file__).parent
NODES = folder.NODE_CLASS_MAPPINGS


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


class CameraWanModel(comfy.WanModel):
    pass


class OtherModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = comfy.WanSelfAttention(48, 2)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        return self.attention(x, context, transformer_options)


def test_the_log_says_what_was_patched_and_what_is_not_served(host, caplog):
    caplog.set_level(logging.INFO)
    model, inputs = diffusion_model()
    (patched,) = comfy.execute(NODES["SwiftI2VAttention"], model=model)
    assert "SwiftI2V attention: WanModel, 4 attention modules" in caplog.text
    comfy.run(patched, *inputs)
    comfy.run(patched, *inputs)
    assert caplog.text.count("not served: kernels need an NVIDIA GPU") == 1
    comfy.execute(NODES["SwiftI2VAttention"], model=diffusion_model(CameraWanModel)[0])
    assert "SwiftI2V attention: CameraWanModel, 4 attention modules" in caplog.text
    other, _ = diffusion_model(OtherModel)
    comfy.execute(NODES["SwiftI2VAttention"], model=other)
    assert "OtherModel is not a Wan model; its calls of optimized_attention are served all the same" in caplog.text


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
    return comfy.VAE(wan_comfyui.WanVAE(4, 4, 4, [1, 2, 2], 1, [False, True], residual=residual).eval())


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
        assert patched.first_stage_model.decoder.middle[0].forward.__module__.startswith("swifti2v_kernels.")
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
