"""What FP8 costs in loss: each seed is compared with itself, and the table says what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SETTINGS, make_base, make_rows, make_tokens

import parity
from parity import POINTS, compared, curve, job_of, judged, trained
from parity_table import RESULTS, apart, curves_apart, differences, interval, table, with_table
from plan import BF16, PARITY, PARITY_WAYS, Case
from qlora.files import write_json
from qlora.training import Job, make_trainer
from table import PAGE, Line, lines_of

torch.set_num_threads(1)


def line(way: str, seed: int, validation: float, losses: tuple[float, ...] = (2.0, 1.0), **more: Any) -> Line:
    figures = {"validation loss": validation, "validation loss in bf16": validation + 0.5, "training loss": 1.0}
    return {"model": "tiny-llama", "way": way, "seed": seed, **figures, "losses": list(losses), **more}


def test_a_seed_is_compared_with_itself_in_whichever_order_the_lines_came() -> None:
    lines = [line("fp8", 2, 4.5), line(BF16, 1, 1.0), line("fp8", 1, 1.25), line(BF16, 2, 4.0), line(BF16, 3, 9.0)]
    assert differences(lines, "fp8", "validation loss") == [0.25, 0.5]
    assert differences(lines, "bf16-peft", "validation loss") == []


def test_the_interval_is_students() -> None:
    assert interval([0.25]) == "+0.2500"
    assert interval([1.0, 3.0]) == "+2.0000 (-10.7060 to +14.7060)"  # 12.706 × √2 / √2
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "+3.0000 (+1.0371 to +4.9629)"  # 2.776 × √2.5 / √5


def test_curves_are_compared_with_the_same_seed_and_those_of_bf16_with_other_seeds() -> None:
    assert apart([1.0, 2.0], [1.0, 4.0]) == pytest.approx(2**0.5)
    lines = [
        line(BF16, 1, 0, (2.0, 1.0)),
        line(BF16, 2, 0, (5.0, 4.0)),
        line("fp8", 2, 0, (5.0, 4.0)),
        line("fp8", 1, 0, (3.0, 2.0)),
    ]
    assert sorted(curves_apart(lines, "fp8")) == [0.0, 1.0]
    assert curves_apart(lines, BF16) == [3.0]


@pytest.mark.parametrize(("steps", "points"), [(2, 2), (POINTS, POINTS), (5 * POINTS, POINTS)])
def test_a_long_curve_is_kept_as_means(steps: int, points: int) -> None:
    found = curve([float(step) for step in range(steps)])
    assert len(found) == points
    assert found[0] == (steps // points - 1) / 2


def test_the_table_has_means_pairs_and_gaps() -> None:
    lines = [line(way, seed, seed + (way == "fp8") * 0.5) for way in (BF16, "fp8") for seed in (1, 2)]
    rows = table(lines).splitlines()
    assert rows[2] == "| tiny-llama | bf16 | 2 | 1.5000 ± 0.7071 |  |  |  | 1.0000 ± 0.0000 |  | 0.0000 |"
    assert rows[3] == "| tiny-llama | bf16-peft | not run |  |  |  |  |  |  |  |"
    assert rows[4].startswith("| tiny-llama | fp8 | 2 | 2.0000 ± 0.7071 | +0.5000 (+0.5000 to +0.5000) |")
    assert [row.count("|") for row in rows] == [11] * (2 + len(PARITY) * len(PARITY_WAYS))
    assert rows[-1] == "| wide | fp8 | not run |  |  |  |  |  |  |  |"
    peft = [line("bf16-peft", seed, seed + 0.25) for seed in (1, 2)]
    against = [row.split(" | ")[5] for row in table([*lines, *peft]).splitlines()[2:5]]
    assert against == ["", "", "+0.2500 (+0.2500 to +0.2500)"]


def test_the_page_has_the_table_of_the_committed_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, lines_of(RESULTS)) == page, "run: .venv/bin/python benchmarks/gpu/parity_table.py"


def test_the_page_says_what_was_trained_on() -> None:
    gpu = {"name": "A card", "power.limit": "700 W", "clocks.sm": "1980 MHz"}
    page = PAGE.read_text(encoding="utf-8")
    found = with_table(page, [line(BF16, 1, 1.0, versions={"torch": "2.11.0"}, **{"gpu after": gpu})])
    about = "A card (limit 700 W); SM clock afterwards, not while measured: 1,980–1,980 MHz; torch 2.11.0"
    assert f"1 trainings on {about}." in found


def test_cases_change_keys_that_a_recipe_has() -> None:
    for case in PARITY.values():
        assert case.changes.keys() <= SETTINGS.keys()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What the workflow leaves: a base, rows and the record of a run."""
    base = make_base(tmp_path / "sources/models/base")
    rows = make_tokens(tmp_path / "made", base, make_rows(tmp_path / "made"))
    (tmp_path / "tokens/base").mkdir(parents=True)
    rows.rename(tmp_path / "tokens/base/mixture")
    (tmp_path / "runs/one").mkdir(parents=True)
    record = {"model": "base", "mixture": "mixture", "settings": SETTINGS, "seed": 7}
    write_json(tmp_path / "runs/one/run.json", record)
    return tmp_path


