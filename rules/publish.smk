# On request (`snakemake publish --config publish_to=owner/name`). In: a run's adapter or merged model, its record, its metrics.
# Out: a receipt with the commit; with publish_dry_run=true what would be sent.
import time

PUBLISH_TO = config["publish_to"]
DRY_RUN = config["publish_dry_run"]
WHAT = "merged" if config["merged"] else "adapter"
SENT_AS = f"{PUBLISH_TO}-{{run}}-merged" if config["merged"] else f"{PUBLISH_TO}-{{run}}"


rule publish_run:
    input:
        weights=f"{RESULTS}/runs/{{run}}/{WHAT}",
        model=model_of,
        record=f"{RESULTS}/runs/{{run}}/run.json",
        metrics=f"{RESULTS}/metrics.csv",
    output:
        receipt=f"{RESULTS}/runs/{{run}}/{'preview.txt' if DRY_RUN else f'published-{WHAT}.json'}",
    params:
        code=code_of("publish_adapter.py"),
        repository=SENT_AS if PUBLISH_TO else "",
        base=base_name_of,
        sources=sources_of,
        commands=commands_of,
        private=config["publish_private"],
        dry_run=DRY_RUN,
        asked=time.time() if DRY_RUN else None,  # a dry run is shown each time it is asked for
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
        collect(rules.publish_run.output.receipt, run=RUNS),
