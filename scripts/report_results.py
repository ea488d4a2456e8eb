"""Write the report: one HTML file that opens offline and needs no script, made of the results alone."""

from qlora.stage import run_stage

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qlora import curves, findings
from qlora.confusion import confusions_of
from qlora.files import read_json, read_jsonl, replacing
from qlora.licences import TOLD, objections
from qlora.metrics import METRICS
from qlora.results import Record, read_table

LONGEST_TEXT = 2_000  # characters of a prompt or an answer that are shown
EXAMPLES, SEED = 2, 0  # rows of each dataset and slice that are shown, and the seed of their choice
IDENTITY = ("run", "adapter", "pins")  # topics of the provenance that say what a run is, and come first


def report_results(
    report: Path,
    metrics: Path,
    comparison: Path,
    predictions: list[Path],
    scores: list[Path],
    datasets: list[Path],
    mixtures: list[Path],
    records: list[Path],
    training_logs: list[Path],
    templates: list[Path],
    bootstraps: dict[str, dict[str, Any]],
    sources: list[dict[str, str]],
    title: str,
) -> None:
    """Write the report on all bases and runs.

    report: the HTML file to write.
    metrics, comparison: the joint tables of collect_metrics.
    predictions, scores: the files of each base and run, in the same order: {suite}/{base,tuned}/{name}.jsonl.
    datasets, mixtures: their folders, each with a card.json.
    records, training_logs: run.json and training_log.csv of each run, in the same order; runs/{run}/….
    templates: the page's template, and what it includes, in one folder.
    bootstraps: samples, seed and level of the intervals by suite.
    sources: the base models and the datasets, with their licences.
    """
    table, differences = read_table(metrics), read_table(comparison)
    panels = findings.panels_of(table, differences)
    drawn = [curves.read_curve(log.parent.name, log) for log in training_logs]
    page = {
        "title": title,
        "summary": findings.summary(panels),
        "panels": panels,
        "confusions": list(confusions_of(scores)),
        "tables": list(_grouped(table)),
        "curves": drawn,
        "axes": curves.axes_of(drawn),
        "examples": list(chosen_examples(predictions, scores, datasets, table)),
        "example_rule": {"count": EXAMPLES, "seed": SEED},
        "cards": [*_cards("dataset", datasets), *_cards("mixture", mixtures)],
        "sources": sources,
        "objections": list(objections(sources)),
        "runs": [path.parent.name for path in records],
        "provenance": list(provenance([read_json(path) for path in records])),
        "identity": IDENTITY,
        "bootstraps": bootstraps,
    }
    html = environment(templates[0].parent).get_template(templates[0].name).render(page)
    with replacing(report) as temporary:
        temporary.write_text(html, encoding="utf-8")


