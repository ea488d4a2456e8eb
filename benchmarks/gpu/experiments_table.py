"""Write three tables of docs/benchmarks.md from experiments.jsonl: `python benchmarks/gpu/experiments_table.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from overlays import EXPERIMENTS, runs_of
from table import HERE, NOTHING, PAGE, Line, card_of, lines_of, machine, with_block

EXPERIMENTS_RESULTS = HERE / "experiments.jsonl"
HEADS = {
    "runs": (
        *("experiment", "run", "whole job, s", "before the first step, s", "s a step", "tokens/s"),
        *("allocated GiB", "reserved GiB", "computed by"),
    ),
    "merge": (
        *("device", "adapter", "merged model, GiB", "s", "anonymous GiB at most", "resident GiB at most"),
        *("drift, rms", "same next token", "chat in 4 bits, s", "chat with the merged model, s"),
    ),
    "notebook": (
        *("way", "card", "steps", "tokens", "whole job, s", "s a step", "tokens/s", "allocated GiB"),
        *("its tokens/s over the notebook's", "the notebook's whole job over its own"),
    ),
}
WAYS = {  # in which the job of llama2-sql-mix is run, in this order
    "notebook": "a notebook's way",
    "ours-rows": "ours, the same rows once",
    "ours-steps": "ours, not packed: the same rows and steps",
    "ours": "ours, as many packed steps",
}


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Table → Markdown; what failed or was not run says so."""
    rows = {"runs": _runs(lines), "notebook": _against_notebook(lines), "merge": _merges(lines)}
    return {table: _markdown(table, found) for table, found in rows.items()}


def _markdown(table: str, rows: Sequence[Sequence[str]]) -> str:
    head = HEADS[table]
    cells = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]])


def _found(lines: Sequence[Line], table: str, run: str, way: str) -> Line | None:
    """The last line of a job, one with figures where there is one."""
    mine = [line for line in lines if (line["table"], line["run"], line["way"]) == (table, run, way)]
    return max(enumerate(mine), key=lambda item: ("failed" not in item[1], item[0]))[1] if mine else None


def _missing(line: Line | None) -> str | None:
    """Why there are no figures, or None where there are."""
    if line is None:
        return "not run"
    return f"failed: {line['failed']}".replace("|", "/") if "failed" in line else None


def _runs(lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    for run in [run for experiment in EXPERIMENTS for run in runs_of(experiment)]:
        line = _found(lines, "runs", run.name, "ours")
        missing = _missing(line)
        if line is None or missing:
            rows.append([run.experiment, run.name, str(missing)])
            continue
        dtype = f", {line['dtype']}" if line["dtype"] else ""
        short = f", {line['steps']} steps" if line["steps"] < line["steps in all"] else ""
        rows.append([run.experiment, run.name + dtype + short, *_figures(line), "; ".join(line["computed by"])])
    return rows


def _figures(line: Line) -> list[str]:
    return [
        f"{line['seconds of the job']:,.0f}",
        f"{line['seconds before the first step']:,.0f}",
        *_speeds(line),
        f"{line['allocated GiB']:.1f}",
        f"{line['reserved GiB']:.1f}",
    ]


def _speeds(line: Line) -> list[str]:
    return [_shown(line["seconds a step"], ".2f"), _shown(line["tokens per second"], ",.0f")]


def _shown(value: float | None, form: str) -> str:
    """A dash for what could not be measured."""
    return "–" if value is None else f"{value:{form}}"


def _over(one: float | None, other: float | None) -> str:
    return "–" if one is None or other is None else f"{one / other:.1f} ×"


def _against_notebook(lines: Sequence[Line]) -> list[list[str]]:
    """Of each card its ways, then those that none has run."""
    own = [line for line in lines if line["table"] == "notebook"]
    cards = dict.fromkeys(card_of(line) for line in own)
    rows = [row for card in cards for row in _on_card(card, [line for line in own if card_of(line) == card])]
    tried = {line["way"] for line in own}
    return rows + [[words, "", "not run"] for way, words in WAYS.items() if way not in tried]


def _on_card(card: str, lines: Sequence[Line]) -> list[list[str]]:
    [run] = [run.name for run in runs_of("llama2-sql-mix")]
    theirs = _found(lines, "notebook", run, "notebook")
    rows = []
    for way, words in WAYS.items():
        line = _found(lines, "notebook", run, way)
        if line is None:
            continue
        if missing := _missing(line):
            rows.append([words, card, missing])
            continue
        against = ["", ""]
        if way != "notebook" and theirs and not _missing(theirs):
            against = [
                _over(line["tokens per second"], theirs["tokens per second"]),
                _over(whole(theirs), whole(line)),
            ]
        stopped = line["steps"] < line["steps in all"]
        rows.append(
            [
                words,
                card,
                f"{line['steps']} of {line['steps in all']}" if stopped else str(line["steps"]),
                f"{line['tokens']:,}",
                _shown(whole(line), ",.0f") + (" extrapolated" if stopped and whole(line) else ""),
                *_speeds(line),
                f"{line['allocated GiB']:.1f}",
                *against,
            ]
        )
    return rows


def _merges(lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    for device in ("cuda", "cpu"):
        line = _found(lines, "merge", "llama2-sql-mix", device)
        missing = _missing(line)
        if line is None or missing:
            rows.append([device, str(missing)])
            continue
        chats = [line.get(kind) for kind in ("chat in 4 bits", "chat merged")]
        asked = [f"{chat['seconds']:,.0f}" if chat and "failed" not in chat else str(_missing(chat)) for chat in chats]
        figures = [f"{line[kind]:,.1f}" for kind in ("merged GiB", "seconds", "anonymous GiB", "resident GiB")]
        adapter = f"of {line['steps']} steps" if line["steps"] else "drawn at random"
        drift = [str(line["drift"][kind]) for kind in ("rms", "same next token")]
        rows.append([device, adapter, *figures, *drift, *asked])
    return rows


def whole(line: Line) -> float | None:
    """Seconds of the whole job; steps that were not made take as long as those after the warm-up, None without any."""
    missing = line["steps in all"] - line["steps"]
    if missing and line["seconds a step"] is None:
        return None
    return line["seconds of the job"] + missing * (line["seconds a step"] or 0)


def _measured_on(lines: Sequence[Line]) -> str:
    return f"Random weights and tokens; {machine(lines)}" if lines else NOTHING


def with_tables(page: str, lines: Sequence[Line]) -> str:
    """The page with its tables made anew."""
    for table, text in tables(lines).items():
        own = [line for line in lines if line["table"] == table]
        begin = f"<!-- {table}: made by benchmarks/gpu/experiments_table.py from benchmarks/gpu/experiments.jsonl -->"
        page = with_block(page, begin, f"<!-- end of {table} -->", f"{text}\n\n{_measured_on(own)}")
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), lines_of(EXPERIMENTS_RESULTS)), encoding="utf-8")
