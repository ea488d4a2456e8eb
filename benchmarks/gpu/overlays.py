"""The runs of the experiments in config/experiments, as a user of them gets them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qlora.config import checked_config, laid_over

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("mistral-text-label", "mistral-law", "llama2-custom", "open-models", "llama2-sql-mix")
BASES = {  # base model → its shape in shapes.py
    "mistral-7b-v0.1": "mistral-7b-v0.1",
    "zephyr-7b-beta": "mistral-7b-v0.1",
    "mistral-7b-instruct-v0.2": "mistral-7b",
    "gemma-2b": "gemma-2b",
    "gemma-7b": "gemma-7b",
    "falcon-7b": "falcon-7b",
    "phi-2": "phi-2",
    "llama-2-7b": "llama-2-7b",
    "llama-2-7b-chat": "llama-2-7b",
}


@dataclass(frozen=True)
class Run:
    """A run of an experiment: what its train job is given."""

    experiment: str
    entry: Mapping[str, Any]  # name, model, mixture, recipe, seed, settings
    form: Mapping[str, str] | None
    system: str
    attention: str
    max_length: int
    threads: int

    @property
    def name(self) -> str:
        """By which it is known in its experiment."""
        return str(self.entry["name"])

    @property
    def shape(self) -> str:
        """The shape of its base."""
        return BASES[self.entry["model"]]


@cache
def configured(experiment: str) -> dict[str, Any]:
    """The whole configuration of an experiment, read as by `snakemake --configfile config/experiments/NAME.yaml`."""
    config: dict[str, Any] = {}
    for name in ("models", "datasets", "config", f"experiments/{experiment}"):
        config = laid_over(config, yaml.safe_load((ROOT / f"config/{name}.yaml").read_text(encoding="utf-8")))
    return checked_config(config)


@cache
def runs_of(experiment: str) -> list[Run]:
    """The runs of an experiment, in its order."""
    config = configured(experiment)
    runs = []
    for entry in config["runs"]:
        model, mixture = config["models"][entry["model"]], config["mixtures"][entry["mixture"]]
        form = config["formats"][model["format"]] if model["format"] else None
        rendered = (form, model["system"], model["attention"])
        runs.append(Run(experiment, entry, *rendered, mixture["max_length"], config["threads"]))
    return runs
