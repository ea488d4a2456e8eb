# On request (`snakemake gguf`). In: a run's merged model. Out: runs/{run}/merged.gguf, by llama.cpp's own converter.


rule gguf_run:
    input:
        merged=f"{RESULTS}/runs/{{run}}/merged",
    output:
        gguf=f"{RESULTS}/runs/{{run}}/merged.gguf",
    params:
        code=code_of("gguf_merged.py"),
    log:
        f"{RESULTS}/logs/gguf/{{run}}.log",
    resources:
        mem_mb=8000,
        runtime=60,
    conda:
        "../envs/gguf.yaml"
    message:
        "convert {wildcards.run} to GGUF"
    script:
        "../scripts/gguf_merged.py"


rule gguf:
    input:
        collect(f"{RESULTS}/runs/{{run}}/merged.gguf", run=RUNS),
