"""Predicted times, peaks and ratios of the cost model agree with known times, and depend on the clip as they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.cost import dit, vae
from bench.cost.command import baseline
from bench.cost.configuration import Configuration
from bench.cost.pipeline import Part, parts, predict
from bench.cost.profiles import PROFILES, Curve, get_profile, seconds
from bench.cost.work import Matmul, Traffic, Work
from model.config import PRESETS, VAEConfig
from model.errors import InputError
from model.memory.cards import CARDS, get_gpu
from model.memory.vae_plan import plan_vae
from swifti2v_kernels.conv.checks import MAX_OWNED_CHANNELS
from tests.support.memory_requests import predict_nothing

_1B = PRESETS["1.3b"].stage_two
VERSIONS = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner of the VAE that predicts nothing, for tests of times and operations alone."""
    predict_nothing(monkeypatch)


@pytest.mark.usefixtures("quick")
def test_guidance_is_a_second_forward_of_every_step() -> None:
    plain, guided = ({p.name: p for p in parts(Configuration.for_preset("tiny", guidance=g))} for g in (False, True))
    assert guided["denoise"].work.total_flops == 2 * plain["denoise"].work.total_flops
    assert guided["denoise"].forwards == 2 * plain["denoise"].forwards
    assert all(guided[name].flops == part.flops for name, part in plain.items() if name != "denoise")


@pytest.mark.usefixtures("quick")
def test_windows_bound_the_operations_of_a_long_clip() -> None:
    """Stage II grows with the number of segments, end to end with its square."""
    flops = {}
    for mode in ("bidirectional", "end_to_end"):
        for num_frames in (73, 145):  # 6 and 12 segments of 3 blocks
            c = Configuration.for_preset("1.3b", num_frames=num_frames, mode=mode)
            (part,) = (p for p in parts(c) if p.name == "denoise")
            flops[mode, num_frames] = part.flops["self_attention"]
    assert 2.0 < flops["bidirectional", 145] / flops["bidirectional", 73] < 2.1
    assert 3.7 < flops["end_to_end", 145] / flops["end_to_end", 73] < 4.0


def test_folded_upsampling_has_16_of_36_operations() -> None:
    layers = vae.decoder(VERSIONS["2.1"], 640, 352, 81)
    folded = [layer for layer in layers if layer.kind == "upsample"]
    assert len(folded) == 3
    for layer in folded:
        full = 2 * 9 * layer.channels * layer.columns * layer.pixels
        assert layer.flops * 36 == full * 16


def named(configuration: Configuration, **options: Any) -> dict[str, Part]:
    """Returns the parts of a configuration by name."""
    return {part.name: part for part in parts(configuration, **options)}


def test_stage_two_and_the_decoder_are_on_the_card_together() -> None:
    c = Configuration.for_preset("1.3b")
    found = named(c)
    own = plan_vae(c.vae, "decode", 2560, 1408, piece=3).peak
    stage_two = found["denoise"].peak_bytes - own.weights - own.state
    assert found["decode"].peak_bytes == stage_two + own.total
    # Weights, and 4.3 copies of the residual stream (README).
    assert stage_two > found["denoise"].weight_bytes + 4.3 * 2 * 70400 * c.stage_two.dim


def test_peaks_do_not_grow_with_the_clip_but_for_stored_latents() -> None:
    short, long = (named(Configuration.for_preset("1.3b", num_frames=n)) for n in (81, 161))
    stored = 20 * 16 * 176 * 320 * 4
    assert long["denoise"].peak_bytes - short["denoise"].peak_bytes == stored
    assert long["decode"].peak_bytes - short["decode"].peak_bytes == stored
    assert long["encode"].peak_bytes == short["encode"].peak_bytes


@pytest.mark.slow
def test_a_small_card_gets_tiles_that_fit_and_more_work() -> None:
    c = Configuration.for_preset("1.3b")
    whole, tiled = named(c), named(c, memory=24 * 10**9)
    assert "exact tiles" in tiled["decode"].note
    assert whole["decode"].note == ""
    assert tiled["decode"].peak_bytes < 24e9 < whole["decode"].peak_bytes
    assert 1 < tiled["decode"].work.total_flops / whole["decode"].work.total_flops < 1.3
    # The anchor and seven segments: the states of all tiles, 17 GB, wait in host memory between them.
    state = plan_vae(c.vae, "decode", 2560, 1408, piece=3).peak.state
    assert tiled["decode"].host_bytes == pytest.approx(15 * state, rel=1e-3)
    assert whole["decode"].host_bytes == 0
    decode = next(p for p in predict(c, get_gpu("RTX 4090"), get_profile("swifti2v")).parts if p.part.name == "decode")
    assert decode.seconds > decode.part.host_bytes / 25e9


