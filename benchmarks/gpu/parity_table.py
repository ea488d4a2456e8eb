"""Write the table of FP8's loss in docs/benchmarks.md from parity.jsonl: `python benchmarks/gpu/parity_table.py`."""

import itertools
import math
import statistics
from collections.abc import Sequence

from plan import BF16, BF16_PEFT, PARITY, PARITY_WAYS
from table import HERE, NOTHING, PAGE, Line, lines_of, machine, with_block

RESULTS = HERE / "parity.jsonl"
BEGIN, END = (
    "<!-- parity: made by benchmarks/gpu/parity_table.py from benchmarks/gpu/parity.jsonl -->",
    "<!-- end of parity -->",
)
HEAD = (
    "model, way, seeds, validation loss, against bf16 (95%), against bf16-peft (95%), "
    "adapter in bf16 against bf16 (95%), "
    "training loss at the end, against bf16 (95%), curves apart"
)
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 0.975, 1 to 9 degrees


def differences(lines: Sequence[Line], way: str, figure: str, base: str = BF16) -> list[float]:
    """The figure of a way minus that of `base`, for each seed that has both."""
    of = {(line["way"], line["seed"]): line[figure] for line in lines}
    return [of[way, seed] - value for (name, seed), value in of.items() if name == base and (way, seed) in of]


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval (Student's t) of two to ten values; the mean alone of one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    half = QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Root of the mean squared difference of two loss curves, point by point, in nats."""
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def curves_apart(lines: Sequence[Line], way: str) -> list[float]:
    """How far a way's curves lie from bf16's of the same seed; for bf16, from bf16's of every other seed."""
    of = {(line["way"], line["seed"]): line["losses"] for line in lines}
    seeds = [seed for name, seed in of if name == BF16]
    if way == BF16:
        return [apart(of[BF16, one], of[BF16, other]) for one, other in itertools.combinations(seeds, 2)]
    return [apart(of[way, seed], of[BF16, seed]) for seed in seeds if (way, seed) in of]


def table(lines: Sequence[Line]) -> str:
    """All cases and ways as Markdown."""
    rows = ["| " + HEAD.replace(", ", " | ") + " |", "|---" * (HEAD.count(", ") + 1) + "|"]
    for case in PARITY:
        own = [line for line in lines if line["model"] == case]
        rows += [f"| {case} | {way} | " + " | ".join(_cells(own, way)) + " |" for way in PARITY_WAYS]
    return "\n".join(rows)


def _cells(lines: Sequence[Line], way: str) -> list[str]:
    mine = [line for line in lines if line["way"] == way]
    if not mine:
        return ["not run", *[""] * 7]

    def against(figure: str, base: str = BF16) -> str:
        found = [] if way in (BF16, base) else differences(lines, way, figure, base)
        return interval(found) if found else ""

    distances = curves_apart(lines, way)
    return [
        str(len(mine)),
        _spread([line["validation loss"] for line in mine]),
        against("validation loss"),
        against("validation loss", BF16_PEFT),
        against("validation loss in bf16"),
        _spread([line["training loss"] for line in mine]),
        against("training loss"),
        f"{statistics.fmean(distances):.4f}" if distances else "",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def with_table(page: str, lines: Sequence[Line]) -> str:
    """The page with its table made anew."""
    found = f"{len(lines)} trainings on {machine(lines)}" if lines else NOTHING
    return with_block(page, BEGIN, END, f"{table(lines)}\n\n{found}")


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), lines_of(RESULTS)), encoding="utf-8")
