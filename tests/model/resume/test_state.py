"""The state of a run on disk: what is saved comes back, what is damaged is noticed, what is different is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from model.errors import InputError
from model.resume.job import software
from model.resume.state import RunState, segment_name

JOB = {
    "request": {"mode": "causal", "seed": 7, "size": (64, 32), "sigmas": [1.0, 0.5, 0.1], "plan": {"blocks": 3}},
    "fingerprints": {"stage1": "a" * 64, "photo": "b" * 64},
    "machine": {"device": "H100", "memory": "4 tiles"},
    "arguments": {"out": "clip.mp4"},
}
TENSORS = {
    "wide": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
    "half": torch.arange(5).to(torch.bfloat16),
    "eight": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "none": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
}


def changed(**sections):
    """Returns the job with other entries in some sections."""
    return {**JOB, **{name: {**JOB.get(name, {}), **entries} for name, entries in sections.items()}}


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (tensors[key].dtype, tensors[key].shape) == (tensor.dtype, tensor.shape)
        assert (
            tensors[key].contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
        )


def begun(folder):
    RunState.create(folder, JOB).close()


def begun_anew(folder):
    RunState.create(folder, JOB, restart=True).close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def looked_at(folder):
    found = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture
def state(tmp_path):
    with RunState.create(tmp_path / "run", JOB) as created:
        yield created


# The job


def test_a_job_comes_back_with_the_software_that_runs_it(tmp_path, state):
    state.close()
    with RunState.open(tmp_path / "run") as opened:
        assert opened.job == {**json.loads(json.dumps(JOB)), "software": software()}
        assert opened.changes(JOB) == ([], [])
    assert software()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert names(tmp_path / "run") == ["job.json"]


def test_what_is_different_is_named_and_sorted_by_what_it_means(state):
    now = changed(
        request={"seed": 8, "sigmas": [1.0, 0.4, 0.1], "plan": {"blocks": 4}, "size": [64, 32], "steps": 4},
        fingerprints={"stage1": "c" * 64},
        machine={"device": "H200"},
        arguments={"out": "other.mp4"},
    )
    del now["request"]["mode"]
    changes = state.changes(now)
    assert changes.forbidding == [
        f'fingerprints.stage1: "{"a" * 56}... in the stored run, now "{"c" * 56}...',
        'request.mode: "causal" in the stored run, not given now',
        "request.plan.blocks: 3 in the stored run, now 4",
        "request.seed: 7 in the stored run, now 8",
        "request.sigmas[1]: 0.5 in the stored run, now 0.4",
        "request.steps: not in the stored run, now 4",
    ]
    assert changes.inexact == ['machine.device: "H100" in the stored run, now "H200"']
    # Numbers of different kinds are differences, and so are missing sections.
    assert state.changes(changed(request={"seed": 7.0})).forbidding == ["request.seed: 7 in the stored run, now 7.0"]
    assert len(state.changes({}).forbidding) == 7


def test_a_folder_without_a_readable_job_is_explained(tmp_path):
    def opened(text=None):
        if text is not None:
            (tmp_path / "run" / "job.json").write_text(text)
        with pytest.raises(InputError) as caught:
            RunState.open(tmp_path / "run")
        return str(caught.value)

    assert opened().endswith("run does not exist")
    (tmp_path / "run").touch()
    assert opened().endswith("run is not a folder")
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    assert opened().endswith("run has no job.json: no run was begun there")
    assert names(tmp_path / "run") == []  # looking leaves nothing
    for text in ("{", "[]", "{}", "[" * 10**5, "1" * 5000, "\ufeff{}"):
        assert "is not readable as the job of a run" in opened(text)
    (tmp_path / "run" / "job.json").unlink()
    RunState.create(tmp_path / "run", JOB).close()
    stored = json.loads((tmp_path / "run" / "job.json").read_text())
    assert "schema version 1, this program reads 3" in opened(json.dumps({**stored, "schema": 1}))
    for job in ([1], {"request": 5}):
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        assert "expected sections" in opened(json.dumps({**stored, "job": job, "sha256": digest}))
    edited = {**stored, "job": {**stored["job"], "seed": 9}}
    assert "damaged or was edited (sha256 differs)" in opened(json.dumps(edited))
    (tmp_path / "run" / "job.json").write_text(json.dumps(stored))
    RunState.open(tmp_path / "run").close()


def test_a_run_is_not_begun_where_there_is_one(tmp_path, state):
    """Neither while somebody works on it nor later."""
    state.save_segment(1, torch.ones(2))
    for attempt in (RunState.open, begun, begun_anew):
        with pytest.raises(InputError, match=rf"in use by another process \({os.getpid()}\)"):
            attempt(tmp_path / "run")
    state.close()
    with pytest.raises(InputError, match="already holds a run: resume it or name another folder"):
        begun(tmp_path / "run")
    begun_anew(tmp_path / "run")  # the lock of the failed attempts is free again


# What is not of a run


def test_whatever_has_the_name_of_a_runs_file_and_is_none_is_refused_and_stays(tmp_path):
    """Nothing is written, read or deleted through a link, and no folder, pipe or file of the user's is touched.

    It does not matter whether there is a run in the folder, nor what is to be done with it.
    """
    mine = tmp_path / "mine"
    mine.write_text("of the user")
    (tmp_path / "folder").mkdir()
    makes = [
        lambda path: path.symlink_to(mine),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ]
    uses = [RunState.open, begun, begun_anew]
    files = ["job.json", "lock", "segment-0002.safetensors.damaged"]
    for number, file in enumerate(files):
        for make in makes:
            folder = tmp_path / f"run {number}"
            RunState.create(folder, JOB).close()
            (folder / file).unlink(missing_ok=True)
            make(folder / file)
            before = looked_at(folder)
            for use in uses:
                with pytest.raises(InputError, match=re.escape(file)):
                    use(folder)
                assert looked_at(folder) == before
            assert mine.read_text() == "of the user"
            shutil.rmtree(folder)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for use in uses:
        with pytest.raises(InputError, match="link is a link: name the folder"):
            use(tmp_path / "link")
    assert names(tmp_path) == ["folder", "link", "mine"]
    assert names(tmp_path / "folder") == []


def test_files_of_no_run_are_not_deleted_to_begin_anew(tmp_path):
    """A folder's files are a run's if it has a run's job, or an empty one, as a disk that fails may leave."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "motion.safetensors").write_text("mine")
    for job in (None, "{}", '{"schema": 2}'):
        if job is not None:
            (folder / "job.json").write_text(job)
        before = looked_at(folder)
        for use in (RunState.holds, begun_anew):
            with pytest.raises(InputError, match="which is of no run"):
                use(folder)
        assert looked_at(folder) == before
    (folder / "job.json").write_text("")
    assert RunState.holds(folder)
    begun_anew(folder)
    assert names(folder) == ["job.json"]
    assert not RunState.holds(tmp_path / "nowhere")


