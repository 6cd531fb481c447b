"""LoRA files of which a part fits a model, the rest being left out with a warning; and those that are refused."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch

from model import LoRA, WanDiT, apply_loras, load_dit, merge_loras
from model.cli.options import chosen_loras, run_command
from model.plan import build_parser
from model.weights.load import inspect_dit, random_weights
from model.weights.lora import LoRAMismatch, LoRAWarning
from tests.conftest import TINY_DIT
from tests.support.lora_spellings import MODULES, factors, lightx2v, same, saved, spelled, state_of
from tests.support.original_names import original_dit, original_module
from tests.support.tolerances import OPERATOR, relative_error

#: As DIT is Wan2.2 A14B's, without an image embedding, this is Wan2.1's, with one.
WITH_IMAGE = replace(TINY_DIT, image_dim=20, added_kv=True)


def image_branch(i2v):
    """Returns what LightX2V's file holds for the parts that A14B lacks, and the number of pairs and differences."""
    modules = [f"blocks.{i}.attn2.add_{name}_proj" for i in range(2) for name in "kv"]
    embedder = "condition_embedder.image_embedder"
    modules += [f"{embedder}.ff.net.0.proj", f"{embedder}.ff.net.2"]
    state = spelled(factors(i2v, modules), "diffusion_model.", "lora_down", "lora_up", original_module)
    for module in modules:
        bias = i2v.get_parameter(f"{module}.bias")
        state[f"diffusion_model.{original_module(module)}.diff_b"] = torch.randn_like(bias)
    for i in range(2):
        state[f"diffusion_model.blocks.{i}.cross_attn.norm_k_img.diff"] = torch.randn(48)
    for i in (0, 4):
        for kind in ("diff", "diff_b"):
            state[f"diffusion_model.img_emb.proj.{i}.{kind}"] = torch.randn(20 if i == 0 else 48)
    return state, 6 + 6 + 2 + 4


def test_keys_that_the_model_lacks_are_left_out_with_one_warning(tmp_path):
    """LightX2V's file merges into a model without the image embedding, as written out; a strict LoRA is refused."""
    dit = random_weights(WanDiT, TINY_DIT, 1)
    before = state_of(dit)
    state, _ = lightx2v(dit, 8.0)
    for_image, count = image_branch(random_weights(WanDiT, WITH_IMAGE, 1))
    file = saved(tmp_path / "distill.safetensors", state | for_image)
    checkpoint = saved(tmp_path / "dit.safetensors", before)
    fitting = sum(key.endswith(("lora_up.weight", "diff", "diff_b", "diff_m")) for key in state)
    warning = f"{count} of {count + fitting} pairs and differences are left out: "
    loading = {"loras": [LoRA(file)], "config": TINY_DIT}
    with pytest.warns(LoRAWarning, match=rf"^lora: \S*distill\.safetensors: {warning}") as warned:
        merge_loras(dit, [LoRA(file)])
    (text,) = (str(warning.message) for warning in warned)
    assert re.search(r"diffusion_model\.\S*img\S* \(the model has no \S*\)", text)
    assert text.count("(the model has no ") == 3
    assert text.endswith(f"; and {len(for_image) - 3} more")
    plain = load_dit(checkpoint, config=TINY_DIT, loras=[LoRA(saved(tmp_path / "plain.safetensors", state))])
    assert same(plain.state_dict(), dit)
    with pytest.warns(LoRAWarning):
        loaded = load_dit(checkpoint, **loading)
    assert same(dit.state_dict(), loaded)
    merged = state_of(dit)
    strict = LoRA(file, strict=True)
    message = (
        rf"^lora: \S*distill\.safetensors: {len(for_image)} keys do not fit the model \({fitting} of {fitting + count}"
    )
    for change in (merge_loras, apply_loras, lambda _, loras: load_dit(checkpoint, config=TINY_DIT, loras=loras)):
        with pytest.raises(LoRAMismatch, match=message) as error:
            change(dit, [strict])
        assert len(error.value.problems) == len(for_image)
        assert same(merged, dit)


def test_inspect_says_what_loading_does(tmp_path, inspected):
    """Inspect shows load_dit's warning or its refusal where a DiT is given; without, a Wan LoRA has neither."""
    config = replace(TINY_DIT, num_heads=1, head_dim=128)
    dit, i2v = (random_weights(WanDiT, given, 1) for given in (config, replace(WITH_IMAGE, num_heads=1, head_dim=128)))
    checkpoint = saved(tmp_path / "dit.safetensors", original_dit(dit.state_dict()))
    image = ["blocks.0.attn2.add_k_proj", "blocks.1.attn2.add_k_proj"]
    file = saved(tmp_path / "lora.safetensors", spelled(factors(i2v, MODULES[:2] + image)))
    for options, strict in (((), False), (("--strict-loras",), True)):
        code, printed = inspected(file, "--for", checkpoint, *options)
        (report,) = printed["checkpoints"]
        if strict:
            with pytest.raises(LoRAMismatch) as error:
                inspect_dit(checkpoint, [LoRA(file, strict=True)])
            assert (code, report["loads"], report["warning"]) == (1, False, None)
            assert str(error.value) == f"lora: {file}: {report['problem'].replace(str(checkpoint), 'the model')}"
        else:
            with pytest.warns(LoRAWarning) as warned:
                inspect_dit(checkpoint, [LoRA(file)])
            assert (code, report["loads"], report["problem"]) == (0, True, None)
            assert [str(warning.message) for warning in warned] == [f"lora: {file}: {report['warning']}"]
        code, printed = inspected(file, *options)
        assert (code, printed["checkpoints"][0]["warning"]) == (0, None)
    code, printed = inspected(saved(tmp_path / "lora.safetensors", spelled(factors(i2v, image))), "--for", checkpoint)
    assert code == 1
    assert "4 keys do not fit" in printed["checkpoints"][0]["problem"]
    assert "(0 of 2 pairs and differences do; at least half must)" in printed["checkpoints"][0]["problem"]


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
            with pytest.raises(LoRAMismatch, match=rf"\({fitting} of {fitting + count} pairs .*; at least half must\)"):
                merge_loras(dit, [LoRA(file)])
            assert same(before, dit)


