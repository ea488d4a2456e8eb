"""LoRA over frozen 4-bit layers as few operations: the products added in place, nothing saved that can be had again.

PEFT keeps the layers, their weights and their names; only how they are computed changes. The mathematics is that of
LoRA (arXiv 2106.09685): y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W dequantised for each product and forgotten after it.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from torch import Tensor, nn

from qlora.activations import Activation, activation_of
from qlora.nf4 import dequantized, make_room

# Modules that compute down(act(gate(x)) * up(x)) and nothing else; another family's is left to its own forward.
GATED = {"LlamaMLP", "MistralMLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP"}


@dataclass(frozen=True)
class Layer:
    """One frozen layer and its adapter's factor."""

    module: Linear4bit
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.module.base_layer.compute_dtype

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        return self.module.base_layer.bias

    def weight(self) -> Tensor:
        """(out, in), until the next layer's."""
        return dequantized(self.module.base_layer.weight, self.dtype)

    def adapter(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), as they are learned."""
        (name,) = self.module.active_adapters
        return self.module.lora_A[name].weight, self.module.lora_B[name].weight


def in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product, summed and kept in float32 whatever the factors' dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def forward_of(layers: Sequence[Layer], x: Tensor, a: Tensor, bs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each layer's output (tokens, out) for one `x` (tokens, in), and x Aᵀ, where `a` has all layers' A as its rows."""
    narrow = x @ a.t()
    ranks = [b.shape[1] for b in bs]
    outputs = []
    for layer, part, b in zip(layers, narrow.split(ranks, dim=1), bs, strict=True):
        weight = layer.weight().t()
        output = x @ weight if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight)
        outputs.append(output.addmm_(part, b.t(), alpha=layer.scaling))
    return outputs, narrow


def backward_of(
    layers: Sequence[Layer],
    x: Tensor,
    narrow: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    grads: Sequence[Tensor],
    wants_input: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x (None unless wanted), and of A and B by turns, in float32."""
    ranks = [b.shape[1] for b in bs]
    below = torch.cat([(grad @ b).mul_(layer.scaling) for layer, grad, b in zip(layers, grads, bs, strict=True)], dim=1)
    of_a = in_float32(below.t(), x).split(ranks)
    of_b = [
        in_float32(grad.t(), part).mul_(layer.scaling)
        for layer, grad, part in zip(layers, grads, narrow.split(ranks, dim=1), strict=True)
    ]
    of_x = None
    if wants_input:
        of_x = below @ a
        for layer, grad in zip(layers, grads, strict=True):
            of_x.addmm_(grad, layer.weight())
    return of_x, [gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair]


def halves(adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A one below another, and the list of B, in the dtype of the products; given A and B by turns."""
    return torch.cat([a.to(dtype) for a in adapters[::2]]), [b.to(dtype) for b in adapters[1::2]]


class Products(torch.autograd.Function):
    """The outputs of several layers over one input."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        """`x` is (tokens, in), `adapters` A and B of each layer by turns; gives a (tokens, out) a layer."""
        outputs, narrow = forward_of(layers, x, *halves(adapters, x.dtype))
        ctx.layers = layers
        ctx.save_for_backward(x, narrow, *adapters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of what `forward` took."""
        x, narrow, *adapters = ctx.saved_tensors
        of_x, of_adapters = backward_of(
            ctx.layers, x, narrow, *halves(adapters, x.dtype), grads, ctx.needs_input_grad[1]
        )
        return None, of_x, *of_adapters


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) · up(x)); of the wide tensors only gate's and up's outputs are kept."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], act: Activation, x: Tensor, *adapters: Tensor) -> Tensor:
        """`layers` are gate, up and down, `adapters` A and B of each by turns, `x` (tokens, width)."""
        (gate, up), narrow = forward_of(layers[:2], x, *halves(adapters[:4], x.dtype))
        (output,), low = forward_of(layers[2:], act.forward(gate, up), *halves(adapters[4:], x.dtype))
        ctx.layers, ctx.act = layers, act
        ctx.save_for_backward(x, narrow, gate, up, low, *adapters)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The gradients of what `forward` took."""
        x, narrow, gate, up, low, *adapters = ctx.saved_tensors
        hidden = ctx.act.forward(gate, up)
        of_hidden, of_down = backward_of(ctx.layers[2:], hidden, low, *halves(adapters[4:], x.dtype), [grad], True)
        del hidden
        of_wide = ctx.act.backward(gate, up, of_hidden)
        of_x, of_first = backward_of(
            ctx.layers[:2], x, narrow, *halves(adapters[:4], x.dtype), of_wide, ctx.needs_input_grad[2]
        )
        return None, None, of_x, *of_first, *of_down


def products(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """A (…, out) a layer for `x` (…, in)."""
    outputs = Products.apply(layers, flat(x, layers), *adapters_of(layers))
    return [as_wide_as(x, output) for output in outputs]


def gated_mlp(layers: Sequence[Layer], act: Activation, x: Tensor) -> Tensor:
    """The output of gate, up and down for `x`, both (…, width)."""
    return as_wide_as(x, GatedMlp.apply(layers, act, flat(x, layers), *adapters_of(layers)))


def alone(layer: Layer, x: Tensor) -> Tensor:
    """The output (…, out) of one layer for `x` (…, in)."""
    return products([layer], x)[0]


def flat(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """(…, width) as (tokens, width), in the dtype of the products."""
    return x.reshape(-1, x.shape[-1]).to(layers[0].dtype)


def as_wide_as(x: Tensor, output: Tensor) -> Tensor:
    """(tokens, out) as (…, out), like `x`."""
    return output.view(*x.shape[:-1], -1).to(x.dtype)


def adapters_of(layers: Sequence[Layer]) -> list[Tensor]:
    """A and B of each layer by turns."""
    return [weight for layer in layers for weight in layer.adapter()]


class Siblings:
    """q, k and v of one input at once: the first that is asked computes all, the others find theirs here."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at `place` for `x`."""
        if self.input is not x or place not in self.outputs:
            self.input = x
            self.outputs = dict(enumerate(products(self.layers, x)))
        output = self.outputs.pop(place)
        if not self.outputs:
            self.input = None
        return output


