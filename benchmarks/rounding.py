"""What rounding costs a run at a learning rate: four ways to compute LoRA on a CPU, as lines of JSON.

    python benchmarks/rounding.py --learning-rates 2e-5 2e-4 --seeds 1 2 3 --steps 150 --out rounding.jsonl

`float32` is what the others are held to. In bfloat16 a product with the adapter stands beside that with the weight
(`beside`), or the adapter is added to the weight, rounded once, as kernels do on a GPU (`added`); `peft` is PEFT's own
computation. It needs what the workflow made of its default: run llama, its rows and its base model.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit

sys.path += [str(Path(__file__).parents[1] / "scripts"), str(Path(__file__).parent / "gpu")]
from parity import RESULTS, job_of
from plan import PARITY
from qlora import fused_lora, nf4, training
from qlora.nf4 import Adapter
from qlora.training import Job, make_trainer

FUSE = fused_lora.fuse
WAYS = ("float32", "beside", "added", "peft")


def whole(weight: Params4bit, dtype: torch.dtype, adapter: Adapter | None = None) -> torch.Tensor:
    """The weight with its adapter, summed in float32 and rounded once, as `nf4_triton.add_adapter` gives it."""
    plain = dequantize_4bit(weight.data, weight.quant_state)
    return plain.to(dtype) if adapter is None else (plain.float() + adapter[0].float() @ adapter[1].float()).to(dtype)


def validation_loss(job: Job, way: str) -> float:
    """The loss on the validation rows after a run's last step, in nats a token."""
    added = way == "added"
    fused_lora.can_add = (lambda _: True) if added else nf4.can_add
    fused_lora.dequantized = whole if added else nf4.dequantized
    training.fuse = lambda network, *_: "PEFT's own" if way == "peft" else FUSE(network)  # whatever the learning rate
    dtype = "float32" if way == "float32" else "bfloat16"
    quantization: Mapping[str, Any] = {**job.settings["quantization"], "compute_dtype": dtype}
    trainer = make_trainer(replace(job, settings={**job.settings, "quantization": quantization}))
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


def main() -> None:
    """Train in each way, and write the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True, help="the file of lines that is added to")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for rate in given.learning_rates:
        for seed in given.seeds:
            for way in WAYS:
                with tempfile.TemporaryDirectory() as scratch:
                    job = job_of(PARITY["tiny-llama"], RESULTS, Path(scratch), "cpu")
                    short = {"learning_rate": rate, "max_steps": given.steps, "eval_steps": None, "samples": 0}
                    loss = validation_loss(replace(job, settings={**job.settings, **short}, seed=seed), way)
                line = {"learning rate": rate, "seed": seed, "way": way, "validation loss": round(loss, 5)}
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
