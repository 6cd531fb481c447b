"""Damaged or hand-made LoRA files, and strengths that are no numbers, are refused before anything changes."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from model import InputError, LoRA, WanDiT, apply_loras, load_dit, merge_loras
from model.weights.load import random_weights
from model.weights.lora import LoRASet
from tests.model.weights.conftest import DIT
from tests.support.lora_spellings import MODULE, pair, same, saved, state_of

LARGEST = torch.finfo(torch.float32).max
QUERY = "blocks.0.attn1.to_q.weight"


@pytest.fixture
def lora(tmp_path):
    """Returns a function that saves the pair of MODULE with other tensors, and a header, as ``lora.safetensors``."""
    return lambda changes, metadata=None: saved(tmp_path / "lora.safetensors", pair() | changes, metadata)


FACTORS = {
    "one number": torch.ones(()),
    "a row": torch.ones(128),
    "nothing": torch.ones(0, 128),
    "complex": torch.ones(4, 128, dtype=torch.complex64),
    "integers": torch.ones(4, 128, dtype=torch.int32),
}


@pytest.mark.parametrize("part", ["lora_down", "lora_up"])
@pytest.mark.parametrize("kind", FACTORS)
def test_factors_that_fit_no_model_do_not_load(kind, part, wan, lora, inspected):
    """Factors that fit no model are refused, with and without a DiT; the wrong one of a pair is named, with reason."""
    dit, key, factor = wan(), f"{MODULE}.{part}.weight", FACTORS[kind]
    file = lora({key: factor, f"{MODULE}.alpha": torch.tensor(1.0)})
    dtype = str(factor.dtype).removeprefix("torch.")
    reason = f"shape {list(factor.shape)}, expected at least 2 sizes" if dtype == "float32" else f"{dtype}, expected"
    for options in ((), ("--for", dit)):
        code, printed = inspected(file, *options)
        assert code == 1
        assert printed["checkpoints"][0]["problem"].startswith("1 keys do not fit ")
        assert f"{key} ({reason}" in printed["checkpoints"][0]["problem"]
    with pytest.raises(InputError, match=r"lora\.safetensors: .*expected"):
        load_dit(dit, loras=[LoRA(file)])


@pytest.mark.parametrize(
    ("key", "tensor", "reason"),
    [
        ("lora_up.weight", torch.ones(128, 3), "factors of [128, 3] and [4, 128] have no product)"),
        ("diff", torch.ones(()), "shape [], expected"),
        ("diff_b", torch.ones(()), "shape [], expected"),
    ],
)
def test_factors_of_different_ranks_and_differences_without_a_size_do_not_load(key, tensor, reason, lora, inspected):
    code, printed = inspected(lora({f"{MODULE}.{key}": tensor}))
    assert code == 1
    assert f"{MODULE}.{key} ({reason}" in printed["checkpoints"][0]["problem"]


ALPHAS = {
    "nan": torch.tensor(math.nan),
    "inf": torch.tensor(math.inf),
    "more than float32": torch.tensor(1e300, dtype=torch.float64),
    "complex": torch.tensor(1 + 1j),
    "bool": torch.tensor(True),
}


@pytest.mark.parametrize("kind", ALPHAS)
def test_alphas_are_finite_numbers(kind, wan, lora, inspected):
    not_merged(lora({f"{MODULE}.alpha": ALPHAS[kind]}), wan(), inspected)


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
def test_scales_of_a_configuration_are_finite_numbers(values, place, wan, lora, tmp_path, inspected):
    header = {"lora_adapter_metadata": values} if place == "header" else None
    if header is None:
        (tmp_path / "adapter_config.json").write_text(values)
    not_merged(lora({}, header), wan(), inspected)


def not_merged(file, dit, inspected):
    code, printed = inspected(file)
    assert code == 1
    with pytest.raises(InputError, match=r"lora\.safetensors|adapter_config\.json") as error:
        load_dit(dit, loras=[LoRA(file)])
    assert str(error.value) == printed["checkpoints"][0]["problem"]
    assert "\n" not in str(error.value)


def test_integer_and_half_alphas_still_count(wan, lora):
    """Alphas that are integers or float16 are read as numbers."""
    dit = wan()
    before = load_dit(dit).get_parameter(QUERY)
    for alpha in (torch.tensor(2), torch.tensor([2.0]).half(), torch.tensor(2.0).bfloat16()):
        after = load_dit(dit, loras=[LoRA(lora({f"{MODULE}.alpha": alpha}))]).get_parameter(QUERY)
        assert torch.allclose(after, before + 2.0)


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        (["1", None, [1.0], True, 1 + 1j], "a number, got "),
        ([math.inf, math.nan], "a finite number, got "),
        ([1e39, -1e39, 10**400], "a number that float32 can hold, got "),
    ],
)
def test_a_strength_is_a_number_that_float32_can_hold(strengths, expected):
    for strength in strengths:
        with pytest.raises(InputError, match=f"strength: expected {expected}"):
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
def test_numbers_that_are_not_finite_are_named_before_any_weight_changes(case, wan, tmp_path):
    """NaN, infinity and sums beyond float32 end each way of merging with the file and the tensor, which is its last;
    the weights stay as they were."""
    values, message = NOT_FINITE[case]
    dit, good = applicable(tmp_path)
    before = state_of(dit)
    module = "diffusion_model.blocks.0.cross_attn.o"
    shapes = {"lora_down.weight": (4, 128), "lora_up.weight": (128, 4), "diff": (128, 128), "diff_b": (128,)}
    state = load_file(good)
    for part, value in values.items():
        tensor = torch.ones(shapes[part], dtype=torch.float64)
        tensor.view(-1)[-1] = value
        state[f"{module}.{part}"] = tensor
    bad = saved(tmp_path / "bad.safetensors", state)
    checkpoint = wan()
    for change in (merge_loras, apply_loras, lambda _, loras: load_dit(checkpoint, loras=loras)):
        with pytest.raises(InputError, match=rf"^lora: .*bad\.safetensors: {module}\.{message}"):
            change(dit, [LoRA(bad, 0.5)])
        assert same(before, dit)


def test_sums_that_float16_cannot_hold_are_refused_and_bfloat16_is_named(wan, lora):
    """A sum beyond 65504 is refused in a float16 model, at any strength that makes it; in bfloat16 it is merged."""
    message = (
        r"^lora: \S*lora\.safetensors: \S*\.lora_up\.weight at strength \d+:"
        r" blocks\.0\.attn1\.to_q\.weight then holds \d+(\.\d)?; expected at most 65504 in float16"
        r" \(dtype bfloat16 holds it\)$"
    )
    file, checkpoint = lora({f"{MODULE}.lora_up.weight": torch.full((128, 4), 200.0)}), wan()
    dit = load_dit(checkpoint, dtype=torch.float16)
    before = state_of(dit)
    for change in (merge_loras, apply_loras):
        with pytest.raises(InputError, match=message):
            change(dit, [LoRA(file, 100)])
        assert same(before, dit)
    with pytest.raises(InputError, match=message):
        load_dit(checkpoint, dtype=torch.float16, loras=[LoRA(file, 200)])
    with apply_loras(dit, [LoRA(file, 80)]) as applied:
        merged = state_of(dit)
        with pytest.raises(InputError, match=message):
            applied.set_strengths([100])
        assert same(merged, dit)
    wide = load_dit(checkpoint, dtype=torch.bfloat16, loras=[LoRA(file, 100)])
    assert wide.get_parameter(QUERY).max() > 65504


def applicable(tmp_path, alpha=4.0):
    """Returns a model and a LoRA on three of its parameters."""
    dit = random_weights(WanDiT, DIT, 0)
    state = {}
    for name in ("self_attn.q", "self_attn.k", "cross_attn.o"):
        module = f"diffusion_model.blocks.0.{name}"
        state |= {key.replace(MODULE, module): torch.rand_like(tensor) for key, tensor in pair().items()}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return dit, saved(tmp_path / "lora.safetensors", state)


def test_strength_times_scale_is_checked_before_anything_is_changed(tmp_path):
    dit, file = applicable(tmp_path, alpha=40.0)
    before = state_of(dit)
    for change in (merge_loras, apply_loras):
        with pytest.raises(InputError, match=r"lora\.safetensors: strength 1e\+38 times the scale 10 of .* float32"):
            change(dit, [LoRA(file, 1e38)])
        assert same(before, dit)
    with apply_loras(dit, [LoRA(file, 0.5)]) as applied:
        merged = state_of(dit)
        for strength in (1e38, 1e39, "1"):
            with pytest.raises(InputError, match="strength"):
                applied.set_strengths([strength])
            assert applied.strengths == (0.5,)
            assert same(merged, dit)
    assert same(before, dit)


def test_strengths_that_cannot_be_set_leave_the_former_ones(tmp_path, monkeypatch):
    """The former strengths stay after an error half-way; if the files are gone too, the LoRAs come off."""
    dit, file = applicable(tmp_path)
    before = state_of(dit)
    applied = apply_loras(dit, [LoRA(file, 0.5)])
    merged = state_of(dit)
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
