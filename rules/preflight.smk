# In: a base model's config and tokenizer, not its weights. Out: preflight/{model}.json, or one line that says what does
# not fit, before anything expensive runs. The checks are made on a small random copy of the model, on the CPU.
# It has no `code`: nearly everything takes its report, and an edit to a module would run all of that again.


rule preflight:
    input:
        model="results/sources/models/{model}",
    output:
        report=f"{RESULTS}/preflight/{{model}}.json",
    params:
        form=form_of,
        system=system_of,
        with_system=with_system_of,
        attention=attention_of,
        targets=targets_of,
    log:
        f"{RESULTS}/logs/preflight/{{model}}.log",
    resources:
        mem_mb=4000,
        runtime=30,
    conda:
        "../envs/preflight.yaml"
    message:
        "preflight {wildcards.model}"
    script:
        "../scripts/preflight_model.py"
