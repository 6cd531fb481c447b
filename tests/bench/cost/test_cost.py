"""The tables of ``python -m bench cost`` are the cost model's figures, said to be predicted, with assumptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import build_parser, main
from bench.cost import command as cost
from bench.cost.command import baseline
from bench.cost.configuration import Configuration
from bench.cost.pipeline import parts, predict
from bench.cost.profiles import get_profile
from bench.harness.session import RESULT
from bench.records.read import read_result
from swifti2v_kernels.common.cards import CARDS
from tests.support.bench_session import read_section, rows_of
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
    """The results of one configuration on two cards, one of which is named twice and by a part of its name."""
    folder = tmp_path_factory.mktemp("cost")
    arguments = ["--preset", "14b-1.3b", "--steps", "8", "--guidance", "--gpus", "H800, h200,800"]
    assert main(["cost", *arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def configuration() -> Configuration:
    return Configuration.for_preset("14b-1.3b", steps=8, guidance=True)


def test_tables_are_valid_and_nothing_in_them_is_said_to_be_measured(one: Path) -> None:
    """Operations are counted; every second is predicted, and says by what."""
    (section,) = read_result(one / RESULT)["sections"].values()
    assert section["status"] == "complete"
    assert [table["name"] for table in section["tables"]] == ["parts", "predictions"]
    for table in section["tables"]:
        assert table["rows"]
        for row in table["rows"]:
            basis = "counted" if table["name"] == "parts" else "predicted"
            assert (row["status"], row["basis"]) == ("ok", basis)
            assert basis == "counted" or row["basis_note"] == "by bench/cost"
            assert basis == "predicted" or not any(name.endswith("seconds") for name in row)


def test_what_is_predicted_is_what_the_model_says(one: Path, configuration: Configuration) -> None:
    rows = rows_of(one, "predictions")
    assert [row["gpu"] for row in rows] == list(BOTH)
    for row in rows:
        expected = predict(configuration, CARDS[row["gpu"]], get_profile("swifti2v"))
        assert row["total_seconds"] == expected.seconds == pytest.approx(sum(row[stage] for stage in STAGES))
        assert row["peak_bytes"] == expected.peak_bytes
        assert not {"note", "warning"} & row.keys()  # all of it fits
    assert rows[0]["total_seconds"] > rows[1]["total_seconds"]  # whose memory is faster


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"fits": False, "streamed": True}], {"note": "weights streamed from host memory"}),
        ([{"fits": False}], {"warning": "does not fit this card; predicted as if it did"}),
        (
            [{"fits": False, "streamed": True}, {"fits": False}],
            {"warning": "does not fit this card; predicted as if it did"},
        ),
    ],
    ids=["weights streamed", "does not fit", "both"],
)
def test_what_does_not_fit_and_what_is_streamed_is_said(
    changes: list[dict[str, bool]], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part whose weights are streamed does not fit as it is, and is predicted as it would run."""

    def on_a_small_card(*given: Any) -> Any:
        found = predict(*given)
        head = [replace(part, **change) for part, change in zip(found.parts, changes, strict=False)]
        return replace(found, parts=(*head, *found.parts[len(head) :]))

    monkeypatch.setattr(cost, "predict", on_a_small_card)
    assert main(["cost", "--preset", "14b-1.3b", "--gpus", "H200", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "predictions")
    assert {name: row[name] for name in ("note", "warning") if name in row} == expected


def test_parts_are_the_models(one: Path, configuration: Configuration) -> None:
    rows = rows_of(one, "parts")
    assert [(row["stage"], row["part"], row["flops"]) for row in rows] == [
        (part.stage, part.name, part.work.total_flops) for part in parts(configuration)
    ]
    for row, part in zip(rows, parts(configuration), strict=True):
        attention = [
            n for kind, n in part.flops.items() if kind in ("self_attention", "cross_attention", "frame_attention")
        ]
        assert (row["attention_flops"] or 0) == sum(attention)
        assert [row[f"{kind}_flops"] for kind in ("linear", "convolution")] == [
            part.flops.get(kind) for kind in ("linear", "convolution")
        ]
        assert (row["bytes"], row["peak_bytes"]) == (part.bytes, part.peak_bytes)


def test_assumptions_of_all_cards_stand_beside_the_figures_once(one: Path, configuration: Configuration) -> None:
    text = (one / "table.md").read_text()
    (note,) = read_section(one)["notes"]
    expected: dict[str, None] = {}
    for card in BOTH:
        expected |= dict.fromkeys(predict(configuration, CARDS[card], get_profile("swifti2v")).assumptions)
    assert note.splitlines() == ["Assumptions:", *(f"- {sentence}" for sentence in expected)]
    assert all(text.count(sentence) == 1 for sentence in expected)
    assert "Stage II (bidirectional) takes 8 steps with guidance" in text


def test_without_a_preset_it_is_about_all_and_json_is_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configurations = {"two stages": Configuration.for_preset("14b-1.3b"), "one stage": baseline()}
    monkeypatch.setattr(cost, "headline", lambda: configurations)
    assert main(["cost", "--quick", "--json", "--gpus", "H200,H800", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / RESULT).read_text()
    (section,) = json.loads(printed)["sections"].values()
    assert [table["name"] for table in section["tables"]] == ["parts", "predictions"]
    found = [(row["configuration"], row["gpu"]) for row in rows_of(tmp_path, "predictions")]
    assert found == [(name, gpu) for name in configurations for gpu in ("H200", "H800")]


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
    assert chosen("--preset", "end-to-end", *shared) == {"14B end to end": baseline(**changes)}
    assert list(chosen()) == ["1.3b", "14b-1.3b", "5b", "14B end to end"]
    assert cost._gpus(None) == list(CARDS)
