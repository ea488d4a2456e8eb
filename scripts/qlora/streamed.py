"""A base model's weights, one at a time, as training had them: those that were in 4 bits come out dequantised."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora.errors import UserError
from qlora.files import read_json
from qlora.models import compute_dtype, in_4_bits, use_plain_linear_in_falcon
from qlora.pretrained import loaded, model_config

Weights = Iterator[tuple[str, torch.Tensor]]  # by the name that it has in the network
ADAPTED = "base_model.model."  # stands before the names in an adapter's file
FILED = {  # what a layer calls the parts of its adapter → what the file calls them
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",  # DoRA
}
log = logging.getLogger("qlora")


def merged_weights(model: Path, adapter: Path, quantization: Mapping[str, Any], device: str) -> Weights:
    """The weights of the dequantised base with the adapter added, in the precision of the products.

    PEFT merges, a layer at a time, so whatever variant of LoRA it trained is added as it is defined there.
    """
    empty = empty_network(model, compute_dtype(quantization["compute_dtype"], device))
    network = get_peft_model(empty, PeftConfig.from_pretrained(str(adapter)), low_cpu_mem_usage=True).get_base_model()
    learned = {
        name.removeprefix(ADAPTED).replace(".base_layer.", "."): weight
        for name, weight in load_peft_weights(str(adapter), device=device).items()
    }
    for name, weight in dequantized_weights(model, quantization, device):
        path, _, leaf = name.rpartition(".")
        layer = network.get_submodule(path)
        if name in learned:  # a bias
            yield name, learned[name].to(weight.dtype)
        elif leaf == "weight" and isinstance(layer, LoraLayer):
            matrices = {part: learned[f"{path}.{file}"] for part, file in FILED.items() if f"{path}.{file}" in learned}
            yield name, merged_layer(layer, weight, matrices)
        else:
            yield name, weight


def merged_layer(layer: Any, weight: torch.Tensor, matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A layer's weight with what its adapter adds; the layer holds both no longer than that."""
    base = layer.get_base_layer()
    empty = {name: parameter.data for name, parameter in layer.named_parameters() if name in matrices}
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    keys = layer.load_state_dict({name: part.float() for name, part in matrices.items()}, strict=False, assign=True)
    if absent := [name for name in keys.missing_keys if name.startswith("lora_")]:
        # PEFT would add nothing, and say nothing.
        raise UserError(f"the adapter has no {absent[0]} for one of its layers; train its run anew")
    layer.merge(safe_merge=True)
    merged: torch.Tensor = base.weight.data
    base.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    layer.load_state_dict(empty, strict=False, assign=True)
    return merged


def dequantized_weights(model: Path, quantization: Mapping[str, Any], device: str) -> Weights:
    """The weights of `load_quantized(model, …).dequantize()`, byte for byte, without ever holding two of them.

    Raises UserError as `named_weights` does.
    """
    network = empty_network(model, compute_dtype(quantization["compute_dtype"], device))
    dequantized = rounding(network, quantization, device)
    for name, weight in named_weights(model, network):
        yield name, dequantized(name, weight)


