"""Predicted times, peaks and ratios of the cost model agree with known times, and depend on the clip as they must."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cost.configuration import Configuration
from bench.cost.pipeline import Part, parts, predict
from bench.cost.profiles import RATES, seconds
from model.memory.vae_plan import plan_vae
from swifti2v_kernels.common.cards import CARDS, Card
from tests.support.memory_requests import predict_nothing


def named(configuration: Configuration, card: Card | None = None) -> dict[str, Part]:
    """Returns the parts of a configuration by name."""
    return {part.name: part for part in parts(configuration, card)}


def test_stage_two_and_the_decoder_are_on_the_card_together() -> None:
    c = Configuration.for_preset("1.3b")
    found = named(c)
    own = plan_vae(c.vae, "decode", 2560, 1408, piece=3).peak
    stage_two = found["denoise"].peak_bytes - own.weights - own.state
    assert found["decode"].peak_bytes == stage_two + own.total
    # Weights, and 4.3 copies of the residual stream (README).
    assert stage_two > found["denoise"].weight_bytes + 4.3 * 2 * 70400 * c.stage_two.dim


@pytest.mark.slow
def test_a_small_card_gets_tiles_that_fit_and_more_work() -> None:
    c = Configuration.for_preset("1.3b")
    whole, tiled = named(c), named(c, CARDS["RTX 4090"])
    assert "exact tiles" in tiled["decode"].note
    assert whole["decode"].note == ""
    assert tiled["decode"].peak_bytes < 24e9 < whole["decode"].peak_bytes
    assert 1 < tiled["decode"].work.total_flops / whole["decode"].work.total_flops < 1.3
    # The anchor and seven segments: the states of all tiles, 17 GB, wait in host memory between them.
    state = plan_vae(c.vae, "decode", 2560, 1408, piece=3).peak.state
    assert tiled["decode"].host_bytes == pytest.approx(15 * state, rel=1e-3)
    assert whole["decode"].host_bytes == 0
    decode = predict(c, CARDS["RTX 4090"]).parts[-1]
    assert decode.seconds > decode.host_bytes / 25e9


#: Seconds of the stages of a clip by 14B and 1.3B that were measured on an H200 (docs/results/h200.md).
KNOWN = {"Stage I": 4.9034, "reference": 14.105, "Stage II": 45.411}


def test_a_prediction_is_the_sum_of_its_parts_and_says_what_it_assumes() -> None:
    """It is within an eighth of measured stages, and no less than the data sheet allows."""
    prediction = predict(Configuration.for_preset("14b-1.3b"), CARDS["H200"])
    names = [part.name for part in prediction.parts]
    assert names == ["condition", "motion", "low decode", "encode", "denoise", "decode"]
    assert prediction.seconds == pytest.approx(sum(prediction.by_stage.values()))
    assert {stage: prediction.by_stage[stage] for stage in KNOWN} == pytest.approx(KNOWN, rel=0.125)
    for part in prediction.parts:
        assert part.itemsize == (4 if part.name in ("condition", "encode") else 2)
        assert part.seconds == pytest.approx(seconds(part.work, CARDS["H200"], part.itemsize))
    text = " ".join(prediction.assumptions)
    assert "predicted" in text
    assert "measured on an H200" in text
    assert "encoders in float32" in text
    assert prediction.seconds > sum(part.work.total_flops for part in prediction.parts) / 989.4e12


@pytest.mark.slow
def test_weights_that_do_not_fit_are_streamed() -> None:
    card = CARDS["RTX 4090"]
    slow = replace(card, host=0.5)
    c = Configuration.for_preset("14b-1.3b")
    motion = {gpu.host: predict(c, gpu).parts[1] for gpu in (card, slow)}
    assert all(part.streamed and not part.fits for part in motion.values())
    assert motion[25].seconds < motion[0.5].seconds == 4 * motion[0.5].weight_bytes / 0.5e9


def test_what_takes_longer_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    predict_nothing(monkeypatch)

    def took(configuration: Configuration, gpu: str = "H200") -> float:
        return predict(configuration, CARDS[gpu]).seconds

    c = Configuration.for_preset("1.3b")
    base = took(c)
    assert took(replace(c, steps=8)) > 1.5 * base
    assert took(replace(c, guidance=True)) > 1.5 * base
    assert took(replace(c, mode="causal")) < base < took(replace(c, mode="end_to_end"))
    assert took(c, "A100") > took(c, "H100") > base


def test_a_fraction_is_that_of_its_points_with_logarithms_between() -> None:
    rates = RATES["hopper"]._replace(attention=((100, 0.2), (10000, 0.6)))
    fractions = [rates.fraction("self_attention", extent, False) for extent in (1, 100, 1000, 10000, 10**6)]
    assert fractions == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
