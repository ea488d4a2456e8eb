"""Write the results table of README.md from results/metrics.csv: `python tools/readme_results.py`."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRIMARY = ("execution_accuracy", "accuracy", "rouge_l", "number_match")
SUBJECTS = {"base": "base", "few_shot": "base, 3 examples", "trivial": "trivial", "tuned": "tuned"}
BEGIN, END = "<!-- results: made by tools/readme_results.py from results/metrics.csv -->", "<!-- end of results -->"
Rows = list[dict[str, str]]


def results_table(rows: Rows) -> str:
    """The primary metric of each dataset and slice as a Markdown table, a line a model, with 95% intervals."""
    cells = {
        (row["model"], row["dataset"], row["slice"], row["subject"]): row for row in rows if row["metric"] in PRIMARY
    }
    places = dict.fromkeys((dataset, part, model) for model, dataset, part, _ in cells)
    lines = [
        "| test set | slice | metric | n | model | " + " | ".join(SUBJECTS.values()) + " |",
        "|---" * (5 + len(SUBJECTS)) + "|",
    ]
    for dataset, part, model in places:
        found = {subject: cells.get((model, dataset, part, subject)) for subject in SUBJECTS}
        known = next(row for row in found.values() if row)
        shown = [_cell(row, subject == "tuned") if row else "–" for subject, row in found.items()]
        metric = known["metric"].replace("_", " ").replace("rouge l", "ROUGE-L")
        lines.append("| " + " | ".join([dataset, part.replace("_", " "), metric, known["n"], model, *shown]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str], strong: bool) -> str:
    value, low, high = (f"{float(row[key]):.2f}" for key in ("value", "ci_low", "ci_high"))
    return f"**{value}** [{low}, {high}]" if strong else f"{value} [{low}, {high}]"


def with_results(readme: str, rows: Rows) -> str:
    """The README with its table made anew."""
    between = re.compile(f"({re.escape(BEGIN)}).*({re.escape(END)})", re.DOTALL)
    return between.sub(rf"\1\n{results_table(rows)}\n\2", readme)


def read_metrics() -> Rows:
    """The rows of results/metrics.csv."""
    with (ROOT / "results/metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8"), read_metrics()), encoding="utf-8")
