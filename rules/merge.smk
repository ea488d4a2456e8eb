# On request (`snakemake merge`). In: a run's adapter and its base. Out: runs/{run}/merged/, a model that needs neither PEFT nor 4 bits.


rule merge_run:
    input:
        model=model_of,
        adapter=f"{RESULTS}/runs/{{run}}/adapter",
    output:
        merged=directory(f"{RESULTS}/runs/{{run}}/merged"),
    params:
        code=code_of("merge_adapter.py"),
        quantization=value_at("{run}/settings/quantization", RUNS),
        attention=attention_of,
        device=DEVICE,
    log:
        f"{RESULTS}/logs/merge/{{run}}.log",
    resources:
        gpu=GPUS,
        mem_mb=16000 if GPUS else 4000,
        runtime=60,
    conda:
        "../envs/merge.yaml"
    message:
        "merge {wildcards.run}"
    script:
        "../scripts/merge_adapter.py"


rule merge:
    input:
        collect(f"{RESULTS}/runs/{{run}}/merged", run=RUNS),
