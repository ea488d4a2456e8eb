"""The report: one file, everything in it, nothing fetched, nothing that was predicted ever interpreted."""

import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import BOOTSTRAP, MODELS, SUITE, make_results

from qlora import curves, findings
from qlora.bootstrap import Estimate
from qlora.confusion import confusions_of
from qlora.findings import Comparison, Line, Panel, Part, panels_of, summary
from qlora.results import read_table
from report_results import chosen_examples, kind_of, report_results, shortened, shown, upright

FOLDER = Path(__file__).parents[2] / "report"
TEMPLATES = [FOLDER / "index.html.j2", *sorted(path for path in FOLDER.iterdir() if path.name != "index.html.j2")]
SOURCES = [
    {
        "kind": "model",
        "name": "tiny",
        "address": "owner/tiny",
        "hub": "owner/tiny",
        "pin": "",
        "licence": "Terms <1>",
        "publishing": "forbidden",
    },
    {"kind": "dataset", "name": "sql", "address": "data/sql", "pin": "", "licence": "MIT", "publishing": "allowed"},
]
VOID = {"meta", "link", "br", "hr", "img", "input"}


def write(report: Path, inputs: dict[str, Any], **changed: Any) -> str:
    arguments = {"bootstraps": {SUITE: BOOTSTRAP}, "sources": SOURCES, "title": "A <title> & more", **inputs}
    arguments["templates"] = TEMPLATES
    report_results(report=report, **(arguments | changed))
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "index.html", inputs)


