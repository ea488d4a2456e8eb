"""A small random copy of a model, made from its config alone, on which a family's behaviour is checked in seconds."""

import copy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qlora.errors import UserError
from qlora.files import read_json, write_source_record
from qlora.pretrained import loaded, model_config, runs_own_code

LAYERS = 2
HEADS = 2
BLOCK = 64  # weights that share one scale in 4 bits (QLoRA, arXiv 2305.14314, section 4): widths are multiples of it
WIDE = 0.2  # standard deviation of the weights: with the usual 0.02, outputs hardly depend on what stands before them
SEED = 0
MOST_PARAMETERS = 150_000_000  # float32 in memory twice while it is loaded: 1.2 GB; 256,000 tokens × 64 are 16 million
FEED_FORWARD = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")  # names in the configs of families
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def shrunken_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class with two layers, two heads where their width allows it, and narrow layers.

    Kept: the width of a head and so all of the positions' parameters, grouped key and value heads, the kinds of
    layers, vocabulary, special ids, activation, tied weights. Configs inside it (text, vision) are shrunken likewise.
    """
    small = copy.deepcopy(config)
    for part in [small, *(getattr(small, name) for name in small.sub_configs if getattr(small, name) is not None)]:
        if hasattr(part, "num_hidden_layers") and hasattr(part, "num_attention_heads"):
            _shrink(part)
    return type(config).from_dict(small.to_dict())  # builds it anew, so that the family's own checks see it


def _shrink(part: Any) -> None:
    """Make one config, without those inside it, small in place."""
    given = part.to_dict()
    heads, layers = part.num_attention_heads, part.num_hidden_layers
    width = getattr(part, "head_dim", None) or part.hidden_size // heads
    own_width = given.get("head_dim") is not None  # else a head is as wide as the hidden state over the heads
    few = next(number for number in count(HEADS) if number * width % BLOCK == 0)
    for name, values in given.items():
        if isinstance(values, list | tuple) and len(values) == layers:  # a value a layer
            other = next((index for index, value in enumerate(values) if value != values[0]), LAYERS - 1)
            setattr(part, name, [values[0], values[other]])
    for name in KEY_VALUE_HEADS:
        if given.get(name) is not None:
            setattr(part, name, few if given[name] == heads else 1)
    part.num_hidden_layers = LAYERS
    part.num_attention_heads = few
    part.hidden_size = BLOCK * few if own_width else few * width
    for name in FEED_FORWARD:
        if given.get(name) is not None:
            setattr(part, name, 2 * part.hidden_size)
    for name in ("initializer_range", "init_std"):
        if name in given:
            setattr(part, name, WIDE)


def shrunken_model(folder: Path, target: Path) -> Path:
    """Save a random float32 copy, as safetensors, of the model whose config.json lies in `folder`; returns `target`.

    The weights come from a fixed seed. Raises UserError where the config is of no known family or the copy is large.
    """
    config = model_config(folder)
    small = shrunken_config(config)
    network_of = partial(loaded, AutoModelForCausalLM.from_config, dtype=torch.float32)
    with torch.device("meta"):
        parameters = network_of(small).num_parameters()
    if parameters > MOST_PARAMETERS:
        raise UserError(
            f"{folder}: a '{config.model_type}' of {LAYERS} narrow layers still has {parameters:,} weights, too many to"
            f" look at; name another model in models.{folder.name}.source"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = network_of(small)
    network.save_pretrained(target)
    if runs_own_code(folder):
        write_source_record(target, read_json(folder / "source.json")["source"])
    return target
