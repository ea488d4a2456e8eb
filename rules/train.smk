# In: a base model, its preflight and a tokenised mixture. Out: runs/{run}/ with adapter/, run.json, training_log.csv, samples.jsonl.
# Checkpoints lie outside, since Snakemake deletes declared outputs before a job.


rule train:
    input:
        model=model_of,
        tokens=tokens_of,
        preflight=preflight_of,
    output:
        adapter=directory(f"{RESULTS}/runs/{{run}}/adapter"),
        record=f"{RESULTS}/runs/{{run}}/run.json",
        training_log=f"{RESULTS}/runs/{{run}}/training_log.csv",
        samples=f"{RESULTS}/runs/{{run}}/samples.jsonl",
    params:
        code=code_of("train_run.py"),
        run=value_at("{run}", RUNS),
        form=form_of,
        system=system_of,
        attention=attention_of,
        device=DEVICE,
        threads=CPU_THREADS,
        checkpoints="results/checkpoints",
        finished=FINISHED,
        tensorboard=f"{RESULTS}/logs/tensorboard/{{run}}",
    log:
        f"{RESULTS}/logs/train/{{run}}.log",
    threads: CPU_THREADS
    resources:
        gpu=GPUS,
        mem_mb=lambda wildcards, attempt: (16000 if GPUS else 4000) * attempt,
        runtime=lambda wildcards, attempt: 720 * attempt,
    conda:
        "../envs/train.yaml"
    message:
        "train {wildcards.run}"
    script:
        "../scripts/train_run.py"