def rounding(
    network: PreTrainedModel, quantization: Mapping[str, Any], device: str
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Replace layers of an empty network by 4-bit ones; returns what makes of a weight, by its name, its rounded value.

    transformers and bitsandbytes decide which layers, and how. Other weights come out in the precision of the products.
    """
    dtype = compute_dtype(quantization["compute_dtype"], device)
    quantizer = AutoHfQuantizer.from_config(in_4_bits(quantization, dtype), pre_quantized=False)
    quantizer.preprocess_model(network, device_map={"": device})
    to_4_bits = Bnb4bitQuantize(quantizer)

    def dequantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        held = weight.to(device, dtype)
        if not quantizer.param_needs_quantization(network, name):
            return held
        packed: Any = to_4_bits.convert({name: [held]}, model=network)[name]
        return dequantize_4bit(packed.data, packed.quant_state)

    return dequantized


def tuned_network(
    model: Path, adapter: Path, quantization: Mapping[str, Any], device: str, attention: str
) -> PeftModel:
    """The network of `load_quantized` with its adapter, whose layers are rounded to 4 bits while they compute.

    In between, their weights are the files' own pages: memory that can be given up at any time. Logits are the same in
    32 bits; in 16, PEFT rounds a layer's sum once here, and twice where the layer stays in 4 bits.
    """
    shapes = empty_network(model, compute_dtype(quantization["compute_dtype"], device))
    dequantized = rounding(shapes, quantization, device)
    rounded = {f"{path}.weight" for path, layer in shapes.named_modules() if isinstance(layer, Linear4bit)}
    network = filled_network(
        model, device, attention, lambda name, weight: weight if name in rounded else dequantized(name, weight)
    )
    tuned: PeftModel = PeftModel.from_pretrained(network, adapter)
    for name, learned in tuned.named_parameters():
        if "lora_" in name:  # PEFT puts it where its layer's weight is
            learned.data = learned.data.to(device)
    adapted = {layer.get_base_layer(): layer for layer in network.modules() if isinstance(layer, LoraLayer)}
    for path, layer in network.named_modules():
        name = f"{path.removesuffix('.base_layer')}.weight"
        if name in rounded and not isinstance(layer, LoraLayer):
            # DoRA reads the weight outside of the layer that has it.
            change_while_computing(adapted.get(layer, layer), layer, partial(dequantized, name))
    return tuned


def change_while_computing(whole: torch.nn.Module, layer: Any, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a layer have a changed weight while `whole`, the layer itself or what it is a part of, computes."""
    stored = layer.weight

    def take(*_: Any) -> None:
        layer.weight = torch.nn.Parameter(changed(stored.data), requires_grad=False)

    def leave(*_: Any) -> None:
        layer.weight = stored

    whole.register_forward_pre_hook(take)
    whole.register_forward_hook(leave)


def mapped_network(model: Path, attention: str) -> PreTrainedModel:
    """The network of a folder, whose weights are its files' own pages: memory that can be given up at any time."""
    return filled_network(model, "cpu", attention, lambda _, weight: weight)


def filled_network(
    model: Path, device: str, attention: str, changed: Callable[[str, torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """The network of a folder, with its buffers on the device, and its weights as `changed` gives them."""
    use_plain_linear_in_falcon()
    config = model_config(model)
    with torch.device(device), init_empty_weights(include_buffers=False):
        network = loaded(AutoModelForCausalLM.from_config, config, dtype=config.dtype, attn_implementation=attention)
    weights = {name: changed(name, weight) for name, weight in named_weights(model, network)}
    network.load_state_dict(weights, strict=False, assign=True)
    network.tie_weights()
    return network


def named_weights(model: Path, network: PreTrainedModel) -> Weights:
    """The weights in a model's files, by the names that they have in its network.

    Raises UserError where a family's weights are put together while they are loaded, or where one is missing.
    """
    changes = get_model_conversion_mapping(network)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    if network._keep_in_fp32_modules or len(renamings) < len(changes):
        raise UserError(
            f"{model}: weights of the family {network.config.model_type} are changed while they are loaded, so they"
            " cannot be merged one at a time; load base and adapter with PEFT, and use merge_and_unload"
        )
    known = network.state_dict()
    missing = known.keys() - network.all_tied_weights_keys.keys()
    for stored, weight in stored_weights(model):
        name, _ = rename_source_key(stored, renamings, [], network.base_model_prefix, known)
        if name not in known:
            log.info("%s: %s is no weight of the model, and left out", model, stored)
            continue
        missing.discard(name)
        yield name, weight
    if missing:
        raise UserError(f"{model}: the weight {min(missing)} is in none of its files; download the model anew")


def empty_network(model: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The network of a model's config, whose weights have shapes alone."""
    use_plain_linear_in_falcon()
    with torch.device("meta"):
        return loaded(AutoModelForCausalLM.from_config, model_config(model), dtype=dtype)


def stored_weights(model: Path) -> Weights:
    """The weights in a model's safetensors, by the names there, file by file."""
    whole, index = model / SAFE_WEIGHTS_NAME, model / SAFE_WEIGHTS_INDEX_NAME
    files = [whole] if whole.exists() else sorted({model / name for name in read_json(index)["weight_map"].values()})
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                yield name, weights.get_tensor(name)
