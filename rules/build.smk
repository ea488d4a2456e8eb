# In: nothing but the seed and the steps in the config. Out: results/sources/models/{model}/, a small pre-trained base.


rule build:
    output:
        model=directory("results/sources/models/{model}"),
    wildcard_constraints:
        model="|".join(BUILT) or "^$",
    params:
        code=code_of("build_model.py"),
        build=value_at("models/{model}/source/build", config),
        threads=CPU_THREADS,
    log:
        "results/logs/build/{model}.log",
    threads: CPU_THREADS
    resources:
        mem_mb=2000,
        runtime=30,
    conda:
        "../envs/build.yaml"
    message:
        "build {wildcards.model}: train its tokenizer, pre-train its weights"
    script:
        "../scripts/build_model.py"
