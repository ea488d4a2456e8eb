"""Experiments are run on a GPU as a user gets them, on rows as long as the real ones; the tables say what was run."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GemmaConfig, LlamaConfig, PhiConfig, PretrainedConfig

import drawn
import experiments
import merge
import shapes
from base import make_base
from experiments import Task, on_card, plan, wanted
from experiments_table import EXPERIMENTS_RESULTS, WAYS, tables, with_tables
from lengths import LENGTHS, drawn_rows, measured
from overlays import EXPERIMENTS, ROOT, configured, runs_of
from qlora.render import IGNORED
from shapes import SHAPES, save_random
from table import PAGE, Line, lines_of
from watch import Watch

RUNS = [run for experiment in EXPERIMENTS for run in runs_of(experiment)]
NAMES = [run.name for run in RUNS]
FIGURES = {
    **{"seconds of the job": 62.0, "steps": 20, "steps in all": 20, "tokens": 9000, "dtype": None},
    **{"seconds before the first step": 31.0, "seconds a step": 0.5, "tokens per second": 1000.0},
    **{"allocated GiB": 5.0, "reserved GiB": 6.0, "computed by": ["attention: sdpa", "batches packed"]},
    "gpu after": {"name": "NVIDIA H100 80GB HBM3"},
}
OTHER = {"gpu after": {"name": "NVIDIA H200"}}


def line(table: str, run: str, way: str, **more: Any) -> Line:
    return {**FIGURES, "table": table, "experiment": "", "run": run, "way": way, **more}


def cells(table: str, lines: list[Line], beginning: str) -> list[str]:
    [row] = [row for row in tables(lines)[table].splitlines() if f"| {beginning}" in row]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_overlay_but_the_seeds_is_run() -> None:
    overlays = {path.stem for path in (ROOT / "config/experiments").glob("*.yaml")}
    assert set(EXPERIMENTS) == overlays - {"seeds"}


def test_all_runs_are_planned_once_those_of_a_shape_together() -> None:
    tasks = plan("runs", 20)
    assert sorted(task.run.name for task in tasks) == sorted(NAMES)
    shapes = [task.run.shape for task in tasks]
    assert set(shapes) <= set(SHAPES)
    changes = [shape for place, shape in enumerate(shapes) if shape not in shapes[:place]]
    assert sorted(shapes, key=changes.index) == shapes


def test_the_notebook_learns_rows_enough_for_its_steps() -> None:
    tasks = plan("notebook", 200)
    assert [task.way for task in tasks] == list(WAYS)
    assert {task.rows for task in tasks} == {200 * 2 * 2}
    assert tasks[0].run.entry["settings"]["lora"]["dropout"] == 0.05


def test_lengths_are_known_of_each_dataset_of_each_run() -> None:
    assert list(json.loads(LENGTHS.read_text(encoding="utf-8"))) == NAMES
    for run in RUNS:
        mixture = configured(run.experiment)["mixtures"][run.entry["mixture"]]
        found = measured(run.name)
        assert list(found) == list(mixture["datasets"])
        for dataset in found.values():
            assert len(dataset["lengths"]) == 101
            assert sorted(dataset["lengths"]) == dataset["lengths"]
            assert all(0 < learned < length <= run.max_length for length, learned in dataset["lengths"])


def test_rows_are_as_long_as_was_measured() -> None:
    rows, labels = drawn_rows("mistral-text-label", 2000, 100)
    lengths = measured("mistral-text-label")["label"]["lengths"]
    assert [len(row) for row in rows] == [len(row) for row in labels]
    assert abs(sorted(map(len, rows))[1000] - lengths[50][0]) <= 1
    assert {len(row) for row in rows} <= set(range(lengths[0][0], lengths[-1][0] + 1))
    learned = [len(row) - row.count(IGNORED) for row in labels]
    assert set(learned) == {count for _, count in lengths}
    assert all(row[-count:] == label[-count:] for row, label, count in zip(rows, labels, learned, strict=True))
    assert all(3 <= token < 100 for row in rows for token in row)


def test_datasets_are_drawn_by_their_size_and_alike_each_time() -> None:
    rows, _ = drawn_rows("llama2-sql-mix", 4000, 100)
    assert rows == drawn_rows("llama2-sql-mix", 4000, 100)[0]
    longest = max(dataset["lengths"][-1][0] for name, dataset in measured("llama2-sql-mix").items() if "sql" in name)
    share = sum(len(row) > longest for row in rows) / len(rows)
    assert 0 < share < 0.01  # chats are one row in a hundred


def test_what_has_figures_is_not_run_again_and_what_failed_is() -> None:
    tasks = plan("runs", 20)
    lines = [
        {**task.about, **FIGURES} if place else {**task.about, "failed": "cut off"} for place, task in enumerate(tasks)
    ]
    assert wanted(tasks, lines, []) == tasks[:1]
    assert wanted(tasks, [], ["phi-2"]) == [task for task in tasks if task.run.name == "phi-2"]
    assert len(wanted(plan("notebook", 9), [], ["notebook", "ours-rows"])) == 2


def test_tables_say_what_was_run_what_failed_and_what_was_not() -> None:
    lines = [
        line("runs", "phi-2", "ours", **{"steps": 7}),
        line("runs", "llama2-custom", "ours", dtype="float16"),
        {"table": "runs", "run": "gemma-2b", "way": "ours", "failed": "status 1: a | b"},
    ]
    assert cells("runs", lines, "open-models | phi-2")[1:] == [
        *("phi-2, 7 steps", "62", "31", "0.50", "1,000", "5.0", "6.0", "attention: sdpa; batches packed"),
    ]
    assert cells("runs", lines, "llama2-custom")[1] == "llama2-custom, float16"
    assert cells("runs", lines, "open-models | gemma-2b")[2] == "failed: status 1: a / b"
    assert cells("runs", lines, "mistral-law | law-titles")[2] == "not run"
    assert cells("runs", [*lines, line("runs", "gemma-2b", "ours"), lines[2]], "open-models | gemma-2b")[2] == "62"


def test_a_notebook_that_was_stopped_is_extrapolated_and_ours_is_compared_with_it() -> None:
    theirs = {"steps": 50, "steps in all": 200, "seconds of the job": 120.0, "seconds a step": 2.0}
    lines = [
        line("notebook", "llama2-sql-mix", "notebook", **theirs),
        line("notebook", "llama2-sql-mix", "ours-rows", **{"seconds of the job": 60.0, "tokens per second": 8000.0}),
    ]
    assert cells("notebook", lines, "a notebook's way")[1:5] == ["H100", "50 of 200", "9,000", "420 extrapolated"]
    assert cells("notebook", lines, "ours, the same rows once")[-2:] == ["8.0 ×", "7.0 ×"]
    assert cells("notebook", lines[1:], "ours, the same rows once")[-2:] == ["", ""]


def test_a_job_that_ended_in_its_warm_up_has_no_speed_and_no_ratio() -> None:
    ended = {"steps": 2, "seconds a step": None, "tokens per second": None}
    assert cells("runs", [line("runs", "phi-2", "ours", **ended)], "open-models | phi-2")[4:6] == ["–", "–"]
    theirs, ours = (line("notebook", "llama2-sql-mix", way) for way in ("notebook", "ours"))
    for lines in ([theirs | ended, ours], [theirs, ours | ended]):
        assert cells("notebook", lines, "ours, as many")[-2:] == ["–", "–"]
    assert cells("notebook", [theirs | ended], "a notebook's way")[4:7] == ["–", "–", "–"]


def test_a_job_is_compared_with_the_notebook_on_its_own_card() -> None:
    about = {"experiment": "llama2-sql-mix"}
    lines = [
        line("notebook", "llama2-sql-mix", "notebook", **about),
        line("notebook", "llama2-sql-mix", "ours-rows", **about, **{"tokens per second": 3000.0}),
        line("notebook", "llama2-sql-mix", "ours-rows", **about, **{"tokens per second": 9000.0}, **OTHER),
        {"table": "notebook", "run": "llama2-sql-mix", "way": "ours", "failed": "cut off", **OTHER},
    ]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in tables(lines)["notebook"].splitlines()[2:]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        *((WAYS["notebook"], "H100", "20"), (WAYS["ours-rows"], "H100", "20")),
        *((WAYS["ours-rows"], "H200", "20"), (WAYS["ours"], "H200", "failed: cut off")),
        (WAYS["ours-steps"], "", "not run"),
    ]
    assert [row[-2] for row in rows[:3]] == ["", "3.0 ×", ""]
    assert [task.way for task in wanted(plan("notebook", 9), on_card(lines, "H200"), [])] == [
        *("notebook", "ours-steps", "ours"),
    ]


def test_a_merge_whose_chat_failed_still_has_its_figures() -> None:
    chats = {"chat in 4 bits": {"failed": "no room", "seconds": 3.0}, "chat merged": {"answer": "a", "seconds": 21.0}}
    memory = {"merged GiB": 12.55, "seconds": 80.4, "anonymous GiB": 4.3, "resident GiB": 14.0}
    found = {**memory, "drift": {"rms": 0.02, "same next token": 0.93}}
    merged = line("merge", "llama2-sql-mix", "cuda", **found, **chats)
    beginning = ["12.6", "80.4", "4.3", "14.0", "0.02", "0.93"]
    assert cells("merge", [merged], "cuda") == ["cuda", "of 20 steps", *beginning, "failed: no room", "21"]
    drawn = line("merge", "llama2-sql-mix", "cpu", **found, steps=0)
    assert cells("merge", [drawn], "cpu") == ["cpu", "drawn at random", *beginning, "not run", "not run"]


def test_the_page_has_the_tables_of_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    message = "run: .venv/bin/python benchmarks/gpu/experiments_table.py"
    assert with_tables(page, lines_of(EXPERIMENTS_RESULTS)) == page, message


def test_a_failure_is_a_line_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(task: Task, given: Any, left: float) -> Line:
        assert left <= 9 * 60
        return {"failed": "out of memory"} if task.run.name == "gemma-7b" else {**FIGURES}

    monkeypatch.setattr(experiments, "measured", job)
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(json.dumps(line("runs", "phi-2", "ours", experiment="open-models")) + "\n")
    monkeypatch.setattr(sys, "argv", ["experiments.py", "runs", "--out", str(new), "--resume", str(old)])
    experiments.main()
    lines = lines_of(new)
    assert lines[0] == lines_of(old)[0]
    assert sorted(line["run"] for line in lines) == sorted(NAMES)
    assert [line["run"] for line in lines if "failed" in line] == ["gemma-7b"]


def test_nothing_is_begun_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["experiments.py", "runs", "--out", str(out), "--minutes", "1"])
    experiments.main()
    assert lines_of(out) == []


def test_a_base_gives_up_its_place_to_one_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def process(arguments: list[str], seconds: float) -> Line:
        made.append(arguments[2])
        Path(arguments[3]).mkdir(parents=True)
        (Path(arguments[3]) / "source.json").touch()
        return {"made": arguments[2]}

    monkeypatch.setattr(experiments, "figures_of", process)
    first, second, third = (
        next(task for task in plan("runs", 2) if task.run.name == name)
        for name in ("law-titles", "law-topics", "phi-2")
    )
    for task in (first, second):
        assert experiments.prepared(replace(task, rows=20), tmp_path, task.run.shape, "cpu", 9.0) == {}
    assert made == ["mistral-7b"]
    assert len(list((tmp_path / "mistral-7b").glob("rows-*/card.json"))) == 2
    experiments.prepared(replace(third, rows=20), tmp_path, third.run.shape, "cpu", 9.0)
    assert [path.name for path in tmp_path.iterdir()] == ["phi-2"]
    monkeypatch.setattr(experiments, "figures_of", lambda *_: {"failed": "no room"})
    assert experiments.prepared(first, tmp_path, first.run.shape, "cpu", 9.0) == {"failed": "no room"}
    experiments.prepared(third, tmp_path, third.run.shape, "cpu", 9.0)
    assert [path.name for path in tmp_path.iterdir()] == ["phi-2"]  # not half a base either


def test_what_others_keep_beside_the_bases_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [tmp_path / name for name in ("thesis/draft", "falcon-7b/model/model.safetensors", "llama-2-7b/notes", "a")]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(experiments, "figures_of", lambda *_: {"failed": "no room"})
    phi = next(task for task in plan("runs", 2) if task.run.name == "phi-2")
    experiments.prepared(phi, tmp_path, phi.run.shape, "cpu", 9.0)
    custom = next(task for task in plan("runs", 2) if task.run.name == "llama2-custom")
    found = experiments.prepared(custom, tmp_path, custom.run.shape, "cpu", 9.0)
    assert found == {"failed": f"{tmp_path}/llama-2-7b: no base of this script's; name another folder with --models"}
    assert [file for file in kept if not file.is_file()] == []


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
FAMILIES = [
    LlamaConfig(**SMALL, intermediate_size=128),
    GemmaConfig(**SMALL, intermediate_size=128, num_key_value_heads=1, head_dim=16),  # its head is its embeddings
    FalconConfig(**SMALL),
    PhiConfig(**SMALL, intermediate_size=128),  # has biases
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_a_base_of_random_weights_is_drawn_a_file_at_a_time_as_its_family_begins(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "small", config)
    monkeypatch.setattr(shapes, "SHARD", 30_000)
    for folder in ("one", "two"):
        save_random("small", tmp_path / folder, "cpu")
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 2
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    found, told = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(told.values()), told
    assert found.dtype == torch.bfloat16
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "one/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == {name for name, _ in network.named_parameters()}  # what is tied is named once
    whole = network.state_dict()
    for name, weight in found.state_dict().items():
        assert weight.shape == whole[name].shape
        assert float(weight.float().std()) == pytest.approx(float(whole[name].float().std()), rel=0.1), name
        assert float(weight.float().mean()) == pytest.approx(float(whole[name].float().mean()), abs=0.003), name


def watched(steps: int, limit: float) -> Watch:
    """What saw a trainer of that many steps, which began at second 10, took 2 s a step, and stopped where it had to."""
    now = [10.0]
    seen = Watch(lambda: 100 * int(now[0]), lambda: now[0], 4, limit)
    state, control = SimpleNamespace(global_step=0, max_steps=steps), SimpleNamespace(should_training_stop=False)
    seen.on_train_begin(None, state, control)
    for step in range(steps):
        if not control.should_training_stop:
            seen.on_step_begin(None, state, control)
            state.global_step = step + 1
            now[0] += 2.0
            seen.on_step_end(None, state, control)
    return seen


@pytest.mark.parametrize(
    ("steps", "limit", "made", "began", "speeds"),
    [
        *((20, 99.0, 20, 4, (2.0, 100.0)), (4, 99.0, 4, 2, (2.0, 100.0)), (1, 99.0, 1, 0, (2.0, 100.0))),
        *((20, 23.0, 7, 4, (2.0, 100.0)), (20, 17.0, 4, 0, (None, None)), (20, 13.0, 2, 0, (None, None))),
    ],
)
def test_speed_is_taken_after_the_warm_up_and_training_ends_in_time(
    steps: int, limit: float, made: int, began: int, speeds: tuple[float | None, float | None]
) -> None:
    seen = watched(steps, limit)
    found = seen.figures()
    assert (found["steps"], found["steps in all"]) == (made, steps)
    assert seen.marks[-2][0] == began
    assert found["seconds before the first step"] == 10.0
    assert (found["seconds a step"], found["tokens per second"]) == speeds


def test_the_memory_of_a_process_is_its_own_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(300 * 2**20))
    mapped = "import mmap; file = open('file'); mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).find(b'x')"
    own = f"import os; os.chdir({str(tmp_path)!r}); own = b'1' * (200 * 2**20)"
    found = merge.watched([sys.executable, "-c", f"{own}; {mapped}"], tmp_path / "log")
    assert 0.19 < found["anonymous GiB"] < 0.3
    assert found["anonymous GiB"] + 0.1 < found["resident GiB"] < 0.7
    failed = merge.watched([sys.executable, "-c", "import sys; sys.exit('no room')"], tmp_path / "log")
    assert failed["failed"] == "status 1: no room"


@pytest.mark.slow
def test_an_adapter_that_is_drawn_merges_as_a_trained_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, job, out = tmp_path / "base", tmp_path / "job", tmp_path / "out.jsonl"
    make_base("tiny", base, "cpu")
    drawn.make_job("llama2-sql-mix", base, job)
    asked = ["merge.py", str(job), "--base", str(base), "--device", "cpu", "--out", str(out), "--chats", "chat merged"]
    monkeypatch.setattr(sys, "argv", asked)
    merge.main()
    [merged] = lines_of(out)
    assert (merged["run"], merged["steps"]) == ("llama2-sql-mix", 0)
    assert 0 < merged["drift"]["rms"] < 0.1
    assert "answer" in merged["chat merged"]
    assert "chat in 4 bits" not in merged
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, job / "merged"))
    changed = {name.split(".")[-2] for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == set(configured("llama2-sql-mix")["runs"][0]["settings"]["lora"]["target_modules"])


@pytest.mark.slow
def test_a_run_a_notebook_and_a_merge_go_through_on_a_small_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, jobs, models = tmp_path / "out.jsonl", tmp_path / "jobs", tmp_path / "models"
    places = ["--out", str(out), "--jobs", str(jobs), "--models", str(models), "--shape", "tiny", "--device", "cpu"]
    for asked in (["runs", "--only", "llama2-custom"], ["notebook", "--only", "notebook", "ours-steps"]):
        monkeypatch.setattr(sys, "argv", ["experiments.py", *asked, "--steps", "2", *places])
        experiments.main()
    job = ["merge.py", str(jobs / "llama2-sql-mix-ours-steps"), "--base", str(models / "tiny/model")]
    monkeypatch.setattr(sys, "argv", [*job, "--device", "cpu", "--out", str(out)])
    merge.main()
    lines = lines_of(out)
    assert not [line for line in lines if "failed" in line]
    custom, notebook, ours, merged = lines
    assert custom["dtype"] == "float16"
    record = json.loads((jobs / "llama2-custom-ours/run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["settings"]["quantization"]["compute_dtype"]) == (2, "float16")
    assert custom["tokens"] == record["tokens"]
    assert (notebook["steps"], notebook["tokens"]) == (ours["steps"], ours["tokens"])
    assert 0 < merged["drift"]["rms"] < 0.1
    assert "answer" in merged["chat in 4 bits"]
    assert "answer" in merged["chat merged"]
