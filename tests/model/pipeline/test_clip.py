"""One clip through both stages: the pipeline's functions in their order, what a watcher is told, and what is let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import PRESETS
from model.csg.sampler import SegmentPlan, plan_for, sample_latents
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.errors import InputError
from model.machine.host import Host
from model.pipeline.clip import ClipJob, Item, Watcher, make_condition, make_frames
from model.pipeline.components import Components
from model.pipeline.encoders import empty_text
from model.pipeline.stages import decode_frames, make_motion, make_reference, motion_condition
from model.vae.model import WanVAE
from model.vae.tiles import VAEPlan, VAEPlans
from model.weights.load import random_weights
from tests.model.vae.test_tiles import OtherMemory
from tests.support.bench_session import CPU
from tests.support.tolerances import PARITY, relative_error

SIZE, LOW, BLOCKS = (48, 32), (32, 16), 5
PARKED = VAEPlan(1, 2, chunk=None, park=True)
PLANS = VAEPlans(*[VAEPlan()] * 4, torch.float32)


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, Tensor]:
    """The reference and the frames of a clip that nobody watches."""
    return whole(components(), job())


def components(**changes: Any) -> Components:
    return replace(Components.from_preset("tiny", 0, torch.float32, CPU), **changes)


def picture(width: int, height: int) -> Tensor:
    return torch.linspace(-1, 1, 3 * height * width).view(1, 3, 1, height, width)


def job(mode: str = "bidirectional", **changes: Any) -> ClipJob:
    plan = plan_for(mode, SegmentPlan(BLOCKS))
    text = empty_text(PRESETS["tiny"].stage_two.text_dim)
    sigmas = {"sigmas_one": flow_sigmas(2, 5.0), "sigmas_two": flow_sigmas(3, 4.0)}
    given = {"plan": plan, "vae_plans": PLANS, "seed": 7, "mode": mode, **sigmas, **changes}
    return ClipJob(picture(*SIZE), picture(*LOW), text, **given)


def piece_by_piece(parts: Components, given: ClipJob) -> tuple[Tensor, Tensor]:
    """Returns reference and frames of the pipeline's functions, called here one by one."""
    vae = parts.vae("vae")
    low_vae = parts.vae("stage1_vae") if "stage1_vae" in parts.parts else vae
    start = motion_condition(low_vae, parts.stage_one_config, given.low_picture, BLOCKS)
    dits = [partial(parts.dit, part, None) for part in ("stage1", *parts.parts) if part != "stage1_vae"]
    motion = make_motion(dits, start, given.text, sigmas=given.sigmas_one, seed=given.seed)
    reference = make_reference(motion, low_vae, vae, given.picture)
    options = {"sigmas": given.sigmas_two, "seed": given.seed, "mode": given.mode}
    made = sample_latents(parts.dit("stage2", None), reference.clone(), given.text, plan=given.plan, **options)
    segments = [segment.clone() for segment in made]
    assert sum(segment.shape[2] for segment in segments) == BLOCKS - 1
    return reference, torch.cat(list(decode_frames(vae, reference[:, :, :1], segments)))


def whole(parts: Components, given: ClipJob) -> tuple[Tensor, Tensor]:
    """Returns reference and frames of the clip's own functions."""
    condition = make_condition(parts, given)
    reference = condition.reference.clone()  # updated in place
    return reference, torch.cat([frames.clone() for frames in make_frames(parts, given, condition)])


class Recorder(Watcher):
    """A watcher that keeps all that it is told, in order, and which of the models ``alive`` there were then."""

    def __init__(self, alive: dict[str, weakref.ref[Any]] | None = None) -> None:
        self.told: list[Any] = []
        self.there: list[set[str]] = []
        self.alive = {} if alive is None else alive

    def note(self, told: Any) -> None:
        self.told.append(told)
        self.there.append({name for name, model in self.alive.items() if model() is not None})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.note(name)
        yield
        self.note(f"end of {name}")

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        for number, item in enumerate(super().iterate(name, items)):
            self.note((name, number))
            yield item

    def step(self, name: str, done: int, total: int, where: str) -> None:
        self.note(f"{name} {done}/{total}: {where}")


def with_parts(*parts: str) -> dict[str, Any]:
    """Returns changes of components to which a second expert, or a VAE of Stage I's own, is added."""
    base, preset = components(), PRESETS["tiny"]

    def dit(part: str, at: Any) -> WanDiT:
        return random_weights(WanDiT, preset.stage_one, 5) if part == "stage1_low_noise" else base.dit(part, at)

    def vae(part: str) -> WanVAE:
        return random_weights(WanVAE, preset.vae, 6) if part == "stage1_vae" else base.vae(part)

    return {"dit": dit, "vae": vae, "parts": dict.fromkeys(parts)}


