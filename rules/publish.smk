# On request (`snakemake publish --config publish_to=owner/name`). In: a run's adapter, its record, its metrics. Out: a receipt.
PUBLISH_TO = config["publish_to"]


rule publish_run:
    input:
        adapter=f"{RESULTS}/runs/{{run}}/adapter",
        record=f"{RESULTS}/runs/{{run}}/run.json",
        metrics=f"{RESULTS}/metrics.csv",
    output:
        receipt=f"{RESULTS}/runs/{{run}}/published.json",
    params:
        code=code_of("publish_adapter.py"),
        repository=f"{PUBLISH_TO}-{{run}}" if PUBLISH_TO else "",
        base=base_name_of,
        licence=licence_of,
        private=True,
    log:
        f"{RESULTS}/logs/publish/{{run}}.log",
    resources:
        mem_mb=2000,
        runtime=60,
    conda:
        "../envs/publish.yaml"
    message:
        "publish {wildcards.run}"
    script:
        "../scripts/publish_adapter.py"


rule publish:
    input:
        collect(f"{RESULTS}/runs/{{run}}/published.json", run=RUNS),
