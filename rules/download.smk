# In: a pinned hub repository, or local files. Out: results/sources/{models,datasets}/{name}/ with source.json.
ruleorder: build > download_model


rule download_model:
    input:
        local=local_files_of_model,
    output:
        folder=directory("results/sources/models/{model}"),
    params:
        code=code_of("download_source.py"),
        kind="models",
        name="{model}",
        source=value_at("models/{model}/source", config),
        patterns=needed_files_of("models"),
        lock="config/sources.lock.yaml",  # no input: a source that is here stays when another one is pinned
    log:
        "results/logs/download/model-{model}.log",
    resources:
        mem_mb=2000,
        runtime=240,
    conda:
        "../envs/download.yaml"
    message:
        "download model {wildcards.model}"
    script:
        "../scripts/download_source.py"


rule download_dataset:
    input:
        local=local_files_of_dataset,
    output:
        folder=directory("results/sources/datasets/{dataset}"),
    params:
        code=code_of("download_source.py"),
        kind="datasets",
        name="{dataset}",
        source=value_at("datasets/{dataset}/source", config),
        patterns=needed_files_of("datasets"),
        lock="config/sources.lock.yaml",
    log:
        "results/logs/download/dataset-{dataset}.log",
    resources:
        mem_mb=2000,
        runtime=120,
    conda:
        "../envs/download.yaml"
    message:
        "download dataset {wildcards.dataset}"
    script:
        "../scripts/download_source.py"
