# On request (`snakemake export --config to=FOLDER`). In: a run's adapter, its record, its metrics, its merged model.
# Out: a copy in FOLDER/{run}, and a receipt here: Snakemake deletes what a rule declares, so the copy is none of its outputs.
import time


rule export_run:
    input:
        unpack(merged_of),
        adapter=f"{RESULTS}/runs/{{run}}/adapter",
        model=model_of,
        record=f"{RESULTS}/runs/{{run}}/run.json",
        metrics=f"{RESULTS}/metrics.csv",
    output:
        receipt=f"{RESULTS}/runs/{{run}}/exported.json",
    params:
        code=code_of("export_run.py"),
        to=config["to"],
        base=base_name_of,
        sources=sources_of,
        commands=commands_of,
        asked=time.time(),  # a copy is made each time it is asked for: Snakemake does not see whether it is still there
    log:
        f"{RESULTS}/logs/export/{{run}}.log",
    resources:
        mem_mb=2000,
        runtime=60,
    conda:
        "../envs/export.yaml"
    message:
        "export {wildcards.run}"
    script:
        "../scripts/export_run.py"


rule export:
    input:
        collect(f"{RESULTS}/runs/{{run}}/exported.json", run=RUNS),
