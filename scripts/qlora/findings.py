"""What the tables of results say: panels of figures for the report, and a summary in words that follows from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qlora.bootstrap import Estimate
from qlora.metrics import LOWER_IS_BETTER, METRICS
from qlora.results import WHOLE, Record

SUBJECT_NAMES = {"base": "base", "few_shot": "few-shot", "trivial": "trivial", "tuned": "tuned"}
_METRIC_NAMES = {"rouge_l": "ROUGE-L", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class Comparison:
    """A run minus one of its baselines on the same rows; `disjoint`: their two intervals have no point in common."""

    difference: Estimate
    disjoint: bool


@dataclass(frozen=True)
class Line:
    """The subjects of one run, with those of its base model; or of a base model alone."""

    name: str
    model: str
    marks: dict[str, Estimate] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    @property
    def helped(self) -> bool:
        """Whether the whole interval of tuned − base is above zero."""
        return "base" in self.comparisons and self.comparisons["base"].difference.low > 0

    @property
    def harmed(self) -> bool:
        """Whether the whole interval of tuned − base is below zero."""
        return "base" in self.comparisons and self.comparisons["base"].difference.high < 0

    @property
    def clear(self) -> bool:
        """Whether tuned is above each baseline, with intervals that do not overlap."""
        return all(item.disjoint and item.difference.value > 0 for item in self.comparisons.values())


@dataclass(frozen=True)
class Part:
    """One slice of a test set."""

    name: str
    n: int
    lines: list[Line]


@dataclass(frozen=True)
class Panel:
    """The primary metric of one dataset in one suite, on the whole test set and on each slice."""

    suite: str
    dataset: str
    metric: str
    parts: list[Part]

    @property
    def whole(self) -> Part:
        """The whole test set."""
        return next(part for part in self.parts if part.name == WHOLE)


def metric_name(metric: str) -> str:
    """A metric's name in a sentence."""
    return _METRIC_NAMES.get(metric, metric.replace("_", " "))


def value_text(metric: str, value: float) -> str:
    """A value as it is read: two decimals for scores, three for a loss, no decimals for a huge perplexity."""
    if metric == "perplexity":
        return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
    return f"{value:.{3 if metric in LOWER_IS_BETTER else 2}f}"


def estimate_of(record: Record, key: str = "value") -> Estimate:
    """The figures of a row of metrics, or with key `difference` of a row of the comparison."""
    return Estimate(float(record[key]), float(record["ci_low"]), float(record["ci_high"]), int(record["n"]))


def primary_metrics(metrics: Sequence[Record]) -> dict[tuple[str, str], str]:
    """The primary metric by suite and dataset: the first in the order of METRICS that the dataset has."""
    found: dict[tuple[str, str], str] = {}
    for record in metrics:
        key = record["suite"], record["dataset"]
        found[key] = min(found.get(key, record["metric"]), record["metric"], key=METRICS.index)
    return found


def panels_of(metrics: Sequence[Record], comparison: Sequence[Record]) -> list[Panel]:
    """A panel for each suite and dataset, in the order of the tables."""
    return [
        Panel(
            suite,
            dataset,
            metric,
            list(
                _parts(
                    [record for record in metrics if _belongs(record, suite, dataset, metric)],
                    [record for record in comparison if _belongs(record, suite, dataset, metric)],
                )
            ),
        )
        for (suite, dataset), metric in primary_metrics(metrics).items()
    ]


def _belongs(record: Record, suite: str, dataset: str, metric: str) -> bool:
    return (record["suite"], record["dataset"], record["metric"]) == (suite, dataset, metric)


def _parts(metrics: Sequence[Record], comparison: Sequence[Record]) -> Iterator[Part]:
    """The slices of one panel, each with a line a run, and one for each base model that has no run."""
    runs = {record["run"]: record["model"] for record in metrics if record["run"]}
    alone = [record["model"] for record in metrics if record["model"] not in runs.values()]
    owners = [*runs.items(), *((model, model) for model in dict.fromkeys(alone))]
    for part in dict.fromkeys(record["slice"] for record in metrics):
        lines = []
        for name, model in owners:
            own = [r for r in metrics if r["slice"] == part and r["model"] == model and r["run"] in ("", name)]
            compared = [r for r in comparison if r["slice"] == part and r["run"] == name]
            lines.append(
                Line(
                    name,
                    model,
                    {record["subject"]: estimate_of(record) for record in own},
                    {
                        record["baseline"]: Comparison(estimate_of(record, "difference"), record["disjoint"] == "true")
                        for record in compared
                    },
                )
            )
        yield Part(part, next(mark.n for line in lines for mark in line.marks.values()), lines)