class Elements(HTMLParser):
    """All elements with their attributes, the text of all cells, and whether every element is closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_each_sources_licence_is_listed_and_what_stands_against_publishing(page: str) -> None:
    rows = Elements(page).rows
    assert ["model", "tiny", "owner/tiny", "Terms <1>", "forbidden"] in rows
    assert ["dataset", "sql", "data/sql", "MIT", "allowed"] in rows
    assert "<li>model tiny (Terms &lt;1&gt;) forbids publishing what is made of it</li>" in page


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page: str) -> None:
    elements = Elements(page)
    assert not elements.open
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for reference in (attributes.get("href"), attributes.get("aria-labelledby")):
            assert reference is None or reference.removeprefix("#") in ids


def test_nothing_is_fetched_and_no_script_runs(page: str) -> None:
    elements = Elements(page)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page


def test_what_was_predicted_is_text(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "&lt;b&gt;where&lt;/b&gt;" in page
    assert "A &lt;title&gt; &amp; more" in page
    assert "&lt;angle&gt;" in page


def test_every_row_of_the_metrics_is_there(page: str, inputs: dict[str, Any]) -> None:
    rows = ["|".join(cells) for cells in Elements(page).rows]
    for record in read_table(inputs["metrics"]):
        cells = [
            *(findings.metric_name(record["metric"]), record["model"], findings.SUBJECT_NAMES[record["subject"]]),
            *(record["run"] or "–", record["seed"] or "–", record["value"]),
            *(f"{record['ci_low']} to {record['ci_high']}", record["n"]),
        ]
        assert "|".join(cells) in rows


def test_the_answers_of_each_base_and_run_are_counted_by_label(page: str, inputs: dict[str, Any]) -> None:
    section = page[page.index('id="confusion"') : page.index('id="metrics"')]
    subjects = [
        (model, name, subject) for model in MODELS for name, subject in ((model, "base"), (f"{model}-s1", "tuned"))
    ]
    shown_subjects = re.findall(r'aria-label="Confusion matrix: (.*?)"', section)
    assert shown_subjects == [f"messages, {name}, {subject}" for _, name, subject in subjects]
    labels = ["delivery", "login", "praise", "refund"]
    tables = [Elements(table).rows for table in re.findall(r"<table.*?</table>", section, re.S)]
    assert [[rows[0], [row[0] for row in rows[1:]]] for rows in tables] == [[["", *labels, "no label"], labels]] * 4
    matrices = [[[int(cell or 0) for cell in row[1:]] for row in rows[1:]] for rows in tables]
    records = read_table(inputs["metrics"])
    for matrix, (model, _, subject) in zip(matrices, subjects, strict=True):
        right, n = sum(row[place] for place, row in enumerate(matrix)), sum(map(sum, matrix))
        accuracy = next(
            record
            for record in records
            if (record["metric"], record["subject"], record["model"], record["slice"])
            == ("accuracy", subject, model, "all")
        )
        assert (f"{right / n:.6g}", str(n)) == (accuracy["value"], accuracy["n"])
    assert section.count('<td class="hit"') == 4 * 4


def test_without_labels_there_is_no_confusion(inputs: dict[str, Any], tmp_path: Path) -> None:
    without = []
    for path in inputs["scores"]:
        without.append(tmp_path / SUITE / path.parent.name / path.name)
        without[-1].parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in path.read_text().splitlines() if '"reference"' not in line]
        without[-1].write_text("".join(f"{line}\n" for line in kept))
    assert list(confusions_of(without)) == []


def test_every_mark_of_the_chart_says_its_figures_and_n(page: str, inputs: dict[str, Any]) -> None:
    panels = panels_of(read_table(inputs["metrics"]), read_table(inputs["comparison"]))
    assert [panel.metric for panel in panels] == ["execution_accuracy", "accuracy", "rouge_l"]
    assert [len(panel.parts) for panel in panels] == [4, 3, 1]
    for panel in panels:
        for part in panel.parts:
            for line in part.lines:
                assert set(line.marks) == {"base", "few_shot", "trivial", "tuned"}
                assert set(line.comparisons) == {"base", "few_shot", "trivial"}
                for subject, mark in line.marks.items():
                    text = findings.interval_text(panel.metric, mark)
                    name = findings.SUBJECT_NAMES[subject]
                    assert f"<title>{line.name}, {name}: {text}, n = {part.n}</title>" in page


def test_figures_and_tables_can_be_read_by_a_screen_reader(page: str) -> None:
    for tag, attributes in Elements(page).found:
        if tag == "svg":
            assert "aria-hidden" in attributes or (attributes.get("role") == "img" and attributes.get("aria-label"))
        if tag == "th":
            assert attributes.get("scope") in {"col", "row", "rowgroup"}


def test_examples_are_those_of_the_stated_rule(page: str) -> None:
    assert page.count('<article class="card example">') == 2 * 6
    ids = [f"test.jsonl:{number}" for number in range(8)]  # the slice without a name of the titles
    first = sorted(ids, key=lambda id_: hashlib.sha256(f"0:titles:{id_}".encode()).hexdigest())[:2]
    assert set(re.findall(r'<p class="tag">all <small>(.*?)</small>', page)) == set(first)
    assert "✓ right" in page
    assert "✗ wrong" in page


def test_a_run_may_have_the_name_of_another_runs_base(tmp_path: Path) -> None:
    made = make_results(tmp_path, 2, runs=MODELS[::-1])
    metrics = read_table(made["metrics"])
    for example in chosen_examples(made["predictions"], made["scores"], made["datasets"], metrics):
        named = [[(answer["subject"], answer["name"]) for answer in answers] for answers in example["models"]]
        assert named == [[("base", base), ("tuned", run)] for base, run in zip(MODELS, MODELS[::-1], strict=True)]


def test_examples_do_not_depend_on_the_answers(inputs: dict[str, Any], page: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in inputs["predictions"][0].read_text(encoding="utf-8").splitlines()]
    changed = tmp_path / SUITE / "base" / "tiny-llama.jsonl"
    changed.parent.mkdir(parents=True)
    changed.write_text("".join(json.dumps(row | {"generated": "other"}) + "\n" for row in rows), encoding="utf-8")
    other = write(tmp_path / "other.html", inputs, predictions=[changed, *inputs["predictions"][1:]])
    shown_rows = re.compile(r'<p class="tag">.*')
    assert shown_rows.findall(other) == shown_rows.findall(page)


def test_cards_and_provenance_are_complete(page: str) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for fact in (
        *("prompt stands in test", "data/examples/sql", "0123456789abcdef" * 4),
        *("1,043,211", "1,177 MiB", "2.13.0", "A processor with <angle> brackets", "ab" * 32, "all-linear"),
    ):
        assert fact in text


def test_what_a_run_is_stands_open_and_first(page: str) -> None:
    section = page[page.index('id="provenance"') : page.index('id="reading"')]
    topics = re.findall(r'<details class="card"( open)?>\s*<summary><b>(.*?)</b>', section)
    assert (
        [name for is_open, name in topics if is_open] == [name for _, name in topics][:3] == ["run", "adapter", "pins"]
    )
    rows = ["|".join(cells) for cells in Elements(page).rows]
    assert "commit|" + "c0" * 20 in rows
    assert "key|0123456789abcdef" in rows
    assert "adapter_model.safetensors|00" + "ad" * 31 + "|01" + "ad" * 31 in rows
    assert "model: files: model.safetensors|" + "ab" * 32 in rows
    assert "make verify RUN=tiny-llama-s1" in section


def test_a_second_time_gives_the_same_bytes(inputs: dict[str, Any], page: str, tmp_path: Path) -> None:
    assert write(tmp_path / "again.html", inputs) == page


def line(base: float, tuned: float, width: float = 0.02, run: str = "r", model: str = "m") -> Line:
    difference = tuned - base
    comparison = Comparison(
        Estimate(difference, difference - width, difference + width, 50), abs(difference) > 2 * width
    )
    marks = {
        name: Estimate(value, value - width, value + width, 50) for name, value in (("base", base), ("tuned", tuned))
    }
    return Line(run, model, marks, {"base": comparison})


def panel(dataset: str, *lines: Line, part: str = "all") -> Panel:
    return Panel(
        "s", dataset, "accuracy", [Part("all", 50, list(lines)), *([Part(part, 50, list(lines))] * (part != "all"))]
    )


def test_the_summary_says_what_helped() -> None:
    both = [line(0, 0.8, run="a", model="x"), line(0, 0.9, run="b", model="y")]
    sentences = summary([panel("d", *both), panel("e", *both, part="hard")])
    assert sentences == [
        "Tuning helped on 2 of 2 datasets for both models (x, y).",
        "Accuracy on d went from 0.00 to 0.80–0.90; accuracy on e went from 0.00 to 0.80–0.90.",
        "In 4 of 4 cases (a run on a dataset) the tuned interval lies wholly above that of the base.",
        "The weakest slice is “hard” of e: accuracy 0.80 [0.78, 0.82], n = 50, for a.",
    ]


def test_the_summary_is_honest() -> None:
    worse = summary([panel("d", line(0.8, 0.2))])
    assert worse[0] == "Tuning helped on 0 of 1 dataset for m."
    assert "In 0 of 1 case" in worse[2]
    assert worse[3] == "Tuning made it worse on d (r)."
    unclear = summary([panel("d", line(0.5, 0.51))])
    assert unclear[0].startswith("Tuning helped on 0 of 1")
    assert not any("worse" in sentence for sentence in unclear)
    mixed = summary([panel("d", line(0, 0.8, run="a", model="x"), line(0.5, 0.5, run="b", model="y"))])
    assert mixed[0] == "Tuning helped on some datasets and not on others: 1 of 1 for a, 0 of 1 for b."
    seeds = summary([panel("d", line(0, 0.8, run="a"), line(0, 0.8, run="b"))])
    assert seeds[0] == "Tuning helped on 1 of 1 dataset in each of 2 runs of 1 model (m)."
    assert summary([]) == ["No run was evaluated, so there is nothing to compare."]


def test_texts_of_figures() -> None:
    assert findings.interval_text("accuracy", Estimate(0.875, 0.8, 1, 9)) == "0.88 [0.80, 1.00]"
    assert findings.interval_text("loss", Estimate(0.1234, 0.1, 0.2, 9)) == "0.123 [0.100, 0.200]"
    assert findings.interval_text("perplexity", Estimate(12345.6, 9.87, 2e5, 9)) == "12,346 [9.87, 200,000]"
    assert findings.difference_text("accuracy", Estimate(0.5, -0.25, 0.75, 9)) == "+0.50 [−0.25, +0.75]"
    assert (shown(None), shown(True), shown(123456), shown(2021), shown([])) == ("–", "yes", "123,456", "2021", "–")
    assert shown(3 * 2**20, "peak memory in bytes resident") == "3 MiB"
    assert shortened("x" * 2100).endswith("x… (100 more characters)")


def test_mappings_are_shown_by_their_shape() -> None:
    assert kind_of({"train": 3, "test": 4}) == "counts"
    assert kind_of({"train": {"a": 1}, "test": {"a": 2}}) == "table"
    assert kind_of({"path": "x", "more": {"a": 1}}) == "facts"
    assert upright({"test": {"a": 1, "b": 2}}) == (["test"], [("a", [1]), ("b", [2])])
    assert upright({"x": {"a": 1}, "y": {"b": 2}}) == (["a", "b"], [("x", [1, None]), ("y", [None, 2])])


@given(st.floats(1e-6, 1e9))
def test_an_axis_has_few_round_ticks_and_holds_its_values(high: float) -> None:
    axis = curves.round_axis(high)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.ticks[0] == 0
    assert axis.place(high) <= 100 + 1e-6
    assert axis.place(0) == 0


def test_long_curves_are_thinned_to_means() -> None:
    points = [(float(step), 1.0 if step % 2 else 3.0) for step in range(1200)]
    thin = curves.thinned(points, 300)
    assert len(thin) == 300
    assert {y for _, y in thin} == {2.0}
    assert curves.thinned(points[:9], 300) == points[:9]


def test_a_loss_that_is_no_number_is_left_out() -> None:
    curve = curves.Curve("r", [(1.0, 2.0), (2.0, float("nan"))], [])
    horizontal, vertical = curves.axes_of([curve])
    assert curves.placed(curve.training, horizontal, vertical) == [(50.0, 0.0)]
