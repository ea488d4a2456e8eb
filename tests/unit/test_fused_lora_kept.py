"""What the fused LoRA operation keeps for the way back, and how often it makes a 4-bit weight whole."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_fused_lora import DEVICE, EXACT, HALF, IDS, adapted
from tiny_models import layers_in_4_bits, make_base
from torch.autograd.graph import saved_tensors_hooks

from qlora import fused_lora
from qlora.fused_lora import fuse

WIDE = 96  # the intermediate width, which nothing else here has
NODES = {"GatedMlpBackward", "ProductsBackward"}


def nodes_behind(output: torch.Tensor) -> Iterator[Any]:
    """The nodes of the graph that made `output`."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
            yield node


def kept_by_a_layer(network: PeftModel) -> list[torch.Tensor]:
    """What one forward of the second decoder layer keeps, each storage once, without the network's own weights."""
    layer, kept = network.get_base_model().model.layers[1], []
    original = layer.forward

    def forward(*args: Any, **rest: Any) -> torch.Tensor:
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            output: torch.Tensor = original(*args, **rest)
        return output

    layer.forward = forward
    half = network.get_base_model().dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        network(input_ids=IDS.to(DEVICE))
    layer.forward = original
    weights = {weight.data_ptr() for weight in network.parameters()}
    by_place = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept}
    return [tensor for place, tensor in by_place.items() if place not in weights]


def sizes(tensors: list[torch.Tensor]) -> int:
    """In bytes."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def wide(tensors: list[torch.Tensor]) -> int:
    """How many of them have the intermediate width for each token."""
    return sum(tensor.shape[-1] == WIDE and tensor.numel() == IDS.numel() * WIDE for tensor in tensors)


@pytest.mark.parametrize("quantization", [EXACT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_of_the_wide_tensors_two_are_kept_and_less_than_by_peft(
    quantization: dict[str, object], dropout: float, tmp_path: Path
) -> None:
    base = make_base(tmp_path, intermediate_size=WIDE)
    plain, fused = (adapted(base, quantization, dropout=dropout) for _ in range(2))
    fuse(fused)
    of_peft, ours = kept_by_a_layer(plain), kept_by_a_layer(fused)
    assert wide(ours) == 2 < wide(of_peft)
    assert sizes(ours) < sizes(of_peft)


def test_nothing_is_kept_where_the_count_above_does_not_look(tmp_path: Path) -> None:
    network = adapted(make_base(tmp_path), EXACT)
    fuse(network)
    own = [node for node in nodes_behind(network(input_ids=IDS.to(DEVICE)).logits) if node.name() in NODES]
    assert len(own) == 2 * 3  # q, k, v; o; the gated MLP
    assert not [name for node in own for name, item in vars(node).items() if torch.is_tensor(item)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_made_whole_once_on_each_way(
    checkpointing: bool, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way: forward, the same again where layers are checkpointed, and backward."""
    network = adapted(make_base(tmp_path), EXACT, dropout=dropout)
    fuse(network)
    network.enable_input_require_grads()  # as the trainer does, so that the first layer too gives a gradient
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    weights, whole = {id(layer.weight) for layer in layers_in_4_bits(network)}, Counter[int]()
    original = fused_lora.dequantized

    def counted(weight: Any, *rest: Any) -> torch.Tensor:
        whole[id(weight)] += 1
        return original(weight, *rest)

    monkeypatch.setattr(fused_lora, "dequantized", counted)
    loss = network(input_ids=IDS.to(DEVICE), labels=IDS.to(DEVICE)).loss
    assert whole == dict.fromkeys(weights, 1)
    loss.backward()
    assert whole == dict.fromkeys(weights, 3 if checkpointing else 2)
