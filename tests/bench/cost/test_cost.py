"""The tables of ``python -m bench cost`` are the cost model's figures, said to be predicted, with assumptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import build_parser, main
from bench.cost import command as cost
from bench.cost.configuration import Configuration
from bench.cost.pipeline import parts, predict
from bench.harness.session import RESULT
from bench.records.read import read_result
from swifti2v_kernels.common.cards import CARDS
from tests.support.bench_session import rows_of
from tests.support.memory_requests import predict_nothing

BOTH = ("H800", "H200")
STAGES = ("stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """The tables and what they are compared with are of VAEs that take nothing."""
    with pytest.MonkeyPatch.context() as patch:
        predict_nothing(patch)
        yield


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one configuration on two cards, one of which is named twice."""
    folder = tmp_path_factory.mktemp("cost")
    arguments = ["--preset", "14b-1.3b", "--steps", "8", "--guidance", "--gpus", "H800, H200,H800"]
    assert main(["cost", *arguments, "--out", str(folder)]) == 0
    return folder


def test_operations_are_counted_and_seconds_predicted_as_the_model_says(one: Path) -> None:
    configuration = Configuration.for_preset("14b-1.3b", steps=8, guidance=True)
    (section,) = read_result(one / RESULT)["sections"].values()
    assert section["status"] == "complete"
    rows = rows_of(one, "predictions")
    assert [row["gpu"] for row in rows] == list(BOTH)
    sentences: dict[str, None] = {}
    for row in rows:
        expected = predict(configuration, CARDS[row["gpu"]])
        assert row["total_seconds"] == expected.seconds == pytest.approx(sum(row[stage] for stage in STAGES))
        assert (row["peak_bytes"], row["basis"], row["basis_note"]) == (
            expected.peak_bytes, "predicted", "by bench/cost",
        )  # fmt: skip
        assert not {"note", "warning"} & row.keys()  # all of it fits
        sentences |= dict.fromkeys(expected.assumptions)
    assert rows[0]["total_seconds"] > rows[1]["total_seconds"]  # whose memory is faster
    assert section["notes"] == ["\n".join(["Assumptions:", *(f"- {sentence}" for sentence in sentences)])]
    assert "Stage II (bidirectional) takes 8 steps with guidance" in section["notes"][0]
    for row, part in zip(rows_of(one, "parts"), parts(configuration), strict=True):
        assert (row["stage"], row["part"], row["basis"]) == (part.stage, part.name, "counted")
        assert row["flops"] == part.work.total_flops
        assert (row["attention_flops"] or 0) == sum(n for kind, n in part.work.flops.items() if "attention" in kind)
        assert (row["bytes"], row["peak_bytes"]) == (part.work.bytes, part.peak_bytes)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [("RTX 4090", {"note": "weights streamed from host memory"}),
     ("RTX 4060", {"warning": "does not fit this card; predicted as if it did"})],
)  # fmt: skip
def test_what_does_not_fit_and_what_is_streamed_is_said(gpu: str, expected: dict[str, str], tmp_path: Path) -> None:
    """The weights of 14B are streamed on 24 GB; into 8 GB all blocks of a 2K clip in one window do not fit anyhow."""
    assert main(["cost", "--preset", "end-to-end", "--gpus", gpu, "--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "predictions")
    assert {name: row[name] for name in ("note", "warning") if name in row} == expected


def test_every_option_changes_the_configuration() -> None:
    def chosen(*arguments: str) -> dict[str, Configuration]:
        return cost._configurations(build_parser().parse_args(["cost", *arguments]))

    staged = ["--stage1-steps", "6", "--blocks", "5", "--left", "0", "--right", "1", "--mode", "causal"]
    shared = ["--size", "1280x704", "--frames", "41", "--steps", "9", "--guidance"]
    changes: dict[str, Any] = {"width": 1280, "height": 704, "num_frames": 41, "steps": 9, "guidance": True}
    segments = {"blocks_per_segment": 5, "neighbours_left": 0, "neighbours_right": 1, "mode": "causal"}
    assert chosen("--preset", "5b", *shared, *staged) == {
        "5b": Configuration.for_preset("5b", stage_one_steps=6, **changes, **segments)
    }
    assert chosen("--preset", "end-to-end", *shared) == {"14B end to end": Configuration.end_to_end(**changes)}
    assert list(chosen()) == ["1.3b", "14b-1.3b", "5b", "14B end to end"]
    assert build_parser().parse_args(["cost"]).gpus == tuple(CARDS)