def environment(folder: Path) -> jinja2.Environment:
    """Templates in which every value is escaped, and a name that is not there is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(subjects=findings.SUBJECT_NAMES, placed=curves.placed, told=TOLD)
    made.filters.update(
        metric=findings.metric_name,
        interval=findings.interval_text,
        difference=findings.difference_text,
        value=findings.value_text,
        shown=shown,
        shortened=shortened,
        kind=kind_of,
        upright=upright,
        percent=lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%",
    )
    return made


def _grouped(table: Sequence[Record]) -> Iterator[tuple[str, str, dict[str, list[Record]]]]:
    """All rows of the metrics by suite and dataset, then by slice, the metrics in their usual order."""
    for suite, dataset in dict.fromkeys((record["suite"], record["dataset"]) for record in table):
        slices: dict[str, list[Record]] = {}
        for record in sorted(table, key=lambda record: METRICS.index(record["metric"])):
            if (record["suite"], record["dataset"]) == (suite, dataset):
                slices.setdefault(record["slice"], []).append(record)
        yield suite, dataset, slices


def chosen_examples(
    predictions: Sequence[Path],
    scores: Sequence[Path],
    datasets: Sequence[Path],
    metrics: Sequence[Record],
) -> Iterator[dict[str, Any]]:
    """EXAMPLES test rows of each suite, dataset and slice, with the answers of each model: its base, then its runs.

    Which rows is decided by a hash of SEED and the row's id, before any answer is looked at.
    """
    primary = findings.primary_metrics(metrics)
    models = {
        ("tuned" if record["run"] else "base", record["run"] or record["model"]): record["model"] for record in metrics
    }
    tests = {folder.name: list(read_jsonl(folder / "test.jsonl")) for folder in datasets}
    wanted = {
        (dataset, row["id"]): row
        for dataset, rows in tests.items()
        for part in dict.fromkeys(row["slice"] for row in rows)
        for row in sorted((r for r in rows if r["slice"] == part), key=lambda r: _draw(dataset, r["id"]))[:EXAMPLES]
    }
    answers: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path, scored in zip(predictions, scores, strict=True):
        suite, kind, name = path.parent.parent.name, path.parent.name, path.stem
        values = {(row["subject"], row["dataset"], row["id"]): row["scores"] for row in read_jsonl(scored)}
        for answer in read_jsonl(path):
            if answer["subject"] == kind and (answer["dataset"], answer["id"]) in wanted:
                metric = primary[suite, answer["dataset"]]
                score = values[kind, answer["dataset"], answer["id"]][metric]
                answers.setdefault((suite, answer["dataset"], answer["id"]), []).append(
                    {**answer, "name": name, "model": models[kind, name], "metric": metric, "score": score}
                )
    for (suite, dataset, id_), given in answers.items():
        row = wanted[dataset, id_]
        yield {
            **{"suite": suite, "dataset": dataset, "slice": row["slice"], "id": id_, "prompt": given[0]["prompt"]},
            "reference": next(m["content"] for m in reversed(row["messages"]) if m["supervised"]),
            "models": [
                [answer for answer in given if answer["model"] == model]
                for model in dict.fromkeys(answer["model"] for answer in given)
            ],
        }


def _draw(dataset: str, id_: str) -> str:
    return hashlib.sha256(f"{SEED}:{dataset}:{id_}".encode()).hexdigest()


def _cards(kind: str, folders: Sequence[Path]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, kind and facts of each dataset or mixture."""
    for folder in folders:
        facts = read_json(folder / "card.json")
        yield facts.pop(kind, folder.name), kind, facts


def provenance(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """All that the runs say about themselves, by topic, IDENTITY first: rows of a label and a text a run."""
    leaves = [dict(findings.flattened(record)) for record in records]
    paths = dict.fromkeys(path for record in leaves for path in record)
    topics: dict[str, list[tuple[str, list[str]]]] = {}
    for path in paths:
        topic, label = (path[0], ": ".join(path[1:])) if len(path) > 1 else ("run", path[0])
        cells = [shown(record.get(path), " ".join(path)) for record in leaves]
        topics.setdefault(topic, []).append((label, cells))
    first = {topic: topics.pop(topic) for topic in IDENTITY if topic in topics}
    yield from (first | topics).items()


def shown(value: object, label: str = "") -> str:
    """A plain value as it is read: thousands separated, bytes as MiB, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in label:
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value) or "–"
    return str(value)


def shortened(text: str) -> str:
    """A text of at most LONGEST_TEXT characters, saying how many are left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"


def kind_of(value: Mapping[str, Any]) -> str:
    """How a mapping reads best: `counts` in a line, a `table` where it holds flat mappings, or else plain `facts`."""
    items = value.values()
    if all(isinstance(item, int) for item in items):
        return "counts"
    if all(
        isinstance(item, Mapping) and not any(isinstance(leaf, Mapping) for leaf in item.values()) for item in items
    ):
        return "table"
    return "facts"


def upright(value: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """Such a table as its column heads and its rows, with at most as many columns as rows."""
    inner = list(dict.fromkeys(key for item in value.values() for key in item))
    if len(inner) > len(value):
        return list(value), [(key, [item.get(key) for item in value.values()]) for key in inner]
    return inner, [(name, [item.get(key) for key in inner]) for name, item in value.items()]


if __name__ == "__main__":
    run_stage(report_results)
