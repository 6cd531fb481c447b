"""Damaged or hand-made LoRA files, and strengths that are no numbers, are refused before anything changes."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from model import DiTConfig, InputError, LoRA, WanDiT, apply_loras, load_dit, merge_loras
from model.weights.load import random_weights
from model.weights.lora import LoRASet
from tests.support.lora_spellings import MODULE, pair, saved
from tests.support.original_names import original_dit

DIT = DiTConfig(num_heads=1, num_layers=2, ffn_dim=8, in_channels=36, text_dim=8, freq_dim=8)
LARGEST = torch.finfo(torch.float32).max


FACTORS = {
    "one number": torch.ones(()),
    "a row": torch.ones(128),
    "nothing": torch.ones(0, 128),
    "complex": torch.ones(4, 128, dtype=torch.complex64),
    "integers": torch.ones(4, 128, dtype=torch.int32),
}


@pytest.mark.parametrize("part", ["lora_down", "lora_up"])
@pytest.mark.parametrize("kind", FACTORS)
def test_factors_that_fit_no_model_do_not_load(kind, part, tmp_path, inspected):
    """Factors that fit no model are refused, with and without a DiT; the wrong one of a pair is named, with reason."""
    state = random_weights(WanDiT, DIT, 0).state_dict()
    dit = saved(tmp_path / "dit.safetensors", original_dit(state))
    key, factor = f"{MODULE}.{part}.weight", FACTORS[kind]
    file = saved(tmp_path / "lora.safetensors", pair() | {key: factor, f"{MODULE}.alpha": torch.tensor(1.0)})
    dtype = str(factor.dtype).removeprefix("torch.")
    reason = f"shape {list(factor.shape)}, expected at least 2 sizes" if dtype == "float32" else f"{dtype}, expected"
    for options in ((), ("--for", dit)):
        code, printed = inspected(file, *options)
        assert code == 1
        assert printed["checkpoints"][0]["problem"].startswith("1 keys do not fit ")
        assert f"{key} ({reason}" in printed["checkpoints"][0]["problem"]
    with pytest.raises(InputError, match=r"lora\.safetensors: .*expected"):
        load_dit(dit, loras=[LoRA(file)])


def test_factors_of_different_ranks_and_differences_without_a_size_do_not_load(tmp_path, inspected):
    file = saved(tmp_path / "lora.safetensors", pair() | {f"{MODULE}.lora_up.weight": torch.ones(128, 3)})
    code, printed = inspected(file)
    assert code == 1
    assert "lora_up.weight (factors of [128, 3] and [4, 128] have no product)" in printed["checkpoints"][0]["problem"]
    for key in ("diff", "diff_b"):
        file = saved(tmp_path / "lora.safetensors", pair() | {f"{MODULE}.{key}": torch.ones(())})
        code, printed = inspected(file)
        assert code == 1
        assert f"{MODULE}.{key} (shape [], expected" in printed["checkpoints"][0]["problem"]


ALPHAS = {
    "nan": torch.tensor(math.nan),
    "inf": torch.tensor(math.inf),
    "more than float32": torch.tensor(1e300, dtype=torch.float64),
    "complex": torch.tensor(1 + 1j),
    "bool": torch.tensor(True),
}


@pytest.mark.parametrize("kind", ALPHAS)
def test_alphas_are_finite_numbers(kind, tmp_path, inspected):
    file = saved(tmp_path / "lora.safetensors", pair() | {f"{MODULE}.alpha": ALPHAS[kind]})
    not_merged(file, tmp_path, inspected)


@pytest.mark.parametrize("place", ["header", "adapter_config.json"])
@pytest.mark.parametrize(
    "values",
    [
        *('{"r": 4, "lora_alpha": NaN}', '{"r": 4, "lora_alpha": 1e400}', '{"r": 4, "lora_alpha": "inf"}'),
        *('{"r": NaN, "lora_alpha": 1}', '{"r": 4, "alpha_pattern": {"q": NaN}}', '{"r": 4, "lora_alpha": 1e300}'),
        *(f'{{"r": 4, "lora_alpha": {10**400}}}', "[" * 100_000),
        # Python would match these for longer than anybody waits.
        *('{"r": 4, "alpha_pattern": {"(a+)+x": 1}}', '{"r": 4, "rank_pattern": {".*.*.*.*.*x": 1}}'),
        f'{{"r": 4, "alpha_pattern": {{"{"(.|..)" * 40}x": 1}}}}',
    ],
    ids=["nan", "1e400", "inf", "rank", "pattern", "1e300", "integer", "deep", "nested", "many", "choices"],
)
def test_scales_of_a_configuration_are_finite_numbers(values, place, tmp_path, inspected):
    header = {"lora_adapter_metadata": values} if place == "header" else None
    if header is None:
        (tmp_path / "adapter_config.json").write_text(values)
    not_merged(saved(tmp_path / "lora.safetensors", pair(), header), tmp_path, inspected)


def not_merged(file, folder, inspected):
    code, printed = inspected(file)
    assert code == 1
    dit = saved(folder / "dit.safetensors", original_dit(random_weights(WanDiT, DIT, 0).state_dict()))
    with pytest.raises(InputError, match=r"lora\.safetensors|adapter_config\.json") as error:
        load_dit(dit, loras=[LoRA(file)])
    assert str(error.value) == printed["checkpoints"][0]["problem"]
    assert "\n" not in str(error.value)


def test_integer_and_half_alphas_still_count(tmp_path):
    """Alphas that are integers or float16 are read as numbers."""
    dit = saved(tmp_path / "dit.safetensors", original_dit(random_weights(WanDiT, DIT, 0).state_dict()))
    before = load_dit(dit).get_parameter("blocks.0.attn1.to_q.weight")
    for alpha in (torch.tensor(2), torch.tensor([2.0]).half(), torch.tensor(2.0).bfloat16()):
        file = saved(tmp_path / "lora.safetensors", pair() | {f"{MODULE}.alpha": alpha})
        after = load_dit(dit, loras=[LoRA(file)]).get_parameter("blocks.0.attn1.to_q.weight")
        assert torch.allclose(after, before + 2.0)


@pytest.mark.parametrize("strength", ["1", None, [1.0], True, 1 + 1j])
def test_a_strength_is_a_number(strength):
    with pytest.raises(InputError, match="strength: expected a number, got "):
        LoRA("lora.safetensors", strength)


@pytest.mark.parametrize("strength", [1e39, -1e39, 10**400])
def test_a_strength_is_one_that_float32_can_hold(strength):
    with pytest.raises(InputError, match="strength: expected a number that float32 can hold, got "):
        LoRA("lora.safetensors", strength)
    assert LoRA("lora.safetensors", LARGEST).strength == LARGEST


NOT_FINITE = {
    "NaN in a factor": ({"lora_up.weight": math.nan}, "lora_up.weight holds NaN or infinity; expected finite"),
    "infinity in a factor": ({"lora_down.weight": -math.inf}, "lora_down.weight holds NaN or infinity; expected"),
    "more than float32": ({"lora_down.weight": 1e300}, r"lora_down.weight holds 1e\+300; expected at most .* float32"),
    "NaN in a difference": ({"diff": math.nan}, "diff holds NaN or infinity; expected finite numbers"),
    "infinity in a bias": ({"diff_b": math.inf}, "diff_b holds NaN or infinity; expected finite numbers"),
    "a product beyond float32": (
        {"lora_up.weight": 1e30, "lora_down.weight": 1e30},
        "lora_up.weight at strength 0.5: blocks.0.attn2.to_out.0.weight then holds NaN or infinity; expected",
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_are_not_finite_are_named_before_any_weight_changes(case, tmp_path):
    """NaN, infinity and sums beyond float32 end each way of merging with the file and the tensor, which is its last;
    the weights stay as they were."""
    values, message = NOT_FINITE[case]
    dit, good = applicable(tmp_path)
    before = copied(dit)
    module = "diffusion_model.blocks.0.cross_attn.o"
    shapes = {"lora_down.weight": (4, 128), "lora_up.weight": (128, 4), "diff": (128, 128), "diff_b": (128,)}
    state = load_file(good)
    for part, value in values.items():
        tensor = torch.ones(shapes[part], dtype=torch.float64)
        tensor.view(-1)[-1] = value
        state[f"{module}.{part}"] = tensor
    bad = saved(tmp_path / "bad.safetensors", state)
    checkpoint = saved(tmp_path / "dit.safetensors", original_dit(before))
    for change in (merge_loras, apply_loras, lambda _, loras: load_dit(checkpoint, loras=loras)):
        with pytest.raises(InputError, match=rf"^lora: .*bad\.safetensors: {module}\.{message}"):
            change(dit, [LoRA(bad, 0.5)])
        assert same(before, dit)


def test_sums_that_float16_cannot_hold_are_refused_and_bfloat16_is_named(tmp_path):
    """A sum beyond 65504 is refused in a float16 model, at any strength that makes it; in bfloat16 it is merged."""
    message = (
        r"^lora: \S*lora\.safetensors: \S*\.lora_up\.weight at strength \d+:"
        r" blocks\.0\.attn1\.to_q\.weight then holds \d+(\.\d)?; expected at most 65504 in float16"
        r" \(dtype bfloat16 holds it\)$"
    )
    state = pair() | {f"{MODULE}.lora_up.weight": torch.full((128, 4), 200.0)}
    file = saved(tmp_path / "lora.safetensors", state)
    checkpoint = saved(tmp_path / "dit.safetensors", original_dit(random_weights(WanDiT, DIT, 0).state_dict()))
    dit = load_dit(checkpoint, dtype=torch.float16)
    before = copied(dit)
    for change in (merge_loras, apply_loras):
        with pytest.raises(InputError, match=message):
            change(dit, [LoRA(file, 100)])
        assert same(before, dit)
    with pytest.raises(InputError, match=message):
        load_dit(checkpoint, dtype=torch.float16, loras=[LoRA(file, 200)])
    with apply_loras(dit, [LoRA(file, 80)]) as applied:
        merged = copied(dit)
        with pytest.raises(InputError, match=message):
            applied.set_strengths([100])
        assert same(merged, dit)
    wide = load_dit(checkpoint, dtype=torch.bfloat16, loras=[LoRA(file, 100)])
    assert wide.get_parameter("blocks.0.attn1.to_q.weight").max() > 65504


def applicable(tmp_path, alpha=4.0):
    """Returns a model and a LoRA on three of its parameters."""
    dit = random_weights(WanDiT, DIT, 0)
    state = {}
    for name in ("self_attn.q", "self_attn.k", "cross_attn.o"):
        module = f"diffusion_model.blocks.0.{name}"
        state |= {key.replace(MODULE, module): torch.rand_like(tensor) for key, tensor in pair().items()}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return dit, saved(tmp_path / "lora.safetensors", state)


def copied(dit):
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


def same(state, dit):
    return all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())


def test_strength_times_scale_is_checked_before_anything_is_changed(tmp_path):
    dit, file = applicable(tmp_path, alpha=40.0)
    before = copied(dit)
    for change in (merge_loras, apply_loras):
        with pytest.raises(InputError, match=r"lora\.safetensors: strength 1e\+38 times the scale 10 of .* float32"):
            change(dit, [LoRA(file, 1e38)])
        assert same(before, dit)
    with apply_loras(dit, [LoRA(file, 0.5)]) as applied:
        merged = copied(dit)
        for strength in (1e38, 1e39, "1"):
            with pytest.raises(InputError, match="strength"):
                applied.set_strengths([strength])
            assert applied.strengths == (0.5,)
            assert same(merged, dit)
    assert same(before, dit)


def test_strengths_that_cannot_be_set_leave_the_former_ones(tmp_path, monkeypatch):
    """The former strengths stay after an error half-way; if the files are gone too, the LoRAs come off."""
    dit, file = applicable(tmp_path)
    before = copied(dit)
    applied = apply_loras(dit, [LoRA(file, 0.5)])
    merged = copied(dit)
    add_to, calls = LoRASet.add_to, []

    def failing(self, name, total, dtype, strengths=None):
        calls.append(name)
        if len(calls) in fails:
            raise MemoryError(f"call {len(calls)}")
        return add_to(self, name, total, dtype, strengths)

    fails = {3}
    monkeypatch.setattr(LoRASet, "add_to", failing)
    with pytest.raises(MemoryError, match="call 3"):
        applied.set_strengths([2.0])
    assert len(calls) == 6
    assert applied.strengths == (0.5,)
    assert same(merged, dit)
    calls.clear()
    fails = {3, 5}
    with pytest.raises(MemoryError):
        applied.set_strengths([2.0])
    assert same(before, dit)
    with pytest.raises(InputError, match="these have been removed"):
        applied.remove()
