# In: mixtures/{mixture}/, a base model's tokenizer, and its preflight: nothing is made for a model that fails it.
# Out: tokens/{model}/{mixture}/ with ids and labels as Arrow, card.json.


rule tokenize:
    input:
        mixture=f"{RESULTS}/mixtures/{{mixture}}",
        model="results/sources/models/{model}",
        preflight=f"{RESULTS}/preflight/{{model}}.json",
    output:
        tokens=directory(f"{RESULTS}/tokens/{{model}}/{{mixture}}"),
    params:
        code=code_of("tokenize_mixture.py"),
        form=form_of,
        system=system_of,
        max_length=value_at("mixtures/{mixture}/max_length", config),
        overlong=value_at("mixtures/{mixture}/overlong", config),
        lossy=value_at("mixtures/{mixture}/lossy", config),
        threads=CPU_THREADS,
    log:
        f"{RESULTS}/logs/tokenize/{{model}}-{{mixture}}.log",
    threads: CPU_THREADS
    resources:
        mem_mb=4000,
        runtime=120,
    conda:
        "../envs/tokenize.yaml"
    message:
        "tokenize {wildcards.mixture} for {wildcards.model}"
    script:
        "../scripts/tokenize_mixture.py"