def summary(panels: Sequence[Panel]) -> list[str]:
    """The result in sentences, each computed: what helped, by how much, against what, and where it is weakest."""
    tuned = [(panel, line) for panel in panels for line in panel.whole.lines if "tuned" in line.marks]
    if not tuned:
        return ["No run was evaluated, so there is nothing to compare."]
    sentences = [_what_helped(tuned), _by_how_much(panels)]
    clear = sum(line.clear for _, line in tuned)
    baselines = [name for name in SUBJECT_NAMES if any(name in line.comparisons for _, line in tuned)]
    names = [
        {"few_shot": "the few-shot prompt", "trivial": "the trivial baseline"}.get(n, "the base") for n in baselines
    ]
    sentences.append(
        f"In {clear} of {len(tuned)} cases (a run on a dataset) the tuned interval lies wholly above "
        f"{'those' if len(names) > 1 else 'that'} of {_listed(names)}."
    )
    harmed = [f"{panel.dataset} ({line.name})" for panel, line in tuned if line.harmed]
    if harmed:
        sentences.append(f"Tuning made it worse on {', '.join(harmed)}.")
    weakest = _weakest_slice(panels)
    return [*sentences, weakest] if weakest else sentences


def _what_helped(tuned: Sequence[tuple[Panel, Line]]) -> str:
    """On how many datasets each run is better than its base."""
    runs = list(dict.fromkeys(line.name for _, line in tuned))
    counts = {
        run: (
            sum(line.helped for _, line in tuned if line.name == run),
            sum(line.name == run for _, line in tuned),
        )
        for run in runs
    }
    if len(set(counts.values())) == 1:
        helped, of = counts[runs[0]]
        return f"Tuning helped on {helped} of {_counted(of, 'dataset')} {_for_whom(tuned)}."
    each = ", ".join(f"{helped} of {of} for {run}" for run, (helped, of) in counts.items())
    return f"Tuning helped on some datasets and not on others: {each}."


def _for_whom(tuned: Sequence[tuple[Panel, Line]]) -> str:
    """For one model, for both, or in each of several runs."""
    runs = {line.name: line.model for _, line in tuned}
    models = list(dict.fromkeys(runs.values()))
    if len(models) < len(runs):
        return f"in each of {len(runs)} runs of {_counted(len(models), 'model')} ({', '.join(models)})"
    if len(models) == 1:
        return f"for {models[0]}"
    return f"for {'both' if len(models) == 2 else f'all {len(models)}'} models ({', '.join(models)})"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def _by_how_much(panels: Sequence[Panel]) -> str:
    """Base and tuned values of each dataset, as the range over its runs."""
    changes = []
    for panel in panels:
        lines = [line for line in panel.whole.lines if {"base", "tuned"} <= set(line.marks)]
        if lines:
            before, after = (_range(panel.metric, lines, subject) for subject in ("base", "tuned"))
            changes.append(f"{metric_name(panel.metric)} on {panel.dataset} went from {before} to {after}")
    text = "; ".join(changes)
    return f"{text[:1].upper()}{text[1:]}."


def _range(metric: str, lines: Sequence[Line], subject: str) -> str:
    """The lowest and the highest value over the runs, as one text where they read the same."""
    values = sorted(line.marks[subject].value for line in lines)
    low, high = (value_text(metric, value) for value in (values[0], values[-1]))
    return low if low == high else f"{low}–{high}"


def _weakest_slice(panels: Sequence[Panel]) -> str | None:
    """The named slice with the lowest tuned value; values of different metrics are taken as they are."""
    slices = [
        (line.marks["tuned"].value, panel, part, line)
        for panel in panels
        for part in panel.parts
        if part.name != WHOLE
        for line in part.lines
        if "tuned" in line.marks
    ]
    if not slices:
        return None
    _, panel, part, line = min(slices, key=lambda item: item[0])
    mark = line.marks["tuned"]
    return (
        f"The weakest slice is “{part.name}” of {panel.dataset}: {metric_name(panel.metric)} "
        f"{interval_text(panel.metric, mark)}, n = {mark.n}, for {line.name}."
    )


def interval_text(metric: str, estimate: Estimate) -> str:
    """`0.88 [0.82, 0.93]`."""
    value, low, high = (value_text(metric, number) for number in estimate[:3])
    return f"{value} [{low}, {high}]"


def difference_text(metric: str, estimate: Estimate) -> str:
    """`+0.88 [+0.82, +0.93]`."""
    texts = [value_text(metric, number) for number in estimate[:3]]
    value, low, high = (text if text.startswith("-") else f"+{text}" for text in texts)
    return f"{value} [{low}, {high}]".replace("-", "−")


def flattened(value: Mapping[str, object], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The leaves of nested mappings with the keys that lead to them."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flattened(item, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), item