def test_a_folder_that_is_gone_while_a_run_is_at_work_is_named(state):
    shutil.rmtree(state.folder)
    with pytest.raises(InputError, match=r"motion\.safetensors cannot be written: .*No such file"):
        state.save("motion", TENSORS)
    state.close()
    assert not state.folder.exists()


# Tensors


def test_tensors_come_back_bit_for_bit(state):
    given = {**TENSORS, "turned": TENSORS["wide"].permute(2, 0, 1), "shared": TENSORS["wide"][:1]}
    given["nan"] = torch.tensor([float("nan"), -0.0])
    state.save("condition", given)
    same(state.load("condition"), given)
    assert state.load("motion") is None
    assert state.finished_segments(1) == state.damaged == []


def test_a_change_of_any_byte_is_noticed(state):
    """A changed byte is noticed, or is in the padding of the header and changes nothing that is loaded."""
    given = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([[3]], dtype=torch.int16)}
    state.save("motion", given)
    path = state.folder / "motion.safetensors"
    good = path.read_bytes()
    noticed = 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        found = state.load("motion")
        if found is None:
            noticed += 1
            assert path.with_name("motion.safetensors.damaged").exists()
            assert not path.exists()
        else:
            same(found, given)
    assert noticed == len(state.damaged) > 0.9 * len(good)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        assert state.load("motion") is None
    path.write_bytes(good)
    same(state.load("motion"), given)


