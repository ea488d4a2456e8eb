# In: predictions/{suite}/… and the test rows. Out: metrics/{suite}/{base,tuned}/….csv with intervals, the scores of each row,
# and, joined, metrics.csv, metrics.json and comparison.csv (tuned minus base and minus each baseline).


BOOTSTRAPS = {name: suite["bootstrap"] for name, suite in config["suites"].items()}


rule evaluate_base:
    input:
        predictions=f"{RESULTS}/predictions/{{suite}}/base/{{model}}.jsonl",
        folders=datasets_of,
    output:
        metrics=f"{RESULTS}/metrics/{{suite}}/base/{{model}}.csv",
        scores=f"{RESULTS}/metrics/{{suite}}/base/{{model}}.scores.jsonl",
    params:
        code=code_of("evaluate_predictions.py"),
        datasets=tasks_of,
        suite="{suite}",
        model="{model}",
        baselines=value_at("suites/{suite}/baselines", config),
        bootstrap=value_at("suites/{suite}/bootstrap", config),
    log:
        f"{RESULTS}/logs/evaluate/{{suite}}-base-{{model}}.log",
    resources:
        mem_mb=2000,
        runtime=60,
    conda:
        "../envs/evaluate.yaml"
    message:
        "evaluate {wildcards.suite} of the base {wildcards.model}"
    script:
        "../scripts/evaluate_predictions.py"


rule evaluate_tuned:
    input:
        predictions=f"{RESULTS}/predictions/{{suite}}/tuned/{{run}}.jsonl",
        folders=datasets_of,
    output:
        metrics=f"{RESULTS}/metrics/{{suite}}/tuned/{{run}}.csv",
        scores=f"{RESULTS}/metrics/{{suite}}/tuned/{{run}}.scores.jsonl",
    params:
        code=code_of("evaluate_predictions.py"),
        datasets=tasks_of,
        suite="{suite}",
        run="{run}",
        model=value_at("{run}/model", RUNS),
        mixture=value_at("{run}/mixture", RUNS),
        recipe=value_at("{run}/recipe", RUNS),
        seed=value_at("{run}/seed", RUNS),
        bootstrap=value_at("suites/{suite}/bootstrap", config),
    log:
        f"{RESULTS}/logs/evaluate/{{suite}}-tuned-{{run}}.log",
    resources:
        mem_mb=2000,
        runtime=60,
    conda:
        "../envs/evaluate.yaml"
    message:
        "evaluate {wildcards.suite} of the run {wildcards.run}"
    script:
        "../scripts/evaluate_predictions.py"


rule collect:
    input:
        tables=collect(f"{RESULTS}/metrics/{{subject}}.csv", subject=SUBJECTS),
        scores=collect(f"{RESULTS}/metrics/{{subject}}.scores.jsonl", subject=SUBJECTS),
        training_logs=collect(f"{RESULTS}/runs/{{run}}/training_log.csv", run=RUNS),
    output:
        metrics=f"{RESULTS}/metrics.csv",
        nested=f"{RESULTS}/metrics.json",
        comparison=f"{RESULTS}/comparison.csv",
        training_log=f"{RESULTS}/training_log.csv",
    params:
        code=code_of("collect_metrics.py"),
        bootstraps=BOOTSTRAPS,
    log:
        f"{RESULTS}/logs/evaluate/collect.log",
    resources:
        mem_mb=2000,
        runtime=30,
    conda:
        "../envs/evaluate.yaml"
    message:
        "collect all metrics, and compare each run with its base"
    script:
        "../scripts/collect_metrics.py"