@pytest.mark.parametrize("stray", STRAYS)
def test_one_stray_addition_is_a_warning_that_names_it(stray, tmp_path, tiny_dit):
    file = saved(tmp_path / "lora.safetensors", spelled(factors(tiny_dit, MODULES)) | STRAYS[stray])
    with pytest.warns(LoRAWarning, match=rf"1 of {len(MODULES) + 1} .*{re.escape(next(iter(STRAYS[stray])))} \("):
        merge_loras(tiny_dit, [LoRA(file)])
    with pytest.raises(LoRAMismatch, match=rf"\({len(MODULES)} of {len(MODULES) + 1} pairs .*; all must, as it is"):
        merge_loras(tiny_dit, [LoRA(file, strict=True)])


def test_a_lora_for_another_model_names_every_key_and_changes_nothing(tmp_path, tiny_dit):
    before = state_of(tiny_dit)
    good = saved(tmp_path / "good.safetensors", spelled(factors(tiny_dit, MODULES[:1])))
    state = spelled(factors(tiny_dit, MODULES[1:]))
    state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 40)
    state["blocks.0.attn1.to_q.lora_B.weight"] = torch.zeros(48, 4)
    state["diffusion_model.head.diff_m"] = torch.zeros(1, 3, 48)
    state |= STRAYS["a layer more"] | STRAYS["a whole weight"] | STRAYS["an alpha alone"]
    del state["blocks.0.attn1.to_v.lora_B.weight"]
    bad = saved(tmp_path / "bad.safetensors", state)
    expected = [
        "blocks.0.attn1.to_q.lora_A.weight ([4, 40] for a parameter of [48, 48])",
        "blocks.0.attn1.to_q.lora_B.weight ([48, 4] for a parameter of [48, 48])",
        "blocks.0.attn1.to_v.lora_A.weight (its counterpart is missing)",
        "blocks.1.attn2.norm_k.alpha (its counterpart is missing)",
        "blocks.1.attn2.to_k.weight (no part of a LoRA)",
        "blocks.7.ffn.0.lora_A.weight (the model has no blocks.7.ffn.net.0.proj.weight)",
        "blocks.7.ffn.0.lora_B.weight (the model has no blocks.7.ffn.net.0.proj.weight)",
        "diffusion_model.head.diff_m ([1, 3, 48] for a parameter of [1, 2, 48])",
    ]
    for change in (merge_loras, apply_loras):
        with pytest.raises(LoRAMismatch) as error:
            change(tiny_dit, [LoRA(good), LoRA(bad)])
        assert sorted(error.value.problems) == expected
        assert all(problem in str(error.value) for problem in expected)
        assert str(error.value).startswith(f"lora: {bad}: 8 keys do not fit the model: ")
    assert same(before, tiny_dit)


def test_of_many_keys_that_do_not_fit_the_message_lists_twenty(tmp_path, tiny_dit):
    state = {f"blocks.{i}.nothing.lora_A.weight": torch.zeros(4, 48) for i in range(33)}
    with pytest.raises(LoRAMismatch) as error:
        merge_loras(tiny_dit, [LoRA(saved(tmp_path / "bad.safetensors", state))])
    assert len(error.value.problems) == 33
    assert str(error.value).count("its counterpart is missing") == 20
    assert str(error.value).endswith("; and 13 more")


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
        with pytest.raises(LoRAMismatch, match=r"patch_embedding\.\S+ \(.* for a parameter of \[48, "):
            merge_loras(dit, [lora(channels)[0]])


def test_commands_print_each_warning_once_as_one_line(capsys):
    """Warnings of a command are lines on standard error, without a terminal's control characters, and each text comes
    once; after it they are Python's again."""

    def command():
        warnings.warn("lora: a.safetensors:\n1 of 2\x1b[2J", LoRAWarning, stacklevel=1)
        warnings.warn("another", RuntimeWarning, stacklevel=1)
        # Python itself passes over a text that comes again from the same line alone.
        warnings.warn("another", RuntimeWarning, stacklevel=1)
        print("done")

    before = warnings.showwarning
    for _ in range(2):
        assert run_command(command) == 0
        printed = capsys.readouterr()
        assert printed.err == "warning: lora: a.safetensors: 1 of 2\\x1b[2J\nwarning: another\n"
        assert printed.out == "done\n"
    assert warnings.showwarning is before


def test_strict_loras_is_an_option_for_all_loras():
    options = ["--weights", "w", "--stage1-lora", "a", "--stage1-low-noise-lora", "b:2", "--stage2-lora", "c"]
    for strict in (False, True):
        args = build_parser().parse_args([*options, *(["--strict-loras"] if strict else [])])
        chosen = [lora for loras in chosen_loras(args).values() for lora in loras]
        assert [lora.strict for lora in chosen] == [strict] * 3
