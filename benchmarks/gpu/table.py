"""Write the table of docs/benchmarks.md from results.jsonl: `python benchmarks/gpu/table.py`."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import PLAN, Group, Way

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.jsonl", HERE.parents[1] / "docs/benchmarks.md"
BEGIN, END = "<!-- GPU: made by benchmarks/gpu/table.py from benchmarks/gpu/results.jsonl -->", "<!-- end of GPU -->"
HEAD = "way, tokens/s, s a step, allocated GiB, reserved GiB, repeats, card, first way of the group against it"
NOTHING = "Nothing was run yet."
Line = dict[str, Any]


def lines_of(path: Path) -> list[Line]:
    """The results in a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def ratios(lines: Sequence[Line], first: str, way: str) -> list[list[float]]:
    """Tokens/s of `first` over those of `way`: of each stint that measured both, its rounds' ratios.

    `lines` are a group's. A round lies within one stint.
    """
    speeds = {(line["stint"], line["round"], line["way"]): line["tokens per second"] for line in _measured(lines)}
    stints: dict[int, list[float]] = {}
    for (stint, number, name), speed in speeds.items():
        if name == way and (stint, number, first) in speeds:
            stints.setdefault(stint, []).append(speeds[stint, number, first] / speed)
    return list(stints.values())


def _ratio(stints: Sequence[Sequence[float]]) -> str:
    """The median of the stints' medians; a ratio of a single round says so."""
    if not stints:
        return ""
    ratio = statistics.median(statistics.median(rounds) for rounds in stints)
    return f"{ratio:.2f} ×" + (" (1 round)" if sum(map(len, stints)) == 1 else "")


def table(plan: Sequence[Group], lines: Sequence[Line]) -> str:
    """All of the plan as Markdown: medians of the processes; what failed or was not run says so."""
    rows = ["| same work | " + HEAD.replace(", ", " | ") + " |", "|---" * 9 + "|"]
    for group in plan:
        own = [line for line in lines if line["group"] == group.title]
        rows += ["| " + " | ".join([group.title, *_cells(group, way, own)]) + " |" for way in group.ways]
    return "\n".join(rows)


def _cells(group: Group, way: Way, lines: Sequence[Line]) -> list[str]:
    name = f"{way.name}{f', batch {way.batch}' if way.batch != group.ways[0].batch else ''}"
    mine = [line for line in lines if line["way"] == way.name]
    found = _measured(mine)
    found = [line for line in found if card_of(line) == card_of(found[-1])]  # speeds of two cards have no median
    if not found:
        return [name, f"failed: {mine[-1]['failed']}".replace("|", "/") if mine else "not run", *[""] * 6]
    speeds = [line["tokens per second"] for line in found]  # each process's own median
    repeats = [speed for line in found for speed in line.get("repeats") or [line["tokens per second"]]]
    first = group.ways[0]
    same = [line for line in lines if "failed" in line or card_of(line) == card_of(found[0])]
    against = [] if way == first else ratios(same, first.name, way.name)
    return [
        name,
        f"{statistics.median(speeds):,.0f} ({_range(repeats)})",
        f"{statistics.median(line['seconds a step'] for line in found):.3f}",
        *(f"{max(line[f'{kind} GiB'] for line in found):.1f}" for kind in ("allocated", "reserved")),
        f"{len(repeats)} in {len(found)} process{'es' if len(found) > 1 else ''}",
        card_of(found[0]),
        _ratio(against),
    ]


def card_of(line: Line) -> str:
    """The card's name without its maker and memory, as "H100"; "" where there was none."""
    name = re.sub(r" (PCIe|SXM\d?)|[ -]\d+ ?GB.*", "", line["gpu after"].get("name", ""))
    return re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)


def _measured(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if "failed" not in line]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,.0f}–{max(values):,.0f}"


def conditions(lines: Sequence[Line]) -> str:
    """In how many stints it was measured, on what and with what."""
    stints = len({line["stint"] for line in lines})
    return f"Random weights and tokens; {stints} stint{'s' if stints > 1 else ''} on {machine(lines)}"


def machine(lines: Sequence[Line]) -> str:
    """What it was measured on and with, and how fast the GPU ran meanwhile.

    Driver and commit are named where lines have them.
    """
    after = [line["gpu after"] for line in lines if line["gpu after"]]
    gpus = sorted({f"{gpu['name']} (limit {gpu['power.limit']})" for gpu in after})
    drivers = sorted({f"driver {gpu['driver_version']}" for gpu in after if "driver_version" in gpu})
    packages = sorted({f"{name} {version}" for line in lines for name, version in line["versions"].items()})
    commits = sorted({f"commit {line['commit'][:10]}" for line in lines if line.get("commit")})
    return "; ".join([*(gpus or ["no GPU"]), *_pace(lines), *drivers, ", ".join(packages), *commits]) + "."


def _pace(lines: Sequence[Line]) -> list[str]:
    """SM clock and power while it was measured; of lines without them the clock afterwards, so named."""
    during = [line["gpu during"] for line in lines if line.get("gpu during")]
    later = [line["gpu after"]["clocks.sm"] for line in lines if line["gpu after"] and not line.get("gpu during")]
    said = []
    for kind, unit in (("SM clock", "MHz"), ("power", "W")):
        values = [found[f"{kind} {unit}"] for found in during if f"{kind} {unit}" in found]
        if values:
            said.append(f"{kind} while measured {statistics.median(values):,.0f} ({_range(values)}) {unit}")
    clocks = [float(clock.split()[0]) for clock in later]
    return said + ([f"SM clock afterwards, not while measured: {_range(clocks)} MHz"] if clocks else [])


def with_block(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two of its lines, in place of what is there."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def with_conditions(plan: Sequence[Group], lines: Sequence[Line]) -> str:
    """The table, and below it what it was measured on."""
    return f"{table(plan, lines)}\n\n{conditions(lines) if lines else NOTHING}"


def with_table(page: str, lines: Sequence[Line]) -> str:
    """The page with its table made anew."""
    return with_block(page, BEGIN, END, with_conditions(PLAN, lines))


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), lines_of(RESULTS)), encoding="utf-8")
