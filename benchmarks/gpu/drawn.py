"""Make a job's folder as training leaves it, with an adapter that is drawn at random: where no GPU can train one.

    python benchmarks/gpu/drawn.py FOLDER --base BASE

BASE is what base.py makes. What it takes to merge and to chat is the same; what is answered has no meaning.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import get_peft_model

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from overlays import runs_of
from qlora.adapters import lora_config
from qlora.files import read_json, write_json
from qlora.record import commit, hardware, versions
from qlora.streamed import empty_network
from train_run import write_adapter

SPREAD = 0.01  # standard deviation of A, about as PEFT begins at a width of 4,096, and of B, as of some hundred steps


def make_job(experiment: str, base: Path, job: Path) -> None:
    """Write `adapter` and run.json of the one run of an experiment, after no step."""
    [run] = runs_of(experiment)
    settings = run.entry["settings"]
    network = get_peft_model(empty_network(base, torch.float32), lora_config(settings["lora"]), low_cpu_mem_usage=True)
    torch.manual_seed(run.entry["seed"])
    learned = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    drawn = {name: torch.empty(weight.shape).normal_(std=SPREAD) for name, weight in learned.items()}
    network.load_state_dict(drawn, strict=False, assign=True)
    write_adapter(SimpleNamespace(model=network), job / "adapter")
    source = read_json(base / "source.json")
    files = {name: file["sha256"] for name, file in source["files"].items()}
    write_json(
        job / "run.json",
        {
            **run.entry,
            "prompt": {"format": run.form, "system": run.system},
            "attention": run.attention,
            "pins": {"model": {"source": source["source"], "files": files}},
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware("cpu", run.threads),
            "steps": 0,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experiment", default="llama2-sql-mix", help="whose LoRA settings it has")
    given = parser.parse_args()
    make_job(given.experiment, given.base, given.job)
    print(json.dumps({"made": str(given.job)}))
