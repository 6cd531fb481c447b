"""LoRA files of which a part fits a model, the rest being left out with a warning; and those that are refused."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch

from model import InputError, LoRA, WanDiT, load_dit, merge_loras
from model.cli.options import run_command
from model.weights.load import random_weights
from model.weights.lora import LoRAWarning
from tests.conftest import TINY_DIT
from tests.support.lora_spellings import MODULES, factors, same, saved, spelled, state_of
from tests.support.original_names import original_module
from tests.support.tolerances import OPERATOR, relative_error

#: As DIT is Wan2.2 A14B's, without an image embedding, this is Wan2.1's, with one.
WITH_IMAGE = replace(TINY_DIT, image_dim=20, added_kv=True)


def test_keys_that_the_model_lacks_are_left_out_with_one_warning(tmp_path):
    """An I2V LoRA merges into a model without the image branch, as without its parts for it."""
    dit, other = (random_weights(WanDiT, TINY_DIT, 1) for _ in range(2))
    i2v = random_weights(WanDiT, WITH_IMAGE, 1)
    state = spelled(factors(dit, MODULES), "diffusion_model.", "lora_down", "lora_up", original_module)
    image = [f"blocks.{i}.attn2.add_{name}_proj" for i in range(2) for name in "kv"]
    lacking = spelled(factors(i2v, image), "diffusion_model.", "lora_down", "lora_up", original_module)
    lacking |= {f"diffusion_model.img_emb.proj.0.{kind}": torch.randn(20) for kind in ("diff", "diff_b")}
    file = saved(tmp_path / "distill.safetensors", state | lacking)
    checkpoint = saved(tmp_path / "dit.safetensors", state_of(dit))
    with pytest.warns(LoRAWarning, match=r"^lora: \S*: 6 of 26 pairs and differences are left out: ") as warned:
        merge_loras(dit, [LoRA(file)])
    (text,) = (str(warning.message) for warning in warned)
    assert text.count("(the model has no ") == 3
    assert text.endswith("; and 7 more")
    merge_loras(other, [LoRA(saved(tmp_path / "plain.safetensors", state))])
    assert same(other.state_dict(), dit)
    with pytest.warns(LoRAWarning):
        assert same(dit.state_dict(), load_dit(checkpoint, config=TINY_DIT, loras=[LoRA(file)]))


STRAYS = {
    "an unknown tensor": {"step": torch.tensor(1)},
    "a text encoder's": {f"lora_te_layers_0_q.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")},
    "a layer more": {f"blocks.7.ffn.0.lora_{part}.weight": torch.ones(3, 3) for part in "AB"},
    "an alpha alone": {"blocks.1.attn2.norm_k.alpha": torch.tensor(1.0)},
    "a factor alone": {"blocks.1.attn2.norm_q.lora_up.weight": torch.ones(48, 3)},
    "a bias alone": {"blocks.1.norm2.lora_B.bias": torch.ones(48)},
    "a whole weight": {"blocks.1.attn2.to_k.weight": torch.ones(48, 48)},
}


def test_as_many_additions_may_be_left_out_as_fit(tmp_path):
    """Each stray tensor, pair or difference counts one: with as many of them as of those that fit the file merges what
    fits, and with one more it is refused."""
    count, strays = len(STRAYS), {key: tensor for state in STRAYS.values() for key, tensor in state.items()}
    for fitting in (count, count - 1):
        dit = random_weights(WanDiT, TINY_DIT, 1)
        before = state_of(dit)
        pairs = factors(dit, MODULES[:fitting])
        file = saved(tmp_path / "lora.safetensors", spelled(pairs) | strays)
        if fitting == count:
            with pytest.warns(LoRAWarning, match=f"{count} of {2 * count} pairs and differences are left out"):
                merge_loras(dit, [LoRA(file)])
            changed = {name for name, tensor in dit.state_dict().items() if not torch.equal(tensor, before[name])}
            assert changed == {f"{module}.weight" for module in pairs}
        else:
            with pytest.raises(InputError, match=rf"\({fitting} of {fitting + count} pairs .*; at least half must\)"):
                merge_loras(dit, [LoRA(file)])
            assert same(before, dit)


@pytest.mark.parametrize("stray", STRAYS)
def test_one_stray_addition_is_a_warning_that_names_it(stray, tmp_path, tiny_dit):
    file = saved(tmp_path / "lora.safetensors", spelled(factors(tiny_dit, MODULES)) | STRAYS[stray])
    with pytest.warns(LoRAWarning, match=rf"1 of {len(MODULES) + 1} .*{re.escape(next(iter(STRAYS[stray])))} \("):
        merge_loras(tiny_dit, [LoRA(file)])


def test_a_lora_for_another_model_is_refused_with_its_keys_and_changes_nothing(tmp_path, tiny_dit):
    before = state_of(tiny_dit)
    good = saved(tmp_path / "good.safetensors", spelled(factors(tiny_dit, MODULES[:1])))
    state = spelled(factors(tiny_dit, MODULES[1:])) | {
        f"blocks.{i}.no.lora_A.weight": torch.ones(4, 48) for i in range(33)
    }
    state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 40)
    state["blocks.0.attn1.to_q.lora_B.weight"] = torch.zeros(48, 4)
    state["diffusion_model.head.diff_m"] = torch.zeros(1, 3, 48)
    bad = saved(tmp_path / "bad.safetensors", state)
    with pytest.raises(InputError) as error:
        merge_loras(tiny_dit, [LoRA(good), LoRA(bad)])
    for problem in (
        f"lora: {bad}: 36 keys do not fit the model: ",
        "blocks.0.attn1.to_q.lora_A.weight ([4, 40] for a parameter of [48, 48])",
        "blocks.0.attn1.to_q.lora_B.weight ([48, 4] for a parameter of [48, 48])",
        "diffusion_model.head.diff_m ([1, 3, 48] for a parameter of [1, 2, 48])",
        "no.lora_A.weight (its counterpart is missing); and 16 more",
    ):
        assert problem in str(error.value)
    assert same(before, tiny_dit)


@pytest.mark.parametrize("form", ["factors", "flat factors", "a difference"])
def test_a_t2v_patch_embedding_is_added_to_the_channels_of_the_latents(form, tmp_path):
    """A T2V LoRA changes the latents' channels of an I2V model's patch embedding, which come first, and leaves the
    others and the image branch; other numbers of channels, and an I2V LoRA on a T2V model, are refused."""
    i2v = random_weights(WanDiT, replace(WITH_IMAGE, in_channels=36, out_channels=16), 1)
    t2v = random_weights(WanDiT, replace(TINY_DIT, in_channels=16, out_channels=16), 1)

    def lora(channels):
        down, up = torch.randn(3, channels, 1, 2, 2), torch.randn(48, 3)
        product = (up @ down.flatten(1)).view(48, channels, 1, 2, 2)
        given = {"lora_A.weight": down.flatten(1), "lora_B.weight": up}
        given = {"lora_A.weight": down, "lora_B.weight": up.view(48, 3, 1, 1, 1)} if form == "factors" else given
        given = {"diff": product} if form == "a difference" else given
        state = spelled(factors(t2v, MODULES)) | {f"patch_embedding.{key}": tensor for key, tensor in given.items()}
        return LoRA(saved(tmp_path / f"{channels}.safetensors", state), 0.5), product

    before = state_of(i2v)
    fitting, product = lora(16)
    merge_loras(i2v, [fitting])
    changed = {name for name, tensor in i2v.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"patch_embedding.weight", *(f"{module}.weight" for module in MODULES)}
    expected = before["patch_embedding.weight"].clone()
    expected[:, :16] += 0.5 * product
    assert relative_error(i2v.patch_embedding.weight, expected) < OPERATOR["float32"]
    assert torch.equal(i2v.patch_embedding.weight[:, 16:], before["patch_embedding.weight"][:, 16:])
    for dit, channels in ((i2v, 20), (i2v, 8), (i2v, 40), (t2v, 36)):
        with pytest.raises(InputError, match=r"patch_embedding\.\S+ \(.* for a parameter of \[48, "):
            merge_loras(dit, [lora(channels)[0]])


def test_commands_print_each_warning_once_as_one_line(capsys):
    """Warnings of a command are lines on standard error, without a terminal's control characters, and each text comes
    once; after it they are Python's again."""

    def command():
        warnings.warn("lora: a.safetensors:\n1 of 2\x1b[2J", LoRAWarning, stacklevel=1)
        for _ in range(2):
            warnings.warn("another", RuntimeWarning, stacklevel=1)

    before = warnings.showwarning
    for _ in range(2):
        assert run_command(command) == 0
        assert capsys.readouterr().err == "warning: lora: a.safetensors: 1 of 2\\x1b[2J\nwarning: another\n"
    assert warnings.showwarning is before
