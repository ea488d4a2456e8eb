"""The trainable part: LoRA matrices beside the frozen 4-bit layers, and the variants that a recipe can name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import Linear4bit
from transformers import AutoModelForCausalLM

from qlora.pretrained import loaded


def lora_config(lora: Mapping[str, Any]) -> LoraConfig:
    """A recipe's `lora` in PEFT's terms. LoftQ begins as plain LoRA: `start_from_rounding` then sets its weights."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        bias=lora["bias"],
        target_modules=lora["target_modules"],
        use_rslora=lora["rslora"],
        use_dora=lora["dora"],
        init_lora_weights="gaussian" if lora["init"] == "gaussian" else True,
    )


@torch.no_grad()
def start_from_rounding(network: PeftModel, model: Path) -> None:
    """Set A and B so that scaling · B A is the best rank-r correction of what 4 bits lost (LoftQ, arXiv 2310.08659).

    One pass of its algorithm 1: the quantised base stays as it is. The unquantised weights are those of the folder
    `model`, held in memory meanwhile. (PEFT's own function wants a GPU, and leaves the scaling out.)
    """
    exact = loaded(AutoModelForCausalLM.from_pretrained, model, dtype="auto")
    for name, layer in network.get_base_model().named_modules():
        if isinstance(layer, Linear4bit):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            lost = exact.get_parameter(f"{name}.weight").to(a.device, torch.float32) - rounded.float()
            left, strengths, right = torch.linalg.svd(lost, full_matrices=False)
            root = (strengths[: len(a)] / layer.scaling["default"]).sqrt()
            b.copy_(left[:, : len(a)] * root)
            a.copy_(root[:, None] * right[: len(a)])


def loraplus_optimizer(
    network: PeftModel, kind: type[torch.optim.Optimizer], options: Mapping[str, Any], ratio: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser whose learning rate is `ratio` times as high for B as for A (LoRA+, arXiv 2402.12354)."""
    return create_loraplus_optimizer(
        network, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **options
    )


def lorentzian_penalty(weights: Iterable[torch.Tensor], gamma: float) -> torch.Tensor:
    """Σ log(1 + (w/gamma)²) over all entries, a scalar: the negative logarithm of a Cauchy prior on each weight.

    It pulls small weights to zero like weight decay does, and leaves large ones nearly alone.
    """
    return torch.stack([torch.log1p((weight / gamma).square()).sum() for weight in weights]).sum()