def test_forms_of_the_vae_move_more_the_less_they_fuse() -> None:
    """The eager form moves the 1,016 GB a latent frame at 2K that diffusers' code was counted to move."""
    longer, shorter = (vae.work(VERSIONS["2.1"], "decode", 2560, 1408, frames).between for frames in (37, 33))
    fused, separate, eager = (more - less for more, less in zip(longer, shorter, strict=True))
    assert fused < separate < eager
    assert eager == pytest.approx(1016.5e9, rel=0.1)


#: Seconds that are known: of a configuration, on a card, by code of a profile (sources: docs/results/notes.md).
KNOWN = [
    (22400.0, "H800", "reference", {"encode_dtype": torch.bfloat16}, "end to end"),
    (4.9034, "H200", "swifti2v", {}, "Stage I"),
    (14.105, "H200", "swifti2v", {}, "reference"),
    (45.411, "H200", "swifti2v", {}, "Stage II"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("known", "gpu", "profile", "changes", "what"), KNOWN)
def test_predictions_are_near_published_and_measured_times(
    known: float, gpu: str, profile: str, changes: dict[str, Any], what: str
) -> None:
    """Predictions are within an eighth of the paper's baseline and of the stages that an H200 was measured by."""
    whole = what == "end to end"
    found = predict(
        baseline(**changes) if whole else Configuration.for_preset("14b-1.3b"), get_gpu(gpu), get_profile(profile)
    )
    assert (found.seconds if whole else found.by_stage[what]) == pytest.approx(known, rel=0.125)


def test_a_prediction_is_the_sum_of_its_parts_and_says_what_it_assumes() -> None:
    prediction = predict(Configuration.for_preset("1.3b"), get_gpu("H200"), get_profile("swifti2v"))
    names = [p.part.name for p in prediction.parts]
    assert names == ["condition", "motion", "low decode", "encode", "denoise", "decode"]
    assert prediction.seconds == pytest.approx(sum(prediction.by_stage.values()))
    assert list(prediction.by_stage) == ["Stage I", "reference", "Stage II", "decode"]
    for p in prediction.parts:
        itemsize = 4 if p.part.name in ("condition", "encode") else 2
        assert p.part.itemsize == itemsize
        assert p.seconds == pytest.approx(seconds(p.part.work, prediction.gpu, prediction.profile, itemsize))
    text = " ".join(prediction.assumptions)
    assert "predicted" in text
    assert "measured on an H200" in text
    assert "encoders in float32" in text
    # The least time that the data sheet allows, and no more than several times that.
    least = sum(p.part.work.total_flops for p in prediction.parts) / 989.4e12
    assert least < prediction.seconds < 3 * least


@pytest.mark.usefixtures("quick")
def test_rates_say_where_they_were_measured_and_where_they_are_assumed() -> None:
    own = get_profile("swifti2v")
    for gpu in CARDS.values():
        assert own.rates_for(gpu).basis == ("measured on an H200" if gpu.architecture == "hopper" else "assumed")
    (said,) = (s for s in predict(Configuration.for_preset("tiny"), get_gpu("B200"), own).assumptions if "Rates" in s)
    assert "assumed" in said


def test_the_cost_model_knows_which_convolutions_norm_what_they_store() -> None:
    assert vae.MAX_OWNED_CHANNELS == MAX_OWNED_CHANNELS


@pytest.mark.slow
def test_weights_that_do_not_fit_are_streamed_and_what_cannot_fit_is_said() -> None:
    own, card = get_profile("swifti2v"), get_gpu("RTX 4090")
    slow = replace(card, host=0.5)
    c = Configuration.for_preset("14b-1.3b")
    motion = {gpu.host: next(p for p in predict(c, gpu, own).parts if p.part.name == "motion") for gpu in (card, slow)}
    assert all(p.streamed and not p.fits for p in motion.values())
    assert motion[25].seconds < motion[0.5].seconds == 4 * motion[0.5].part.weight_bytes / 0.5e9
    whole = predict(baseline(), card, own)
    assert any("predicted as if it fitted" in sentence for sentence in whole.assumptions)


@pytest.mark.usefixtures("quick")
def test_what_takes_longer_takes_longer() -> None:
    h200, own, reference = get_gpu("H200"), get_profile("swifti2v"), get_profile("reference")

    def took(configuration: Configuration, gpu: str = "H200", profile: str = "swifti2v") -> float:
        return predict(configuration, get_gpu(gpu), get_profile(profile)).seconds

    c = Configuration.for_preset("1.3b")
    base = took(c)
    assert took(replace(c, steps=8)) > 1.5 * base
    assert took(replace(c, guidance=True)) > 1.5 * base
    assert took(replace(c, encode_dtype=torch.bfloat16)) < base
    assert took(replace(c, mode="causal")) < base < took(replace(c, mode="end_to_end"))
    assert took(c, profile="reference") > took(c, profile="reference, FlashAttention-3") > base
    assert took(c, "A100") > took(c, "H100") > base
    work = Work((Matmul("upsample", 16 * 10**12, 256),))
    assert seconds(work, h200, replace(own, folded=False)) == pytest.approx(36 / 16 * seconds(work, h200, own))
    assert seconds(Work(between=Traffic(eager=7e12)), h200, reference) > 0 == seconds(Work(), h200, reference)


def test_a_curve_is_its_points_with_logarithms_between() -> None:
    curve = Curve(((100, 0.2), (10000, 0.6)))
    assert [curve.at(n) for n in (1, 100, 10000, 10**6)] == [0.2, 0.2, 0.6, 0.6]
    assert curve.at(1000) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Configuration.for_preset("1.3b", steps=0), "steps: expected at least 1, got 0"),
        (lambda: Configuration.for_preset("1.3b", width=2561), "size: width and height must be multiples of 16"),
        (lambda: Configuration.for_preset("1.3b", num_frames=80), r"frames: expected 1 \+ 4n"),
        (lambda: Configuration.for_preset("1.3b", mode="fast"), "mode: expected one of .*, got 'fast'"),
        (
            lambda: Configuration.for_preset("1.3b", dtype=torch.float64),
            "dtype: expected bfloat16, .*, got torch.float64",
        ),
        (lambda: Configuration.for_preset("1.3b", blocks_per_segment=0), "blocks_per_segment: expected at least 1"),
        (lambda: Configuration.for_preset("1.3b", vae=VERSIONS["2.2"]), "in_channels: a DiT for latents of 48"),
        (
            lambda: Configuration.for_preset("1.3b", stage_one_vae=VERSIONS["2.2"]),
            "in_channels: a DiT for latents of 48",
        ),
        (lambda: Configuration(None, _1B, VERSIONS["2.1"]), "mode: without a stage_one only end_to_end"),
        (lambda: get_gpu("H300"), "gpu: unknown 'H300'; choose one of H100"),
        (lambda: get_profile("fast"), "profile: unknown 'fast'; choose one of reference"),
        (lambda: dit.forward(_1B, 10, targets=11), r"tokens, targets: expected .* got 10 and 11"),
        (lambda: dit.forward(_1B, 10, remembered=-1), "remembered, text_tokens: expected"),
        (lambda: dit.tokens_per_block(_1B, (175, 320)), "latent_size: expected positive multiples of the patch 2 x 2"),
        (lambda: vae.work(VERSIONS["2.1"], "both", 640, 352, 81), "part: expected decode or encode, got 'both'"),
        (lambda: vae.work(VERSIONS["2.1"], "decode", 641, 352, 81), "size: width and height must be multiples of 8"),
        (lambda: vae.work(VERSIONS["2.1"], "decode", 640, 352, 80), r"frames: expected 1 \+ 4n"),
        (lambda: seconds(Work(), CARDS["H200"], PROFILES["reference"], 8), "itemsize: expected 2 or 4, got 8"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Matmul("matmul", 1, 1), "kind: expected one of .*, got 'matmul'"),
        (lambda: Matmul("linear", -1, 1), "flops, extent: expected .* got -1 and 1"),
        (lambda: -1 * Work(), "times: expected at least 0, got -1"),
        (lambda: Curve(((2, 0.5), (1, 0.5))), "points: expected one or more with growing positive extents"),
        (lambda: Curve.constant(1.5), "points: expected fractions above 0 and up to 1"),
    ],
)
def test_what_a_caller_gets_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