# What is made


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        pytest.param("bidirectional", {}, id="bidirectional"),
        pytest.param("causal", {}, id="causal", marks=pytest.mark.slow),
        pytest.param("end_to_end", {}, id="end to end", marks=pytest.mark.slow),
        pytest.param("bidirectional", with_parts("stage1_low_noise"), id="a second expert", marks=pytest.mark.slow),
        pytest.param("bidirectional", with_parts("stage1_vae"), id="a VAE of its own for Stage I"),
    ],
)
def test_a_clip_is_the_pipelines_functions_in_their_order(
    mode: str, changes: dict[str, Any], plain: tuple[Tensor, Tensor]
) -> None:
    """It is what the functions make one by one, of what a pipeline may have besides too, which changes the result."""
    given, parts = job(mode), components(**changes)
    reference, frames = whole(parts, given)
    expected, expected_frames = piece_by_piece(parts, given)
    assert torch.equal(reference, expected)
    assert torch.equal(frames, expected_frames)
    assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (4 * BLOCKS - 3, SIZE[1], SIZE[0], 3))
    assert frames.float().std() > 1
    assert torch.equal(reference, plain[0]) == (not changes)


def test_what_waits_comes_back(plain: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip whose tiles wait in host memory is the same: what is left on the device is overwritten with NaN."""
    made: list[OtherMemory] = []

    def host(device: torch.device, park: bool) -> Host:
        if not park:
            return Host(device, park)
        made.append(OtherMemory())
        return made[-1]

    monkeypatch.setattr("model.vae.model.Host", host)
    monkeypatch.setattr("model.pipeline.stages.Host", host)
    reference, frames = whole(components(), job(vae_plans=PLANS._replace(reference=PARKED, decode=PARKED)))
    # The reference comes in one piece, after which nothing has to be remembered.
    assert [memory.parked > 0 for memory in made] == [False, True]
    expected, expected_frames = plain
    assert relative_error(reference, expected) < PARITY
    # Rounding may move a number over the boundary between two bytes.
    assert (frames.int() - expected_frames.int()).abs().max() <= 1
    assert (frames != expected_frames).float().mean() < 1e-3


# What a watcher is told, and when


def test_a_watcher_is_told_every_stage_and_step_in_order(plain: tuple[Tensor, Tensor]) -> None:
    """It is told of all that is done, when it is done, and watching changes nothing."""
    watcher = Recorder()
    given = job()
    condition = make_condition(components(), given, watcher)
    assert watcher.told == [
        "load", "end of load",
        "Stage I", "load", "end of load", "Stage I 1/2: step 1/2", "Stage I 2/2: step 2/2", "end of Stage I",
        "reference", *(f"reference {n}/{BLOCKS}: block {n}/{BLOCKS}" for n in range(1, BLOCKS + 1)),
        "end of reference",
    ]  # fmt: skip
    watcher.told.clear()
    assert torch.equal(condition.reference, plain[0])
    frames = [part.clone() for part in make_frames(components(), given, condition, watcher)]
    assert [len(part) for part in frames] == [1] + [4] * (BLOCKS - 1)
    assert torch.equal(torch.cat(frames), plain[1])

    def steps(segment: int) -> list[str]:
        return [f"Stage II {3 * segment + n}/6: segment {segment + 1}/2 step {n}/3" for n in (1, 2, 3)]

    # The image's frame first, before anything is generated; then each segment's as soon as it is there.
    assert watcher.told == [
        ("decode", 0), "load", "end of load",
        *steps(0), ("Stage II", 0), ("decode", 1), ("decode", 2), ("decode", 3),
        *steps(1), ("Stage II", 1), ("decode", 4),
    ]  # fmt: skip


def test_vaes_of_different_frame_rates_are_refused() -> None:
    with pytest.raises(InputError, match=r"^stage1_vae: expected vae's temporal stride, 4, got 2"):
        components(stage_one_vae_config=replace(PRESETS["tiny"].vae, temporal_downsample=(False, False, True)))


def test_models_are_there_only_while_they_are_needed() -> None:
    """Stage I's DiT is released before its second expert is loaded, both before the reference is made, its VAE and
    the encoder after it."""
    alive: dict[str, weakref.ref[Any]] = {}

    def kept(make: Any, part: str, *at: Any) -> Any:
        model = make(part, *at)
        alive[part] = weakref.ref(model)
        return model

    parts = components(**with_parts("stage1_low_noise", "stage1_vae"))
    parts = replace(parts, dit=partial(kept, parts.dit), vae=partial(kept, parts.vae))
    # Two steps at or above the boundary of 0.9, and one below.
    watcher = Recorder(alive)
    condition = make_condition(parts, job(sigmas_one=flow_sigmas(3, 5.0)), watcher)
    watcher.note("end")
    vaes = {"vae", "stage1_vae"}
    found = [(where, there) for where, there in zip(watcher.told, watcher.there, strict=True) if " of " not in where]
    assert found[:7] == [
        ("load", set()), ("Stage I", vaes), ("load", vaes), ("Stage I 1/3: step 1/3", vaes | {"stage1"}),
        ("Stage I 2/3: step 2/3", vaes | {"stage1"}), ("load", vaes),
        ("Stage I 3/3: step 3/3", vaes | {"stage1_low_noise"}),
    ]  # fmt: skip
    assert found[7] == ("reference", vaes)
    assert found[-1] == ("end", {"vae"})
    assert condition.vae.encoder is None
