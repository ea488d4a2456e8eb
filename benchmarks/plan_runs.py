"""How long a dry run takes for many runs, beside a bare Snakemake workflow of as many jobs and files.

    .venv/bin/python benchmarks/plan_runs.py --runs 100 300 1000

Nothing is executed. The runs are 10 recipes on as many models as it takes, all on one mixture and one suite; the bare
workflow has the same rules by name, inputs and outputs, and nothing else: no configuration, params or scripts.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("Snakefile", "rules", "scripts", "config", "envs", "profiles", "report", "data")
RECIPES = 10
BARE = """
MODELS = [f"m{{i}}" for i in range({models})]
RUNS = {{f"m{{i}}-r{{j}}": f"m{{i}}" for i in range({models}) for j in range({recipes})}}
def base(wildcards): return f"sources/{{RUNS[wildcards.run]}}"
def tokens(wildcards): return f"tokens/{{RUNS[wildcards.run]}}"
def preflight(wildcards): return f"preflight/{{RUNS[wildcards.run]}}"
DATA = ["sql", "label", "title"]
wildcard_constraints:
    run="|".join(RUNS), model="|".join(MODELS)
rule all:
    input: "report", "metrics.csv", expand("runs/{{run}}/adapter", run=RUNS)
rule download:
    output: directory("sources/{{model}}")
rule data:
    output: directory("data/{{name}}")
rule format:
    input: "data/{{name}}"
    output: directory("datasets/{{name}}")
rule concatenate:
    input: expand("datasets/{{name}}", name=DATA)
    output: directory("mixture")
rule preflight:
    input: "sources/{{model}}"
    output: "preflight/{{model}}"
rule tokenize:
    input: "mixture", "sources/{{model}}", "preflight/{{model}}"
    output: directory("tokens/{{model}}")
rule train:
    input: base, tokens, preflight
    output:
        directory("runs/{{run}}/adapter"),
        expand("runs/{{{{run}}}}/{{name}}", name=["run.json", "training_log.csv", "samples.jsonl"]),
rule predict_base:
    input: "sources/{{model}}", "preflight/{{model}}", expand("datasets/{{name}}", name=DATA)
    output: "predictions/base/{{model}}.jsonl"
rule predict_tuned:
    input: base, "runs/{{run}}/adapter", "runs/{{run}}/run.json", expand("datasets/{{name}}", name=DATA)
    output: "predictions/tuned/{{run}}.jsonl"
rule evaluate_base:
    input: "predictions/base/{{model}}.jsonl", expand("datasets/{{name}}", name=DATA)
    output: "metrics/base/{{model}}.csv", "metrics/base/{{model}}.jsonl"
rule evaluate_tuned:
    input: "predictions/tuned/{{run}}.jsonl", expand("datasets/{{name}}", name=DATA)
    output: "metrics/tuned/{{run}}.csv", "metrics/tuned/{{run}}.jsonl"
rule collect:
    input:
        expand("metrics/base/{{model}}.{{kind}}", model=MODELS, kind=["csv", "jsonl"]),
        expand("metrics/tuned/{{run}}.{{kind}}", run=RUNS, kind=["csv", "jsonl"]),
        expand("runs/{{run}}/training_log.csv", run=RUNS),
    output: "metrics.csv", "comparison.csv"
rule report:
    input:
        "metrics.csv", "comparison.csv", "mixture", expand("datasets/{{name}}", name=DATA),
        expand("predictions/tuned/{{run}}.jsonl", run=RUNS), expand("predictions/base/{{model}}.jsonl", model=MODELS),
        expand("runs/{{run}}/run.json", run=RUNS), expand("runs/{{run}}/training_log.csv", run=RUNS),
    output: "report"
"""


def overlay(runs: int) -> str:
    """A configuration of that many runs, 10 recipes on a tenth as many models."""
    models = [f"m{number}" for number in range(runs // RECIPES)]
    entry = {"source": {"build": {"architecture": "llama"}}, "format": "plain"}
    config = {
        "name": "many",
        "models": dict.fromkeys(models, entry),
        "recipes": {f"r{number}": {"learning_rate": 1e-4 * (number + 1)} for number in range(RECIPES)},
        "runs": [
            {"name": f"{model}-r{number}", "model": model, "mixture": "examples", "recipe": f"r{number}"}
            for model in models
            for number in range(RECIPES)
        ],
    }
    return json.dumps(config)


def planned(folder: Path, *arguments: str) -> tuple[float, int]:
    """Seconds of a dry run, and how many jobs it plans."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", *arguments]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, check=True, text=True, capture_output=True)
    seconds = time.monotonic() - started
    total = re.search(r"^total\s+(\d+)", done.stdout + done.stderr, re.MULTILINE)
    return seconds, int(total[1]) if total else 0


def main() -> None:
    """Time both workflows side by side and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print("| runs | jobs | ours, s | bare jobs | bare, s | ratio |\n|---|---|---|---|---|---|")
    for runs in given.runs:
        with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as bare:
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, Path(ours, name), ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, Path(ours, name))
            Path(ours, "many.yaml").write_text(overlay(runs), encoding="utf-8")
            text = BARE.format(models=runs // RECIPES, recipes=RECIPES)
            Path(bare, "Snakefile").write_text(text, encoding="utf-8")
            pairs = [
                (planned(Path(ours), "--configfile", "many.yaml"), planned(Path(bare), "--cores", "2"))
                for _ in range(given.repeats)
            ]
        (_, jobs), (_, bare_jobs) = pairs[0]
        mine, plain = [pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs]
        ratios = [one / other for one, other in zip(mine, plain, strict=True)]
        cells = [
            f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})" for times in (mine, plain, ratios)
        ]
        print(f"| {runs} | {jobs} | {cells[0]} | {bare_jobs} | {cells[1]} | {cells[2]} |", flush=True)


if __name__ == "__main__":
    main()
