"""Run the experiments of config/experiments at full size on random weights, and one beside a notebook's way.

    python benchmarks/gpu/experiments.py runs --minutes 9 --out NEW.jsonl --resume OLD.jsonl
    python benchmarks/gpu/experiments.py notebook --steps 200 --minutes 9 --out NEW.jsonl --resume OLD.jsonl

`runs`: every run of the overlays, 20 optimiser steps. `notebook`: the job of llama2-sql-mix. Each job has a process of
its own (job.py). Every result, and every failure, is a line of JSON at once; what has a result in OLD.jsonl is not
repeated. Training that is not finished after --seconds ends there, and its line says how many steps it has.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments_table import EXPERIMENTS_RESULTS, WAYS, tables
from run import HERE, Line, figures_of, gpu, software
from table import card_of, lines_of

sys.path.append(str(HERE.parents[1] / "scripts"))
from lengths import drawn_rows
from overlays import BASES, EXPERIMENTS, Run, runs_of
from shapes import SHAPES, write_rows

ROWS = 8_000  # as the mixture of open-models has; more would not change a packed step
DTYPES = {"llama2-custom": "float16"}  # what `auto` is on the T4 that it is meant for
MADE = "made-by-experiments"  # an empty file in the folder of each base that is made here: no other folder may go
LEAST = 120.0  # seconds without which nothing is begun
GRACE = 60.0  # seconds to write what was trained, before a job is cut off


@dataclass(frozen=True)
class Task:
    """A job: a run in a way, of so many steps, on so many rows."""

    table: str  # runs or notebook
    run: Run
    way: str
    steps: int
    rows: int

    @property
    def about(self) -> Line:
        """What tells its line from others."""
        return {"table": self.table, "experiment": self.run.experiment, "run": self.run.name, "way": self.way}


def plan(table: str, steps: int) -> list[Task]:
    """The jobs of a table, those of one shape together."""
    runs = [run for experiment in EXPERIMENTS for run in runs_of(experiment)]
    if table == "runs":
        order = list(dict.fromkeys(BASES.values()))
        return [Task(table, run, "ours", steps, ROWS) for run in sorted(runs, key=lambda run: order.index(run.shape))]
    [run] = [run for run in runs if run.experiment == "llama2-sql-mix"]
    rows = steps * run.entry["settings"]["batch_size"] * run.entry["settings"]["accumulation"]
    return [Task(table, run, way, steps, rows) for way in WAYS]


def prepared(task: Task, models: Path, shape: str, device: str, seconds: float) -> Line:
    """Make the base and the rows of a job where they are not there; bases of other shapes give up their place."""
    folder = models / shape
    for mark in models.glob(f"*/{MADE}"):
        if mark.parent != folder:
            shutil.rmtree(mark.parent)
    if not (folder / "model/source.json").is_file():  # what base.py writes last
        if (folder / MADE).is_file():
            shutil.rmtree(folder)
        elif folder.exists():
            return {"failed": f"{folder}: no base of this script's; name another folder with --models"}
        folder.mkdir(parents=True)
        (folder / MADE).touch()
        made = figures_of(
            [sys.executable, str(HERE / "base.py"), shape, str(folder / "model"), "--device", device], seconds
        )
        if "failed" in made:
            return made
    if not (folder / rows_of(task) / "card.json").is_file():
        rows = drawn_rows(task.run.name, task.rows, SHAPES[shape].vocab_size)
        write_rows(*rows, task.run.max_length, folder / rows_of(task))
    return {}


def rows_of(task: Task) -> str:
    """The folder of a job's rows."""
    return f"rows-{task.run.name}-{task.rows}"


def measured(task: Task, given: argparse.Namespace, left: float) -> Line:
    """The figures of a job, or why it failed."""
    shape, end = given.shape or task.run.shape, time.monotonic() + left
    missing = prepared(task, given.models, shape, given.device, left)
    if missing:
        return missing
    out = given.jobs / f"{task.run.name}-{task.way}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    left = end - time.monotonic()
    arguments = [
        *(sys.executable, str(HERE / "job.py"), task.run.experiment, task.run.name, task.way),
        *("--folder", str(given.models / shape), "--rows", rows_of(task).removeprefix("rows-"), "--out", str(out)),
        *("--steps", str(task.steps), "--seconds", str(min(given.seconds, left - 30)), "--device", given.device),
        *("--started", str(time.time())),
        *(("--dtype", DTYPES[task.run.name]) if task.run.name in DTYPES else ()),
    ]
    return figures_of(arguments, min(left, given.seconds + GRACE))


def wanted(tasks: Sequence[Task], lines: Sequence[Line], names: Sequence[str]) -> list[Task]:
    """The jobs without a result, of these runs or ways where some are named."""
    done = [{key: line[key] for key in ("table", "experiment", "run", "way")} for line in lines if "failed" not in line]
    return [task for task in tasks if task.about not in done and (not names or {task.run.name, task.way} & set(names))]


def on_card(lines: Sequence[Line], card: str) -> list[Line]:
    """The lines that count where this card is measured: the notebook's job is compared on one card."""
    return [line for line in lines if line["table"] != "notebook" or card_of(line) == card]


def main() -> None:
    """Run what is still to be run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("runs", "notebook"))
    parser.add_argument("--only", nargs="+", default=[], help="names of runs, or of ways")
    parser.add_argument("--steps", type=int, help="optimiser steps: 20 of each run, 200 of the notebook's job")
    parser.add_argument("--seconds", type=float, default=180.0, help="after which a job ends its training")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE)) / EXPERIMENTS_RESULTS.name)
    parser.add_argument("--resume", type=Path, help="results to go on from; they are copied to --out first")
    parser.add_argument(
        "--models", type=Path, default=Path("/dev/shm/qlora-bases"), help="for bases, one of those made here at a time"
    )
    parser.add_argument("--jobs", type=Path, default=Path("/dev/shm/qlora-jobs"), help="for what the jobs write")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of all bases, instead of their own: tiny to try it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    if given.resume and not given.resume.is_file():
        parser.error(f"{given.resume}: no such file; a first time has nothing to resume")
    given.models, given.jobs = given.models.resolve(), given.jobs.resolve()
    end = time.monotonic() + 60 * given.minutes
    lines = lines_of(given.resume or given.out)
    given.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tasks = plan(given.table, given.steps or {"runs": 20, "notebook": 200}[given.table])
    for task in wanted(tasks, on_card(lines, card_of({"gpu after": gpu()})), given.only):
        left = end - time.monotonic()
        if left < LEAST:
            break
        before = gpu()
        found = measured(task, given, left)
        after = gpu()
        about = {**task.about, "shape": given.shape or task.run.shape, "dtype": DTYPES.get(task.run.name)}
        line = {**about, **found, **software(), "gpu before": before, "gpu after": after}
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({**about, **found}), flush=True)
        lines.append(line)
    print("\n\n".join(tables(lines).values()))


if __name__ == "__main__":
    main()
