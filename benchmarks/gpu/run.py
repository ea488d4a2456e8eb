"""Measure ways to train on this machine's GPU, in a stint that ends in time and that a later one goes on from.

    python benchmarks/gpu/run.py --minutes 9 --out NEW.jsonl --resume OLD.jsonl

Each measurement runs in a process of its own (one.py). Within a group of plan.py every way runs once a round, another
one first each round, until there are enough whole rounds; then the next group's turn comes. Every result, and every
failure, is a line of JSON at once.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from plan import PLAN, Group, Way
from table import Line, lines_of, with_conditions

HERE = Path(__file__).parent
ROUNDS = 3
EVERY = 1.0  # seconds between two looks at the GPU while it is measured
PATIENCE = 5.0  # seconds for a look
GUESS = 90.0  # seconds of a measurement before one was seen
LIMIT = 240.0  # seconds of a measurement, so that one that hangs leaves time for others
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth", "flash-attn")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
Sample = tuple[float, dict[str, str]]  # a time of Unix, and what gpu() said then
Measure = Callable[[Group, Way, float], Line]  # within so many seconds; the figures, or {"failed": why}


def order(group: Group, number: int, lines: Sequence[Line]) -> list[Way]:
    """The ways of a group in its round `number`, another one first each time.

    What has failed before leads, so that failing again costs no more than itself.
    """
    first = number % len(group.ways)
    failed = {line["way"] for line in lines if line["group"] == group.title and "failed" in line}
    return sorted(group.ways[first:] + group.ways[:first], key=lambda way: way.name not in failed)


def still(group: Group, lines: Sequence[Line], stint: int, enough: int = ROUNDS) -> list[Way]:
    """The ways of a group that did not fail in this stint; none where enough rounds have all of them."""
    own = [line for line in lines if line["group"] == group.title]
    failed = {line["way"] for line in own if "failed" in line and line["stint"] == stint}
    rounds: dict[int, set[str]] = {}
    for line in own:
        rounds.setdefault(line["round"], set()).update(() if "failed" in line else (line["way"],))
    ways = [way for way in group.ways if way.name not in failed]
    whole = [measured for measured in rounds.values() if measured >= {way.name for way in ways}]
    return ways if len(whole) < enough else []


def expected(group: Group, way: Way, lines: Sequence[Line]) -> float:
    """Seconds that a measurement will take: the longest so far of the same, else of all that succeeded."""
    done = [line for line in lines if "failed" not in line]
    same = [line for line in done if (line["group"], line["way"]) == (group.title, way.name)]
    return max((line["wall seconds"] for line in same or done), default=GUESS)


def measure_all(
    plan: Sequence[Group], before: Sequence[Line], measure: Measure, left: Callable[[], float], enough: int = ROUNDS
) -> Iterator[Line]:
    """Measure what `before` lacks while seconds are `left`; each line comes as soon as it is there."""
    lines = list(before)
    stint = 1 + max((line["stint"] for line in before), default=0)
    for group in plan:
        while still(group, lines, stint, enough):
            number = 1 + max((line["round"] for line in lines if line["group"] == group.title), default=-1)
            for way in order(group, number, lines):
                if way not in still(group, lines, stint, enough):
                    continue
                if left() < expected(group, way, lines):
                    return
                about = {"stint": stint, "round": number, "group": group.title, "way": way.name}
                lines.append({**about, **measure(group, way, left())})
                yield lines[-1]


def chosen(plan: Sequence[Group], titles: Sequence[str], ways: Sequence[str] | None) -> list[Group]:
    """The groups whose title has one of `titles` in it, with those of their ways that are named, where some are."""
    kept = [group for group in plan if any(part in group.title for part in titles)]
    if ways:
        kept = [replace(group, ways=tuple(way for way in group.ways if way.name in ways)) for group in kept]
    return [group for group in kept if group.ways]


def command(group: Group, way: Way, folder: Path) -> list[str]:
    """How one.py is called for a way."""
    options = ["--rows", group.rows, "--batch", str(way.batch), "--batching", way.batching, "--steps", str(group.steps)]
    options += ["--checkpointing"] if way.checkpointing else []
    options += ["--targets", group.targets] if group.targets else []
    return [sys.executable, str(HERE / "one.py"), str(folder), way.name, *options]


def measure_on_gpu(models: Path, group: Group, way: Way, seconds: float) -> Line:
    """Measure a way in a process of its own, on a model that is made where `models` lacks it."""
    end, folder = time.monotonic() + seconds, models / group.shape
    if not (folder / "rows-mixed/card.json").is_file():  # what shapes.py writes last
        made = figures_of([sys.executable, str(HERE / "shapes.py"), group.shape, str(folder)], seconds)
        if "failed" in made:
            return {**made, **software(), "gpu before": gpu(), "gpu after": gpu()}
    before = gpu()
    found = figures_of(command(group, way, folder), min(end - time.monotonic(), LIMIT))
    return {**found, **software(), "gpu before": before, "gpu after": gpu()}


def figures_of(arguments: Sequence[str], seconds: float) -> Line:
    """The JSON object that a process prints, and how long it took; {"failed": why} where it fails.

    Where it says when it was `timed`, how fast the GPU ran then.
    """
    started = time.monotonic()
    found: Line
    try:
        printed, samples = _call(arguments, seconds)
        found = json.loads([line for line in printed.splitlines() if line.startswith('{"')][-1])  # peers print too
        if "timed" in found:
            found["gpu during"] = typical(samples, *found["timed"])
    except subprocess.TimeoutExpired as late:
        found = {"failed": f"cut off after {late.timeout:.0f} s"}
    except subprocess.CalledProcessError as failure:
        print(failure.stderr[-4000:], file=sys.stderr)
        last = [line for line in failure.stderr.splitlines() if line.strip()][-1:]
        found = {"failed": f"status {failure.returncode}: {''.join(last)[:300]}"}
    return {**found, "wall seconds": round(time.monotonic() - started, 1)}


def _call(arguments: Sequence[str], seconds: float) -> tuple[str, list[Sample]]:
    """What a process prints, and the GPU as it runs, looked at from here."""
    started, limit = time.monotonic(), max(seconds, 1)
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory() as scratch,  # peers leave files where they run
        subprocess.Popen(
            arguments,
            cwd=scratch,
            env={**os.environ, **OFFLINE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            while process.returncode is None:
                try:
                    out, err = process.communicate(timeout=EVERY)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - started > limit:
                        raise subprocess.TimeoutExpired(arguments, limit) from None
                    samples.append((time.time(), gpu()))
        finally:
            process.kill()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments, out, err)
    return out, samples


def typical(samples: Sequence[Sample], began: float, ended: float) -> dict[str, float]:
    """Medians of SM clock (MHz) and power (W) over the samples between two times; {} where the GPU told none."""
    within = [found for when, found in samples if began <= when <= ended]
    medians: dict[str, float] = {}
    for name, field in {"SM clock MHz": "clocks.sm", "power W": "power.draw"}.items():
        told = [float(found[field].split()[0]) for found in within if found.get(field, "")[:1].isdigit()]
        if told:
            medians |= {name: statistics.median(told), "samples": len(told)}
    return medians


def gpu() -> dict[str, str]:
    """Name, driver, SM clock, power, its limit, temperature of the GPU in use, nvidia-smi says; {} where it fails."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if not shutil.which("nvidia-smi") or not first:
        return {}
    fields = "name,clocks.sm,power.draw,power.limit,temperature.gpu,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={first.split(',')[0]}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return {}  # it only looks: what is measured goes on
    told = answer.strip().split(", ")
    return dict(zip(fields.split(","), told, strict=True)) if len(told) == len(fields.split(",")) else {}


