# In: results/datasets/{dataset}/ of a mixture, and of all suites for their held-out prompts.
# Out: mixtures/{mixture}/ with train and validation.jsonl, card.json.


rule concatenate:
    input:
        datasets=datasets_of_mixture,
        evaluated=datasets_of_suites,
    output:
        mixture=directory(f"{RESULTS}/mixtures/{{mixture}}"),
    params:
        code=code_of("concatenate_mixture.py"),
        name="{mixture}",
        shares=value_at("mixtures/{mixture}/datasets", config),
        seed=value_at("mixtures/{mixture}/seed", config),
    log:
        f"{RESULTS}/logs/concatenate/{{mixture}}.log",
    resources:
        mem_mb=4000,
        runtime=60,
    conda:
        "../envs/concatenate.yaml"
    message:
        "concatenate {wildcards.mixture}: rows weighed and shuffled, held-out prompts left out"
    script:
        "../scripts/concatenate_mixture.py"
