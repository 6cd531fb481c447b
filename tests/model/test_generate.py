"""The command ``python -m model.generate`` as a user runs it: presets, checkpoints of diffusers, and bad input."""

from __future__ import annotations

import shutil
import sys

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.cli.request import ClipSettings
from model.csg.denoiser import Denoiser
from model.generate import NOT_FINITE, build_parser, main
from model.pipeline import clip
from model.pipeline.components import Components
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.pipeline.test_encoders import save_text_encoder
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae
from tests.support.memory_requests import predict_nothing
from tests.support.tolerances import PARITY, relative_error

VAE_21 = {"base_dim": 3, "z_dim": 4, "num_res_blocks": 1}
VAE_22 = VERSIONS["2.2, two blocks a stage"] | {"num_res_blocks": 1}


def video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), (stream.width, stream.height)


def save_weights(path, z_dim=4, vae=VAE_21, text_dim=32, **stage_one):
    saved_diffusers_dit(path / "stage1", **{"in_channels": 2 * z_dim + 4, "out_channels": z_dim, **stage_one})
    saved_diffusers_dit(path / "stage2", in_channels=2 * z_dim + 4, out_channels=z_dim, text_dim=text_dim)
    saved_diffusers_vae(path / "vae", **vae)


@pytest.fixture(autouse=True)
def _planned(request, monkeypatch):
    """Memory is predicted in the first test alone."""
    if "photograph" not in request.node.name:
        predict_nothing(monkeypatch)


@pytest.fixture
def told(photo, tmp_path, capsys):
    """A function that runs the command on the photograph, with ``clip.mp4`` as ``out``, and returns what it prints."""

    def run(options, *more, code=0, out="clip.mp4"):
        capsys.readouterr()
        assert main([str(photo), "--out", str(tmp_path / out), *options.split(), *map(str, more)]) == code
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("preset", ["tiny", pytest.param("tiny-vae22", marks=pytest.mark.slow)])
def test_a_photograph_becomes_a_clip_of_the_asked_length_in_its_own_aspect(preset, told, tmp_path):
    printed = told("--frames 9 --prompt waves --preset", preset, out="new/clip.mp4")
    multiple = 16 if preset == "tiny" else 32
    count, (width, height) = video(tmp_path / "new" / "clip.mp4")
    assert count == 9
    assert width % multiple == height % multiple == 0
    assert width / height == pytest.approx(1.5, rel=0.15)
    for part in ("random weights: this clip shows the path", "the prompt 'waves' is NOT used", "peak memory"):
        assert part in printed.out
    assert f"wrote {tmp_path / 'new' / 'clip.mp4'}" in printed.out
    for part in ("Stage I:", "Stage II:", "segment 1/1 step 4/4"):
        assert part in printed.err


def test_checkpoints_of_version_2_1_with_a_prompt(told, tmp_path):
    save_weights(tmp_path / "weights")
    save_text_encoder(tmp_path / "weights", text_dim=32)
    printed = told("--size 48x80 --frames 21 --weights", tmp_path / "weights", "--prompt", "a wave rolls in").out
    assert video(tmp_path / "clip.mp4") == (21, (48, 80))
    assert "prompt 'a wave rolls in' encoded by UMT5" in printed
    assert "random weights" not in printed


def test_checkpoints_of_version_2_2_with_ti2v_stage_one_experts_and_embeddings(told, tmp_path):
    weights, text = tmp_path / "weights", tmp_path / "text.safetensors"
    save_weights(weights, z_dim=6, vae=VAE_22, in_channels=6)
    saved_diffusers_dit(weights / "stage1_low_noise", in_channels=6, out_channels=6)
    save_file({"text": torch.randn(9, 32)}, text)
    options = "--size 64x96 --frames 5 --right 1 --blocks 2 --text-embeddings"
    assert "embeddings from" in told(options, text, "--weights", weights).out
    assert video(tmp_path / "clip.mp4") == (5, (64, 96))