def test_a_file_of_another_origin_is_not_taken(state, tmp_path):
    """A file without the sha256, one of another run and one under another name are damaged."""
    save_file({"motion": torch.ones(2)}, state.folder / "motion.safetensors")
    assert state.load("motion") is None
    with RunState.create(tmp_path / "other", changed(request={"seed": 8})) as other:
        other.save("motion", TENSORS)
        shutil.copy(other.folder / "motion.safetensors", state.folder)
    assert state.load("motion") is None
    state.save_segment(2, torch.ones(3))
    (state.folder / "segment-0002.safetensors").rename(state.folder / "segment-0001.safetensors")
    assert state.load(segment_name(1)) is None
    assert [line.split(";")[0] for line in state.damaged] == [
        "motion.safetensors is damaged (it has no sha256)",
        "motion.safetensors is damaged (sha256 differs)",
        "segment-0001.safetensors is damaged (sha256 differs)",
    ]


def test_what_becomes_a_link_while_a_run_is_at_work_is_damage(state, tmp_path):
    """A link to a good file is set aside like a damaged one, and what it leads to is not touched."""
    state.save("motion", TENSORS)
    place = state.folder / "motion.safetensors"
    moved = place.rename(tmp_path / "motion.safetensors")
    before = moved.read_bytes()
    place.symlink_to(moved)
    assert state.load("motion") is None
    assert "motion.safetensors is a link" in state.damaged.pop()
    (state.folder / f".motion.{os.getpid()}.tmp.safetensors").symlink_to(moved)
    state.save("motion", {"other": torch.ones(1)})
    assert moved.read_bytes() == before


def test_what_was_made_from_something_that_is_saved_again_is_dropped(state):
    """A segment never follows one that it was not made from, not even where a run makes other bits than before."""
    before = ["inputs", "motion", "condition"]
    made = [*before, *map(segment_name, range(1, 5))]

    def there():
        return [path.stem for path in state.folder.glob("*.safetensors")]

    for name in made:
        state.save(name, TENSORS)
    state.save(segment_name(3), TENSORS)
    assert sorted(there()) == sorted(made[:6])
    state.save("condition", TENSORS)
    assert sorted(there()) == sorted(before)
    state.save(segment_name(1), TENSORS)
    state.save("inputs", TENSORS)
    assert there() == ["inputs"]


# The end


def test_removing_a_run_removes_its_files_and_nothing_else(tmp_path, state):
    for name in ("inputs", "motion", segment_name(1)):
        state.save(name, TENSORS)
    own = ["condition.safetensors.damaged", ".segment-0002.12.tmp.safetensors"]
    others = ["notes.txt", "segment-a.safetensors", "model.safetensors", ".clip.12.tmp.mp4"]
    for name in own + others:
        (state.folder / name).touch()
    state.remove()
    assert names(tmp_path / "run") == sorted(others)
    for name in others:
        (tmp_path / "run" / name).unlink()
    RunState.create(tmp_path / "run", JOB).remove()
    assert names(tmp_path) == []


def test_files_that_a_killed_run_had_begun_are_gone_when_it_goes_on(state):
    state.close()
    (state.folder / ".motion.12.tmp.safetensors").touch()
    (state.folder / ".clip.12.tmp.mp4").touch()
    (state.folder / ".job.12.tmp.json").mkdir()
    (state.folder / ".inputs.12.tmp.safetensors").symlink_to(state.folder / ".clip.12.tmp.mp4")
    RunState.open(state.folder).close()
    foreign = [".clip.12.tmp.mp4", ".inputs.12.tmp.safetensors", ".job.12.tmp.json"]
    assert names(state.folder) == [*foreign, "job.json"]
