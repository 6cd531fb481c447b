"""The machine's memory is known, and buffers are pinned and given back, here by a runtime that pins nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from model.machine import host
from model.machine.host import PAGE, Host, machine_memory, pinned_bytes

CUDA = torch.device("cuda")


class Runtime:
    """A CUDA runtime that notes registrations and answers them with a code."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered, self.gone = code, [], []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered.append((address, size))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.gone.append(address)
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


@pytest.mark.parametrize("size", [1, 4096, 4097])
def test_whole_pages_of_its_own_are_registered_and_given_back(size: int, runtime: Runtime) -> None:
    """No two buffers share a page, since a page cannot be registered twice."""
    flats = [pinned_bytes(size, CUDA) for _ in range(3)]
    assert all(flat.numel() == size for flat in flats)
    assert runtime.registered == [(flat.data_ptr(), -(-size // PAGE) * PAGE) for flat in flats]
    spans = [range(start, start + length, PAGE) for start, length in runtime.registered]
    assert all(span.start % PAGE == 0 for span in spans)
    pages = [page for span in spans for page in span]
    assert len(pages) == len(set(pages))
    addresses = [flat.data_ptr() for flat in flats]
    view = flats[0][:1]
    del flats
    gc.collect()
    assert sorted(runtime.gone) == sorted(addresses[1:])
    del view
    gc.collect()
    assert sorted(runtime.gone) == sorted(addresses)


def test_memory_that_cannot_be_pinned_is_an_ordinary_one(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.code, cleared = 712, []
    monkeypatch.setattr(host, "_clear_error", cleared.append)
    with pytest.warns(RuntimeWarning, match=r"9,000 bytes of host memory could not be pinned \(CUDA error 712\)"):
        flat = pinned_bytes(9000, CUDA)
    assert cleared == [CUDA]
    flat.fill_(3)
    del flat
    gc.collect()
    assert runtime.gone == []


def test_buffers_of_a_size_are_given_out_again_when_nothing_looks_at_them(runtime: Runtime) -> None:
    pool = Host(CUDA, True)
    one = pool.empty((30, 100), torch.bfloat16)
    view, address = one[3:5], one.data_ptr()
    two = pool.empty((6000,), torch.uint8)
    two.fill_(1)
    assert two.data_ptr() != address
    del one
    gc.collect()
    assert pool.empty((6000,), torch.uint8).data_ptr() != address  # the view still looks
    del view
    gc.collect()
    assert pool.empty((1500,), torch.float32).data_ptr() == address
    assert len(runtime.registered) == 3
    assert runtime.gone == []
    del pool
    gc.collect()
    assert len(runtime.gone) == 2
    assert bool((two == 1).all())
    del two
    gc.collect()
    assert len(runtime.gone) == 3


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/", {"memory.max": "2000"}, 2000),
        ("/a/b", {"a/b/memory.max": "max", "a/memory.max": "3000"}, 3000),
        ("/a", {"a/memory.max": "9" * 30}, None),
        ("/a", {}, None),
    ],
    ids=["container", "a group above", "a higher limit", "no limit"],
)
def test_memory_is_the_machines_or_its_control_groups(
    tmp_path: Path, group: str, limits: dict[str, str], expected: int | None
) -> None:
    for name, text in {"proc/self/cgroup": f"0::{group}", **{f"sys/fs/cgroup/{n}": limits[n] for n in limits}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert machine_memory(tmp_path) == (expected or machine_memory(tmp_path / "nowhere"))
    assert machine_memory(tmp_path / "nowhere") > 10**8
