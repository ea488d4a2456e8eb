# In: a base model, or a run's adapter on it, and the test rows of a suite. Out: predictions/{suite}/{base,tuned}/….jsonl.


rule predict_base:
    input:
        model="results/sources/models/{model}",
        preflight=f"{RESULTS}/preflight/{{model}}.json",
        datasets=datasets_of,
    output:
        predictions=f"{RESULTS}/predictions/{{suite}}/base/{{model}}.jsonl",
    params:
        code=code_of("predict_rows.py"),
        adapter=None,
        record=None,
        form=form_of,
        system=system_of,
        quantization=value_at("suites/{suite}/quantization", config),
        attention=attention_of,
        shots=shots_of,
        overlong=value_at("suites/{suite}/overlong", config),
        max_new_tokens=value_at("suites/{suite}/max_new_tokens", config),
        batch_size=value_at("suites/{suite}/batch_size", config),
        device=DEVICE,
        threads=CPU_THREADS,
    log:
        f"{RESULTS}/logs/predict/{{suite}}-base-{{model}}.log",
    threads: CPU_THREADS
    resources:
        gpu=GPUS,
        mem_mb=16000 if GPUS else 4000,
        runtime=240,
    conda:
        "../envs/predict.yaml"
    message:
        "predict {wildcards.suite} with the base {wildcards.model}"
    script:
        "../scripts/predict_rows.py"


rule predict_tuned:
    input:
        model=model_of,
        adapter=f"{RESULTS}/runs/{{run}}/adapter",
        record=f"{RESULTS}/runs/{{run}}/run.json",
        datasets=datasets_of,
    output:
        predictions=f"{RESULTS}/predictions/{{suite}}/tuned/{{run}}.jsonl",
    params:
        code=code_of("predict_rows.py"),
        form=form_of,
        system=system_of,
        quantization=value_at("{run}/settings/quantization", RUNS),
        attention=attention_of,
        shots=0,
        overlong=value_at("suites/{suite}/overlong", config),
        max_new_tokens=value_at("suites/{suite}/max_new_tokens", config),
        batch_size=value_at("suites/{suite}/batch_size", config),
        device=DEVICE,
        threads=CPU_THREADS,
    log:
        f"{RESULTS}/logs/predict/{{suite}}-tuned-{{run}}.log",
    threads: CPU_THREADS
    resources:
        gpu=GPUS,
        mem_mb=16000 if GPUS else 4000,
        runtime=240,
    conda:
        "../envs/predict.yaml"
    message:
        "predict {wildcards.suite} with the run {wildcards.run}"
    script:
        "../scripts/predict_rows.py"
