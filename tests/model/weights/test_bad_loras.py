"""Damaged or hand-made LoRA files, and strengths that are no numbers, are refused before anything changes."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from model import InputError, LoRA, WanDiT, load_dit, merge_loras
from model.weights.load import random_weights
from model.weights.lora_files import open_lora
from tests.model.weights.conftest import DIT
from tests.support.lora_spellings import MODULE, pair, same, saved, state_of

QUERY = "blocks.0.attn1.to_q.weight"


def header(**values):
    return json.dumps({"r": 4, "lora_alpha": 4} | values)


#: What is said of a pair with other tensors of its module, or of the model.
TENSORS = {
    "a number for a factor": ({".lora_down.weight": torch.ones(())}, "has the shape [], expected at least 2 sizes"),
    "an empty factor": ({".lora_up.weight": torch.ones(0, 4)}, "lora_up.weight has the shape [0, 4], expected at"),
    "integers": ({".lora_up.weight": torch.ones(4, 128).int()}, "lora_up.weight is int32, expected floats"),
    "other ranks": ({".lora_up.weight": torch.ones(128, 3)}, "lora_down.weight [4, 128] have no product; expected"),
    "a difference without a size": ({".diff_b": torch.ones(())}, "diff_b has the shape [], expected at least 1 size"),
    "an infinite alpha": ({".alpha": torch.tensor(math.inf)}, "alpha: expected one finite number"),
    "a complex alpha": ({".alpha": torch.tensor(1 + 1j)}, "alpha: expected one finite number"),
    "two alphas": ({".alpha": torch.ones(2)}, "alpha: expected one finite number"),
    "too large an alpha": ({".alpha": torch.tensor(1e300, dtype=torch.float64)}, "expected one that float32 can hold"),
    "DoRA": ({".dora_scale": torch.ones(1)}, "is DoRA ("),
    "LoKr": ({".lokr_w1": torch.ones(1)}, f"is LoKr ({MODULE}.lokr_w1), which cannot be merged as a LoRA"),
    "two adapters": ({".lora_A.weight": torch.ones(4, 128)}, "holds several adapters ("),
    "two names": ({".lora_up.weight": None, ".lora_down.weight": None} | {
        f"{module}.lora_{part}.weight": torch.ones(128, 128)
        for module in ("blocks.0.attn1.to_q", "blocks.0.self_attn.q") for part in "AB"
    }, "holds several adapters ("),
}  # fmt: skip
#: What is said of PEFT's configuration.
CONFIGS = {
    "NaN": (header(lora_alpha=math.nan), "expected a finite number, got nan"),
    "a word": (header(lora_alpha="much"), "is not understood"),
    "a huge integer": (f'{{"r": 4, "lora_alpha": {10**400}}}', "is not understood"),
    "beyond float32": (header(lora_alpha=1e300), "expected one that float32 can hold"),
    "no pattern": (header(alpha_pattern={"(": 1}), "is not understood"),
    "a list of patterns": (header(alpha_pattern=[1]), "is not understood"),
    # Python would match these for longer than anybody waits.
    "nested repetitions": (header(alpha_pattern={"(a+)+x": 1}), "4 repetitions and choices, and none of"),
    "many repetitions": (header(alpha_pattern={".*.*.*.*.*x": 1}), "expected at most 4 repetitions and choices"),
    "another file's rank": (header(r=8), "has rank 4, but "),
    "another adapter": (header(peft_type="ADALORA"), "is ADALORA ("),
    "DoRA": (header(use_dora=True), "is DoRA ("),
    "too deep": ("[" * 100_000, "is not "),
}  # fmt: skip


def not_merged(file, message, dit, inspected):
    code, printed = inspected(file)
    assert code == 1
    with pytest.raises(InputError, match=rf"lora\.safetensors|adapter_config\.json.*{re.escape(message)}") as error:
        load_dit(dit, loras=[LoRA(file)])
    for text in (str(error.value), printed["checkpoints"][0]["problem"]):
        assert message in text
        assert "\n" not in text


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_no_lora_has_are_refused(kind, wan, tmp_path, inspected):
    changes, message = TENSORS[kind]
    state = pair() | {f"{MODULE}{key}" if key[0] == "." else key: tensor for key, tensor in changes.items()}
    file = saved(tmp_path / "lora.safetensors", {key: tensor for key, tensor in state.items() if tensor is not None})
    not_merged(file, message, wan(), inspected)


@pytest.mark.parametrize("place", ["header", "adapter_config.json"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_that_no_lora_has_are_refused(kind, place, wan, tmp_path, inspected):
    values, message = CONFIGS[kind]
    metadata = {"lora_adapter_metadata": values} if place == "header" else None
    if metadata is None:
        (tmp_path / "adapter_config.json").write_text(values)
    not_merged(saved(tmp_path / "lora.safetensors", pair(), metadata), message, wan(), inspected)


def test_a_lora_is_looked_for_in_a_folder_and_called_by_its_name(tmp_path, wan):
    dit, folder = wan(), tmp_path / "loras"
    folder.mkdir()
    for path, message in (
        (tmp_path / "nowhere.safetensors", "lora: .*nowhere.safetensors does not exist"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        (folder, r"^lora: no safetensors or .* file in "),
        (dit, r"wan.safetensors holds no LoRA; its tensors are named like "),
    ):
        with pytest.raises(InputError, match=message):
            load_dit(dit, loras=[LoRA(path)])
    saved(folder / "a.safetensors", pair())
    load_dit(dit, loras=[LoRA(folder)])
    saved(folder / "b.safetensors", pair())
    with pytest.raises(InputError, match=r"^lora: .* holds several candidates, name one: a.safetensors, b.safetensors"):
        load_dit(dit, loras=[LoRA(folder)])
    # The name that a trainer gives it goes before its other files.
    torch.save({}, folder / "optimizer.pt")
    torch.save(pair(), folder / "adapter_model.bin")
    assert open_lora(folder).path.name == "adapter_model.bin"
    assert open_lora(saved(folder / "adapter_model.safetensors", pair()).parent).path.suffix == ".safetensors"


def test_alphas_may_be_integers_or_float16(wan, tmp_path):
    dit = wan()
    before = load_dit(dit).get_parameter(QUERY)
    for alpha in (torch.tensor(2), torch.tensor([2.0]).half()):
        file = saved(tmp_path / "lora.safetensors", pair() | {f"{MODULE}.alpha": alpha})
        assert torch.allclose(load_dit(dit, loras=[LoRA(file)]).get_parameter(QUERY), before + 2.0)


def test_a_strength_is_a_number_that_float32_can_hold():
    for strength in ("1", None, True, 1 + 1j, math.inf, math.nan, -1e39, 10**400):
        with pytest.raises(InputError, match="strength: expected a number that float32 can hold, got "):
            LoRA("lora.safetensors", strength)
    largest = torch.finfo(torch.float32).max
    assert LoRA("lora.safetensors", largest).strength == largest
    with pytest.raises(InputError, match="expert: expected 1 or 2, got 3"):
        LoRA("lora.safetensors", expert=3)


NOT_FINITE = {
    "NaN in a factor": ({"lora_up.weight": math.nan}, 0.5, "lora_up.weight holds NaN or infinity; expected finite"),
    "more than float32": ({"lora_down.weight": 1e300}, 0.5, r"lora_down.weight holds 1e\+300; expected .* float32"),
    "infinity in a bias": ({"diff_b": math.inf}, 0.5, "diff_b holds NaN or infinity; expected finite numbers"),
    "a product beyond float32": (
        {"lora_up.weight": 1e30, "lora_down.weight": 1e30}, 0.5,
        "lora_up.weight at strength 0.5: blocks.0.attn2.to_out.0.weight then holds NaN or infinity; expected",
    ),
    "a sum beyond float16": (
        {"lora_up.weight": 200, "lora_down.weight": 100}, 100,
        r"lora_up.weight at strength 100: \S+ then holds [\d.e+]+; expected at most 65504 in float16 \(dtype bfloat16 ",
    ),
    "a scale beyond float32": ({}, 1e38, None),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_cannot_be_are_named_before_any_weight_changes(case, wan, tmp_path):
    """NaN, infinity and sums beyond the dtype end each way of merging with the file and the tensor, which is its last;
    the weights stay as they were."""
    values, strength, message = NOT_FINITE[case]
    dtype = torch.float16 if "float16" in case else torch.float32
    dit = random_weights(WanDiT, DIT, 0, dtype=dtype)
    before, good = state_of(dit), applicable(tmp_path, alpha=40.0)
    module = "diffusion_model.blocks.0.cross_attn.o"
    shapes = {"lora_down.weight": (4, 128), "lora_up.weight": (128, 4), "diff_b": (128,)}
    state = load_file(good)
    for part, value in values.items():
        tensor = torch.ones(shapes[part], dtype=torch.float64)
        tensor.view(-1)[-1] = value
        state[f"{module}.{part}"] = tensor
    bad, checkpoint = saved(tmp_path / "bad.safetensors", state), wan()
    told = r"bad\.safetensors: strength 1e\+38 times the scale 10 of .* float32" if message is None else (
        rf"^lora: .*bad\.safetensors: {module}\.{message}"
    )  # fmt: skip
    for change in (merge_loras, lambda _, loras: load_dit(checkpoint, dtype=dtype, loras=loras)):
        with pytest.raises(InputError, match=told):
            change(dit, [LoRA(bad, strength)])
        assert same(before, dit)


def applicable(tmp_path, alpha=4.0):
    """Returns a LoRA on three parameters."""
    state = {}
    for name in ("self_attn.q", "self_attn.k", "cross_attn.o"):
        module = f"diffusion_model.blocks.0.{name}"
        state |= {key.replace(MODULE, module): torch.rand_like(tensor) for key, tensor in pair().items()}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return saved(tmp_path / "lora.safetensors", state)