def save_lora(path, module="blocks.0.attn1.to_q", expert=""):
    """Saves factors of rank 2 for one linear layer of the tests' DiTs, and returns the path and their product."""
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    save_file({f"{expert}{module}.lora_A.weight": down, f"{expert}{module}.lora_B.weight": up}, path)
    return up @ down


@pytest.mark.slow
def test_loras_are_merged_into_the_stage_that_they_are_given_for(tmp_path):
    """LoRAs are merged at their strengths; the second expert takes its own tensors of a file for both."""
    weights, file, both = tmp_path / "weights", tmp_path / "lora.safetensors", tmp_path / "both.safetensors"
    save_weights(weights)
    saved_diffusers_dit(weights / "stage1_low_noise", in_channels=12, out_channels=4)
    save_lora(tmp_path / "first.safetensors", expert="transformer.")
    second = save_lora(tmp_path / "second.safetensors", "blocks.1.attn2.to_v", "transformer_2.")
    save_file(load_file(tmp_path / "first.safetensors") | load_file(tmp_path / "second.safetensors"), both)
    product = save_lora(file)
    loras = ["--stage1-lora", f"{file}:0.5", "--stage1-lora", f"{file}:-2", "--stage2-lora", str(file)]
    loras += ["--stage1-low-noise-lora", f"{both}:1e-1"]
    given = vars(build_parser().parse_args(["--weights", str(weights), "--size", "48x80", "--device", "cpu", *loras]))
    plain = Components.from_directory(weights, torch.float32, torch.device("cpu"))
    merged = ClipSettings(**given).components
    for part, name, addition in (
        ("stage1", "blocks.0.attn1.to_q.weight", -1.5 * product),
        ("stage2", "blocks.0.attn1.to_q.weight", product),
        ("stage1_low_noise", "blocks.1.attn2.to_v.weight", 0.1 * second),
    ):
        before, after = (components.dit(part, None).state_dict() for components in (plain, merged))
        assert relative_error(after[name], before.pop(name) + addition) < PARITY
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_loras_that_do_not_fit_end_the_command_before_anything_runs(told, photo, tmp_path):
    weights = tmp_path / "weights"
    save_weights(weights)
    save_lora(tmp_path / "good.safetensors")
    names = [f"blocks.0.{i}.lora_{kind}.weight" for i in range(11) for kind in "AB"]
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "bad.safetensors")

    def refused(message, *options, given=("--weights", str(weights))):
        printed = told("", *given, *options, code=2).err
        assert printed.startswith(f"error: {message}")
        assert printed.count("\n") == 1

    good, bad = (f"{tmp_path / name}.safetensors" for name in ("good", "bad"))
    refused(f"lora: {bad}: 22 keys do not fit the model (0 of 11 pairs", "--stage1-lora", good, "--stage2-lora", bad)
    refused(f"lora: {weights} has no stage1_low_noise for {good}", "--stage1-low-noise-lora", good)
    refused("lora: expected --weights too", "--stage1-lora", good, given=())
    # Of Stage II too: all of Stage I would be made before its weights are read.
    factors = {name: torch.full_like(factor, torch.nan) for name, factor in load_file(good).items()}
    save_file(factors, bad)
    options = ("--stage2-lora", bad, "--size", "48x80", "--frames", "5")
    refused(f"lora: {bad}: blocks.0.attn1.to_q.lora_B.weight holds NaN or infinity", *options)
    assert not list(tmp_path.glob("clip*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 250x144", "size: width and height must be multiples of 16, got 250x144; nearest: 256x144"),
        ("--frames 80", "frames: expected 1 + 4n (5, 9, ... for 4), got 80; nearest: 81"),
        ("--out /", "out: expected a name that ends in .mp4, got /"),
        ("--weights nowhere", "weights: nowhere does not exist"),
        ("--text-embeddings nowhere", "text-embeddings: nowhere does not exist"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_file(options, message, told, tmp_path):
    assert told(options, code=2).err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_weights_that_do_not_fit_are_named_before_anything_runs(told, tmp_path, monkeypatch):
    """Weights and inputs that do not fit, or lack, are named before even the memory is planned."""

    def planned(request):
        raise AssertionError("memory was planned")

    monkeypatch.setattr("model.generate.plan_memory", planned)
    weights, text = tmp_path / "weights", tmp_path / "text.safetensors"

    def refused(*options):
        return told("--size 48x80 --weights", weights, *options, code=2).err

    weights.mkdir()
    assert refused() == f"error: weights: {weights} lacks stage1, stage2, vae; --help shows the layout\n"
    save_weights(weights, in_channels=9)
    message = "stage1: with a VAE of 4 channels its in_channels must be 4 or 12 and its out_channels 4, got 9 and 4"
    assert refused() == f"error: {message}\n"
    save_weights(weights)
    saved_diffusers_dit(weights / "stage1_low_noise", in_channels=4, out_channels=4)
    assert "stage1_low_noise must have the configuration of" in refused()
    shutil.rmtree(weights / "stage1_low_noise")
    save_file({"a": torch.full((3, 32), torch.inf)}, text)
    assert refused("--text-embeddings", text) == f"error: text-embeddings: a in {text}: infinity\n"
    save_weights(weights, image_dim=20, added_kv_proj_dim=48)
    assert "stage1 reads CLIP tokens, but there is no image_encoder" in refused()
    save_weights(weights, text_dim=33)
    assert "both stages must read the same text width, got [32, 33]" in refused()
    assert not (tmp_path / "clip.mp4").exists()


def test_a_missing_extra_is_answered_with_the_pip_command(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert told("", code=2).err == "error: av is not installed; run: pip install -e '.[generate]'\n"


def test_an_interruption_keeps_the_frames_that_are_done(told, tmp_path, monkeypatch):
    sample = clip.sample_latents

    def interrupted(*args, **options):
        for i, segment in enumerate(sample(*args, **options)):
            if i == 2:
                raise KeyboardInterrupt
            yield segment

    monkeypatch.setattr(clip, "sample_latents", interrupted)
    assert "kept in" in told("--frames 29 --size 48x32 --steps 1", code=130).out
    assert not (tmp_path / "clip.mp4").exists()
    assert video(tmp_path / "clip.partial.mp4")[0] == 25  # the anchor and two segments of three blocks


@pytest.mark.parametrize(
    ("call", "message", "kept"),
    [
        pytest.param(2, "Stage I: NaN at step 2 of 2", ["inputs"], marks=pytest.mark.slow),
        (4, "Stage II, segment 2 of 2: NaN at step 1 of 1", ["condition", "inputs", "motion", "segment-0001"]),
    ],
)
def test_results_that_are_not_finite_end_the_run_in_one_line_and_it_goes_on_from_what_is_good(
    call, message, kept, told, tmp_path, monkeypatch
):
    """Nothing bad is kept of a stage that gives NaN, and the run that goes on is the one that was never ended."""
    works, calls = Denoiser.step, []

    def poisoned(self, *args):
        works(self, *args)
        calls.append(self)
        if len(calls) == call:
            self.latents[..., -1] = torch.nan

    run, options = tmp_path / "clip.run", "--frames 17 --size 32x32 --stage1-steps 2 --steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "step", poisoned)
        printed = told(options, code=2)
    assert printed.err.splitlines()[-1] == f"error: {message}; likely causes: {NOT_FINITE}"
    assert f"--resume {run} goes on" in printed.out
    assert not (tmp_path / "clip.mp4").exists()
    files = sorted(run.glob("*.safetensors"))
    assert [file.stem for file in files] == kept
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())
    assert main(["--resume", str(run)]) == 0
    told(options, out="whole.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
