# In: all metrics, predictions, cards and records. Out: report/index.html, one file that opens offline.


TEMPLATES = ["report/index.html.j2", *sorted(map(str, Path("report").glob("[!.]*")))]


rule report:
    input:
        metrics=f"{RESULTS}/metrics.csv",
        comparison=f"{RESULTS}/comparison.csv",
        predictions=collect(f"{RESULTS}/predictions/{{subject}}.jsonl", subject=SUBJECTS),
        scores=collect(f"{RESULTS}/metrics/{{subject}}.scores.jsonl", subject=SUBJECTS),
        datasets=collect("results/datasets/{dataset}", dataset=used("datasets")),
        mixtures=collect(f"{RESULTS}/mixtures/{{mixture}}", mixture=used("mixtures")),
        records=collect(f"{RESULTS}/runs/{{run}}/run.json", run=RUNS),
        training_logs=collect(f"{RESULTS}/runs/{{run}}/training_log.csv", run=RUNS),
        templates=TEMPLATES,
    output:
        report=f"{RESULTS}/report/index.html",
    params:
        code=code_of("report_results.py"),
        title=config["title"],
        bootstraps=BOOTSTRAPS,
        sources=licensed(used("models"), used("datasets")),
    log:
        f"{RESULTS}/logs/report.log",
    resources:
        mem_mb=2000,
        runtime=30,
    conda:
        "../envs/report.yaml"
    message:
        "write the report"
    script:
        "../scripts/report_results.py"