def why_not(module: Linear4bit) -> str | None:
    """Why a layer keeps PEFT's own computation, or None."""
    (name, *others) = module.active_adapters
    if others or module.merged:
        return "several adapters, or a merged one"
    if not isinstance(module.lora_dropout[name], nn.Identity):
        return "dropout"
    if name in module.lora_variant:
        return "a variant of LoRA"
    if module.lora_bias[name]:
        return "an adapter with a bias"
    return None


def fuse(network: PeftModel) -> str:
    """Let each layer that can be computed by the functions above be so, and say in a line what was chosen and why.

    Numbers change by rounding alone; disabling the adapter, or calling a layer with more than its input, goes to PEFT.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, Linear4bit)}
    reasons = {name: why_not(module) for name, module in modules.items()}
    layers = {
        name: Layer(module, module.scaling[module.active_adapters[0]])
        for name, module in modules.items()
        if reasons[name] is None
    }
    if not layers:
        why = ", ".join(sorted({reason for reason in reasons.values() if reason})) or "no 4-bit layer has an adapter"
        return f"fused LoRA: none, PEFT's own computation ({why})"
    for dtype in {layer.dtype for layer in layers.values()}:
        make_room((layer.module.base_layer.weight for layer in layers.values() if layer.dtype == dtype), dtype)
    gated = 0
    for name, module in network.named_modules():
        own = {child: layers.get(f"{name}.{child}") for child in ("gate_proj", "up_proj", "down_proj")}
        act = activation_of(module)
        if type(module).__name__ in GATED and act and all(own.values()):
            gated += 1
            together = [layer for layer in own.values() if layer]
            _replace(module, together, partial(gated_mlp, together, act))
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        family = [layers.get(f"{parent}.{sibling}") for sibling in ("q_proj", "k_proj", "v_proj")]
        if child == "q_proj" and all(family):
            siblings = Siblings([layer for layer in family if layer])
            for place, sibling in enumerate(siblings.layers):
                _replace(sibling.module, [sibling], partial(siblings.output, place))
        elif not (child in ("k_proj", "v_proj") and all(family)):
            _replace(layer.module, [layer], partial(alone, layer))
    left = len(modules) - len(layers)
    return f"fused LoRA: {len(layers)} layers, {gated} gated MLPs whole" + (f"; {left} left to PEFT" if left else "")


def _replace(module: nn.Module, layers: Sequence[Layer], compute: Callable[[Tensor], Tensor]) -> None:
    """Let `module` compute so, unless an adapter is switched off or merged, or it is given more than its input."""
    original = module.forward

    def forward(_: nn.Module, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        if args or rest or any(layer.module.disable_adapters or layer.module.merged for layer in layers):
            return original(x, *args, **rest)
        return compute(x)

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