def test_lines_of_each_seed_are_added_to_a_file(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "gpu", lambda: {"name": "A card"})
    monkeypatch.setattr(parity, "PARITY", {"tiny-llama": Case("one", {})})
    seen = []

    def planted(job: Job, others: list[str]) -> list[Line]:
        seen.append((job.seed, job.device))
        return [{"way": way} for way in (BF16, *others)]

    monkeypatch.setattr(parity, "compared", planted)
    out = results / "parity.jsonl"
    out.write_text('{"model": "wide"}\n')
    options = ["tiny-llama", "--seeds", "3", "4", "--results", str(results), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["parity.py", *options])
    parity.main()
    first, *lines = lines_of(out)
    assert first == {"model": "wide"}
    assert seen == [(3, "cuda"), (4, "cuda")]
    assert [(line["seed"], line["way"]) for line in lines] == [(seed, way) for seed in (3, 4) for way in PARITY_WAYS]
    assert {"versions", "commit"} <= lines[0].keys()


def test_an_adapter_is_judged_with_another_trainers_products(results: Path, tmp_path: Path) -> None:
    job = job_of(Case("one", {"samples": 0, "eval_steps": None, "max_steps": 2}), results, tmp_path / "scratch", "cpu")
    trainer, line = trained(job, BF16)
    judge = make_trainer(replace(job, folder=tmp_path / "judge"))
    assert judge.evaluate()["eval_loss"] != pytest.approx(line["validation loss"], rel=1e-3)
    assert judged(judge, trainer) == line["validation loss"]


@pytest.mark.parametrize("shape", [None, {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}])
def test_ways_train_from_one_seed(results: Path, tmp_path: Path, shape: dict[str, int] | None) -> None:
    case = Case("one", {**PARITY["tiny-llama"].changes, "max_steps": 2}, shape)
    job = job_of(case, results, tmp_path / "scratch", "cpu")
    assert job.seed == 7
    first, again, peft = compared(job, [BF16, "bf16-peft"])
    for found in (first, again, peft):
        json.dumps(found)
        assert found["steps"] == len(found["losses"]) == 2
        assert found["validation loss in bf16"] == pytest.approx(found["validation loss"], rel=1e-4)
    for figure in ("losses", "training loss", "validation loss", "validation loss in bf16"):
        assert again[figure] == first[figure]
    assert peft["losses"] == pytest.approx(first["losses"], rel=1e-3)
    assert "PEFT's own computation, asked for" in peft["computed by"]
    assert "PEFT's own computation, asked for" not in again["computed by"]
