"""Train one run in bfloat16 and with FP8 products, seed by seed, and write what each learned as lines of JSON.

    python benchmarks/gpu/parity.py tiny-llama --seeds 1 2 3 --out benchmarks/gpu/parity.jsonl

It needs what the workflow made of its default: results/runs/*/run.json, results/tokens and results/sources/models.
Lines are added to the file at once; several of these may write to one.
"""

import argparse
import gc
import json
import logging
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from clock import Clock, callback
from plan import BF16, BF16_PEFT, PARITY, PARITY_WAYS, Case
from qlora import training
from qlora.files import read_json
from qlora.fused_lora import fuse
from qlora.training import Job, Trainer, make_trainer
from run import gpu, software
from table import Line

RESULTS = Path(__file__).parents[2] / "results"
WARM_UP = 10  # steps that the speed does not count
POINTS = 200  # of a loss curve that is kept: each the mean of as many steps


def job_of(case: Case, results: Path, scratch: Path, device: str) -> Job:
    """What is trained of a case; its folder and seed are each training's own."""
    record = read_json(results / "runs" / case.run / "run.json")
    model = results / "sources/models" / record["model"]
    settings = {**record["settings"], **case.changes, "save_steps": 10**6}
    return Job(
        model=make_model(case.shape, model, scratch / "model", device) if case.shape else model,
        tokens=results / "tokens" / record["model"] / record["mixture"],
        settings=settings,
        seed=record["seed"],
        attention="sdpa",
        device=device,
        batching=settings["batching"],
        folder=scratch / "run",
        tensorboard=str(scratch / "tensorboard"),
    )


def make_model(shape: Mapping[str, int], like: Path, folder: Path, device: str) -> Path:
    """Write a Llama of `shape` with random weights, and the vocabulary and tokenizer of the model in `like`."""
    kept = AutoConfig.from_pretrained(like).to_dict()
    ids = {name: kept[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(LlamaConfig(**shape, **ids), dtype=torch.bfloat16).save_pretrained(folder)
    for path in like.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def trained(job: Job, way: str) -> tuple[Trainer, Line]:
    """A trainer that trained in a way, and what was seen: losses and speed."""
    training.fuse = fuse if way != BF16_PEFT else lambda *_: "PEFT's own computation, asked for"
    settings = {**job.settings, "fp8": way == "fp8"}
    trainer = make_trainer(replace(job, settings=settings, folder=job.folder / way))
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    step = trainer.training_step

    def followed(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(inputs["tokens"].clone())
        losses.append(step(model, inputs, num_items_in_batch).detach().clone())
        return losses[-1].clone()  # the trainer may add to it in place

    trainer.training_step = followed
    steps = job.settings["max_steps"]
    clock = Clock(min(WARM_UP, steps - 1), steps)
    trainer.add_callback(callback(clock))
    trainer.train()
    values = torch.stack(losses).tolist()
    return trainer, {
        "steps": steps,
        "training loss": round(statistics.fmean(values[-max(steps // 5, 1) :]), 5),
        "validation loss": round(trainer.evaluate()["eval_loss"], 5),
        "tokens per second": clock.result(counts)["tokens per second"],
        "computed by": trainer.chosen,
        "losses": [round(value, 4) for value in curve(values)],
    }


def curve(losses: list[float]) -> list[float]:
    """The losses of steps as at most about POINTS means of consecutive ones."""
    width = max(len(losses) // POINTS, 1)
    return [statistics.fmean(losses[start : start + width]) for start in range(0, len(losses), width)]


def compared(job: Job, others: Sequence[str]) -> Iterator[Line]:
    """Train from one seed in bf16, then in `others`; the first trainer evaluates what those learned in bf16 too."""
    judge, line = trained(job, BF16)
    yield {"way": BF16, **line, "validation loss in bf16": line["validation loss"]}
    for way in others:
        trainer, line = trained(job, way)
        yield {"way": way, **line, "validation loss in bf16": judged(judge, trainer)}
        del trainer
        gc.collect()  # a trainer and its parts hold each other


def judged(judge: Trainer, trainer: Trainer) -> float:
    """The validation loss of what `trainer` learned, computed as `judge` does it, whose own adapter is lost."""
    with torch.no_grad():
        for weight, learned in zip(judge.trainable(), trainer.trainable(), strict=True):
            weight.copy_(learned)
    return round(judge.evaluate()["eval_loss"], 5)


def main() -> None:
    """Train a case, and write its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=PARITY)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS, help="what the workflow made")
    parser.add_argument("--out", type=Path, required=True, help="the file of lines that is added to")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    others = [way for way in PARITY_WAYS if way != BF16]
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(PARITY[given.case], given.results, Path(scratch), "cuda")
        for seed in given.seeds:
            for line in compared(replace(job, seed=seed, folder=Path(scratch) / f"run-{seed}"), others):
                whole = {"model": given.case, "seed": seed, **line, **software(), "gpu after": gpu()}
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
