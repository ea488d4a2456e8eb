# In: results/sources/datasets/{dataset}/. Out: results/datasets/{dataset}/ with train, validation and test.jsonl, card.json.


rule format:
    input:
        source="results/sources/datasets/{dataset}",
    output:
        dataset=directory("results/datasets/{dataset}"),
    params:
        code=code_of("format_dataset.py"),
        name="{dataset}",
        settings=value_at("datasets/{dataset}", config),
    log:
        "results/logs/format/{dataset}.log",
    resources:
        mem_mb=4000,
        runtime=60,
    conda:
        "../envs/format.yaml"
    message:
        "format {wildcards.dataset}: rows become conversations, split and counted"
    script:
        "../scripts/format_dataset.py"
