"""Loading a base model in 4 bits, checked: what is asked for is what is there."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.falcon import modeling_falcon

from qlora.errors import UserError
from qlora.pretrained import loaded

log = logging.getLogger("qlora")


def compute_dtype(wanted: str, device: str) -> torch.dtype:
    """The dtype of the products; `auto` is bfloat16 on CUDA cards that have it, float16 on others, float32 on CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_quantized(folder: Path, quantization: Mapping[str, Any], device: str, attention: str) -> PreTrainedModel:
    """The frozen base in 4 bits (QLoRA, arXiv 2305.14314, section 3), refused where no layer was quantised.

    `quantization` is the config's entry: type, double, compute_dtype. Raises UserError where no layer was quantised.
    """
    dtype = compute_dtype(quantization["compute_dtype"], device)
    use_plain_linear_in_falcon()
    model = loaded(
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=dtype,
        attn_implementation=attention,
        device_map={"": device},
        quantization_config=in_4_bits(quantization, dtype),
    )
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    if not layers:
        raise UserError(f"{folder}: no layer was quantised to 4 bits; are its linear layers of a class of their own?")
    for layer in layers:
        # This path repacks weights in an eval-mode forward, and gradients are wrong from then on (bitsandbytes 0.50.2).
        layer.support_avx512bf16_for_cpu = False
    log.info(
        "%s: %d layers in 4 bits (%s), products in %s on %s", folder, len(layers), quantization["type"], dtype, device
    )
    return model


def in_4_bits(quantization: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """The config's entry (type, double) as transformers and bitsandbytes take it, with products in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization["type"],
        bnb_4bit_use_double_quant=quantization["double"],
        bnb_4bit_compute_dtype=dtype,
    )


def use_plain_linear_in_falcon() -> None:
    """Transformers quantises layers whose type is exactly nn.Linear, and Falcon's is a subclass that adds nothing."""
    modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[misc, assignment]


def set_threads(threads: int, device: str) -> None:
    """On a CPU the number of threads decides the order of sums, so it comes from the config and not from --cores."""
    if device == "cpu":
        torch.set_num_threads(threads)
