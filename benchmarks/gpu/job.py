"""Train one run of an experiment on random weights, in this process alone, and print a line of JSON.

    python benchmarks/gpu/job.py llama2-sql-mix llama2-sql-mix ours --folder FOLDER --rows NAME --out OUT --steps 20

FOLDER holds the base under `model` (base.py) and the tokenised rows under `rows-NAME`. The job is that of the
workflow's rule `train`, from the start of the process to the written adapter, run.json and all, without evaluations.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from overlays import Run, runs_of
from watch import Watch

WAYS = {  # what a way changes in the settings; None: all rows once
    "ours": {},
    "ours-rows": {"max_steps": None},  # as it comes, each row once, in however few packed steps
    "ours-steps": {"max_steps": None, "batching": "grouped"},  # as many rows a step as the notebook
    "notebook": {},
}
WARM_UP = 4  # steps


def ours(given: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The train job, but for what the way changes, watched."""
    import train_run
    from qlora.files import read_json, write_json
    from qlora.results import read_table

    settings = {**run.entry["settings"], "max_steps": given.steps, "eval_steps": None, "epochs": 1, **WAYS[given.way]}
    if given.dtype:
        settings["quantization"] = {**settings["quantization"], "compute_dtype": given.dtype}
    watches: list[Watch] = []
    make_trainer = train_run.make_trainer

    def watched(*job: Any) -> Any:
        trainer = make_trainer(*job)
        watches.append(Watch(lambda: trainer.counter().tokens, lambda: age(given), WARM_UP, given.seconds))
        trainer.add_callback(watches[0])
        return trainer

    train_run.make_trainer = watched
    model = given.folder / "model"
    preflight = given.out / "preflight.json"
    packs = read_json(model / "config.json")["model_type"] != "falcon"  # as the preflight finds
    write_json(preflight, {"model": model.name, "packs": packs})
    train_run.train_run(
        model=model,
        tokens=given.folder / f"rows-{given.rows}",
        preflight=preflight,
        adapter=given.out / "adapter",
        record=given.out / "run.json",
        training_log=given.out / "training_log.csv",
        samples=given.out / "samples.jsonl",
        run={**run.entry, "settings": settings},
        form=run.form,
        system=run.system,
        attention=run.attention,
        device=given.device,
        threads=run.threads,
        code="benchmark",
        checkpoints=str(given.out / "checkpoints"),
        finished=str(given.out / "finished"),
        tensorboard=str(given.out / "tensorboard"),
    )
    seconds = age(given)
    record = read_json(given.out / "run.json")
    losses = [row["loss"] for row in read_table(given.out / "training_log.csv") if row["loss"]]
    return {
        "seconds of the job": round(seconds, 1),
        **watches[0].figures(),
        "computed by": [*record["computed by"], f"batches {record['batching']}"],
        "last loss": losses[-1] if losses else None,
    }


def notebook(given: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The same model, rows, LoRA, optimiser, batch and accumulation in a notebook's way: see peers.notebook_trainer."""
    import torch
    from transformers import BitsAndBytesConfig

    import peers

    settings = run.entry["settings"]
    lora = settings["lora"]
    given = argparse.Namespace(
        **vars(given),
        checkpointing=settings["checkpointing"],
        dropout=lora["dropout"],
        rank=lora["r"],
        alpha=lora["alpha"],
        targets=",".join(lora["target_modules"]),
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    common = {
        "output_dir": str(given.out),
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": settings["accumulation"],
        "num_train_epochs": 1,
        "learning_rate": settings["learning_rate"],
        "gradient_checkpointing": settings["checkpointing"],
        "bf16": True,
        "use_cpu": given.device == "cpu",
        "optim": settings["optimizer"],
        "logging_steps": settings["log_steps"],
        "report_to": [],
        "save_strategy": "no",
        "seed": run.entry["seed"],
    }
    device = 0 if given.device == "cuda" else given.device
    trainer = peers.notebook_trainer(given, common, quantization_config=nf4, device_map={"": device})
    counts: list[torch.Tensor] = []
    peers.count_tokens(trainer, counts)
    watch = Watch(lambda: int(sum(counts)), lambda: age(given), WARM_UP, given.seconds)
    trainer.add_callback(watch)
    trainer.train()
    trainer.model.save_pretrained(given.out / "adapter")
    return {"seconds of the job": round(age(given), 1), **watch.figures(), "computed by": []}


def age(given: argparse.Namespace) -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - given.started


def main() -> None:
    """Train, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("run")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, as results/runs/RUN")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps, where the way does not say")
    parser.add_argument("--seconds", type=float, default=1e9, help="age of the process after which training ends")
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was, in seconds of Unix")
    parser.add_argument("--dtype", help="of the products, where it is not the recipe's own")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    [run] = [found for found in runs_of(given.experiment) if found.name == given.run]
    print(json.dumps(notebook(given, run) if given.way == "notebook" else ours(given, run)))


if __name__ == "__main__":
    main()