def commit() -> str | None:
    """What COMMIT says, as in a copy without its history, or this repository's commit; None where neither is there."""
    if os.environ.get("COMMIT") or not shutil.which("git"):
        return os.environ.get("COMMIT")
    found = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return None if found.returncode else found.stdout.strip()


def software() -> Line:
    """What ran, as each line of results names it."""
    return {"versions": versions(), "commit": commit()}


def versions() -> dict[str, str]:
    """What is installed of the packages that decide the speed, and torch's CUDA."""
    installed = {
        found.name.lower().replace("_", "-"): found.version for found in metadata.distributions() if found.name
    }
    cuda = {"CUDA": torch.version.cuda} if torch.version.cuda else {}
    return {name: installed[name] for name in PACKAGES if name in installed} | cuda


def main() -> None:
    """Run a stint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="that the stint may take")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE)) / "results.jsonl")
    parser.add_argument("--resume", type=Path, help="results to go on from; they are copied to --out first")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that are enough")
    parser.add_argument("--only", nargs="+", default=[""], help="groups whose title has one of these in it")
    parser.add_argument("--ways", nargs="+", help="the ways that are measured, by name; all, where it is not given")
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/qlora-shapes"), help="where models are made")
    given = parser.parse_args()
    if given.resume and not given.resume.is_file():
        parser.error(f"{given.resume}: no such file; a first stint has nothing to resume")
    end = time.monotonic() + 60 * given.minutes
    before = lines_of(given.resume or given.out)
    text = "".join(json.dumps(line) + "\n" for line in before)
    given.out.write_text(text, encoding="utf-8")
    new = []
    measure = partial(measure_on_gpu, given.models.resolve())
    plan = chosen(PLAN, given.only, given.ways)
    if not plan:
        titles = "; ".join(group.title for group in PLAN)
        parser.error(f"--only {' '.join(given.only)}: no group has it, or not these --ways; there are {titles}")
    for line in measure_all(plan, before, measure, lambda: end - time.monotonic(), given.rounds):
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            line["group"], line["way"], line.get("failed") or f"{line['tokens per second']:,.0f} tokens/s", flush=True
        )
        new.append(line)
    print(with_conditions(PLAN, before + new))


if __name__ == "__main__":
    main()
