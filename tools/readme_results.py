"""Write the results table of README.md from results/metrics.csv: `python tools/readme_results.py`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.findings import interval_text, metric_name, panels_of  # noqa: E402 (scripts/ is no package)
from qlora.results import Record, read_table  # noqa: E402

SUBJECTS = {"base": "base", "few_shot": "base, 3 examples", "trivial": "trivial", "tuned": "tuned"}
BEGIN, END = "<!-- results: made by tools/readme_results.py from results/metrics.csv -->", "<!-- end of results -->"


def results_table(metrics: Sequence[Record]) -> str:
    """The primary metric of each dataset and slice as a Markdown table, a line a run, with 95% intervals."""
    lines = [
        "| test set | slice | metric | n | run | " + " | ".join(SUBJECTS.values()) + " |",
        "|---" * (5 + len(SUBJECTS)) + "|",
    ]
    for panel in panels_of(metrics, []):
        for part in panel.parts:
            for line in part.lines:
                marks = {name: interval_text(panel.metric, mark) for name, mark in line.marks.items()}
                shown = [_strong(marks[name]) if name == "tuned" else marks.get(name, "–") for name in SUBJECTS]
                place = [panel.dataset, part.name.replace("_", " "), metric_name(panel.metric), str(part.n), line.name]
                lines.append("| " + " | ".join([*place, *shown]) + " |")
    return "\n".join(lines)


def _strong(interval: str) -> str:
    """An interval whose value is in bold."""
    value, _, rest = interval.partition(" ")
    return f"**{value}** {rest}"


def with_results(readme: str, metrics: Sequence[Record]) -> str:
    """The README with its table made anew."""
    between = re.compile(f"({re.escape(BEGIN)}).*({re.escape(END)})", re.DOTALL)
    return between.sub(rf"\1\n{results_table(metrics)}\n\2", readme)


def read_metrics() -> list[Record]:
    """The rows of results/metrics.csv."""
    return read_table(ROOT / "results/metrics.csv")


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8"), read_metrics()), encoding="utf-8")
