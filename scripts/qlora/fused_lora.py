"""LoRA over frozen 4-bit layers as few operations: the products added in place, nothing saved that can be had again.

PEFT keeps the layers, their weights and their names; only how they are computed changes. The mathematics is that of
LoRA (arXiv 2106.09685): y = x Wᵀ + b + s (d(x) Aᵀ) Bᵀ, where d is dropout, and W dequantised for each product and
forgotten after it. Without dropout, and where one kernel does both, W is made whole as W + s B A, rounded once: then
the layer's products are those of W alone.
"""

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from torch import Tensor, nn

from qlora import fp8
from qlora.activations import Activation, activation_of
from qlora.dropout import Dropout
from qlora.errors import UserError
from qlora.nf4 import can_add, dequantized, make_room

# Learning rate below which adapters are not added to weights, whose rounding is large beside what steps change.
ADDED_FROM = 5e-5  # measured: benchmarks/NOTES.md
# Modules that compute down(act(gate(x)) * up(x)) and nothing else; another family's is left to its own forward.
GATED = {"LlamaMLP", "MistralMLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP"}


class Group:
    """Layers over one input. Their adapters are kept in the dtype of the products too, see `refresh`.

    The scaling s goes to A on the way forward and to B on the way back, so that no gradient has to be scaled.
    """

    def __init__(
        self, modules: Sequence[Linear4bit], add: bool, in_fp8: bool, dropout: Dropout | None, number: int
    ) -> None:
        self.modules = modules
        self.dropout, self.number = dropout, number
        self.fp8 = [fp8.Weight(module.base_layer.weight) for module in modules] if in_fp8 else None
        names = [module.active_adapters[0] for module in modules]
        self.scalings = [module.scaling[name] for module, name in zip(modules, names, strict=True)]
        self.learned_a = [module.lora_A[name].weight for module, name in zip(modules, names, strict=True)]
        self.learned_b = [module.lora_B[name].weight for module, name in zip(modules, names, strict=True)]
        self.ranks = [len(a) for a in self.learned_a]
        self.dtype = modules[0].base_layer.compute_dtype
        self.a = torch.empty_like(torch.cat(self.learned_a), dtype=self.dtype)  # (sum of ranks, in)
        self.scaled_a = torch.empty_like(self.a)
        self.bs = [torch.empty_like(b, dtype=self.dtype) for b in self.learned_b]  # (out, rank) each
        self.scaled_bs = [torch.empty_like(b) for b in self.bs]
        self.can_add = add and not in_fp8 and all(can_add(module.base_layer.weight) for module in modules)

    @property
    def learned(self) -> list[Tensor]:
        """A and B of each layer by turns."""
        return [weight for pair in zip(self.learned_a, self.learned_b, strict=True) for weight in pair]

    @property
    def added(self) -> bool:
        """Whether adapters are added to the weights: not where their input is another."""
        return self.can_add and not (self.dropout and self.modules[0].training)

    def dropped(self, x: Tensor) -> Tensor:
        """What the adapters see of `x`, or the gradient of that, with one mask for all layers."""
        return self.dropout(x, self.number) if self.dropout and self.modules[0].training else x

    def weight(self, place: int) -> Tensor:
        """W (out, in) of one layer, or W + s B A where adapters are `added`, until the next is asked for."""
        adapter = (self.bs[place], self.scaled_a.split(self.ranks)[place]) if self.added else None
        return dequantized(self.modules[place].base_layer.weight, self.dtype, adapter)

    def forward(self, x: Tensor, apart: bool = False) -> tuple[list[Tensor], Tensor]:
        """Each layer's output (tokens, out) for `x` (tokens, in), and s d(x) Aᵀ of all (tokens, sum of ranks).

        `apart`: the outputs lack (s d(x) Aᵀ) Bᵀ, which the caller adds; only where adapters are not `added`.
        """
        narrow = self.dropped(x) @ self.scaled_a.t()
        frozen = fp8.products(self.fp8, x) if self.fp8 else None
        outputs = []
        for place, (part, b) in enumerate(zip(narrow.split(self.ranks, dim=1), self.bs, strict=True)):
            if frozen:
                output = frozen[place] if apart else fp8.add(frozen[place], part, b.t())
            elif self.added or apart:
                output = x @ self.weight(place).t()
            else:
                output = (part @ b.t()).addmm_(x, self.weight(place).t())
            bias = self.modules[place].base_layer.bias
            outputs.append(output if bias is None else output.add_(bias))
        return outputs, narrow

    def input_gradient(self, grads: Sequence[Tensor], wanted: bool) -> tuple[Tensor | None, Tensor]:
        """That of x (None unless wanted), and s grad B of all layers (tokens, sum of ranks)."""
        below = torch.cat([grad @ b for grad, b in zip(grads, self.scaled_bs, strict=True)], dim=1)
        if not wanted:
            return None, below
        if self.fp8:
            return fp8.add(fp8.gradient(self.fp8, grads), below, self.a), below
        of_x = None if self.added else self.dropped(below @ self.a)
        for place, grad in enumerate(grads):
            of_x = grad @ self.weight(place) if of_x is None else of_x.addmm_(grad, self.weight(place))
        return of_x, below

    def adapter_gradients(self, x: Tensor, narrow: Tensor, below: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        """Those of A and B by turns, in float32."""
        of_a = in_float32(below.t(), self.dropped(x)).split(self.ranks)
        of_b = [in_float32(grad.t(), part) for grad, part in zip(grads, narrow.split(self.ranks, dim=1), strict=True)]
        return [gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair]


@torch.no_grad()
def refresh(groups: Sequence[Group]) -> None:
    """Bring the copies of all adapters up to date in a few kernels; a layer at a time it would be a thousand."""
    learned_a = [a for group in groups for a in group.learned_a]
    learned_b = [b for group in groups for b in group.learned_b]
    scalings = [scaling for group in groups for scaling in group.scalings]
    torch._foreach_copy_([part for group in groups for part in group.a.split(group.ranks)], learned_a)
    torch._foreach_copy_([b for group in groups for b in group.bs], learned_b)
    scaled_a = [part for group in groups for part in group.scaled_a.split(group.ranks)]
    torch._foreach_copy_(scaled_a, torch._foreach_mul(learned_a, scalings))
    torch._foreach_copy_([b for group in groups for b in group.scaled_bs], torch._foreach_mul(learned_b, scalings))


def in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product in float32; on a GPU its sums are kept so whatever the factors' dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


class Products(torch.autograd.Function):
    """The outputs of several layers over one input."""

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """`x` is (tokens, in), after it come A and B of each layer by turns; gives a (tokens, out) a layer."""
        outputs, narrow = group.forward(x)
        ctx.group = group
        ctx.save_for_backward(x, narrow)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of what `forward` took."""
        x, narrow = ctx.saved_tensors
        of_x, below = ctx.group.input_gradient(grads, ctx.needs_input_grad[1])
        return None, of_x, *ctx.group.adapter_gradients(x, narrow, below, grads)


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) · up(x)); of the wide tensors only gate's and up's outputs are kept.

    Where the activation adds the adapters of gate and up as it reads these, they are kept without.
    """

    @staticmethod
    def forward(ctx: Any, first: Group, down: Group, act: Activation, x: Tensor, *_: Tensor) -> Tensor:
        """`first` is gate and up, `x` (tokens, width); after it come A and B of gate, up and down by turns."""
        apart = act.can_add(x, first.ranks) and not first.added
        (gate, up), narrow = first.forward(x, apart)
        (output,), low = down.forward(act.forward(gate, up, (narrow, *first.bs) if apart else ()))
        ctx.first, ctx.down, ctx.act, ctx.apart = first, down, act, apart
        ctx.save_for_backward(x, narrow, gate, up, low)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The gradients of what `forward` took."""
        x, narrow, gate, up, low = ctx.saved_tensors
        of_hidden, below = ctx.down.input_gradient([grad], wanted=True)
        *of_wide, hidden = ctx.act.backward(gate, up, of_hidden, (narrow, *ctx.first.bs) if ctx.apart else ())
        of_down = ctx.down.adapter_gradients(hidden, low, below, [grad])
        del hidden, of_hidden
        of_x, below = ctx.first.input_gradient(of_wide, ctx.needs_input_grad[3])
        of_first = ctx.first.adapter_gradients(x, narrow, below, of_wide)
        return None, None, None, of_x, *of_first, *of_down


def products(group: Group, x: Tensor) -> list[Tensor]:
    """A (…, out) a layer for `x` (…, in)."""
    return [as_wide_as(x, output) for output in Products.apply(group, flat(x, group), *group.learned)]


def alone(group: Group, x: Tensor) -> Tensor:
    """The output (…, out) of a group of one layer for `x` (…, in)."""
    return products(group, x)[0]


def gated_mlp(first: Group, down: Group, act: Activation, x: Tensor) -> Tensor:
    """The output of gate, up and down for `x`, both (…, width)."""
    output: Tensor = GatedMlp.apply(first, down, act, flat(x, first), *first.learned, *down.learned)
    return as_wide_as(x, output)


def flat(x: Tensor, group: Group) -> Tensor:
    """(…, width) as (tokens, width), in the dtype of the products."""
    return x.reshape(-1, x.shape[-1]).to(group.dtype)


def as_wide_as(x: Tensor, output: Tensor) -> Tensor:
    """(tokens, out) as (…, out), like `x`."""
    return output.view(*x.shape[:-1], -1).to(x.dtype)


class Siblings:
    """q, k and v of one input at once: the first that is asked computes all, the others find theirs here."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at `place` for `x`."""
        if self.input is not x or place not in self.outputs:
            self.input = x
            self.outputs = dict(enumerate(products(self.group, x)))
        output = self.outputs.pop(place)
        if not self.outputs:
            self.input = None
        return output


def why_not(module: Linear4bit, in_fp8: bool = False) -> str | None:
    """Why a layer keeps PEFT's own computation, or None."""
    (name, *others) = module.active_adapters
    if others or module.merged:
        return "several adapters, or a merged one"
    if in_fp8 and dropout_of(module):
        return "dropout"
    if name in module.lora_variant:
        return "a variant of LoRA"
    if module.lora_bias[name]:
        return "an adapter with a bias"
    if module.base_layer.bias is not None and module.base_layer.bias.requires_grad:
        return "a bias that is learned"
    return None


def dropout_of(module: Linear4bit) -> Dropout | None:
    """The dropout before a layer's adapter, or None."""
    layer = module.lora_dropout[module.active_adapters[0]]
    return Dropout(layer.p, module.base_layer.weight.device) if isinstance(layer, nn.Dropout) else None


def whole_mlps(network: PeftModel, count: int) -> str:
    """That so many gated MLPs are computed whole, or why none is."""
    if count:
        return f"{count} gated MLPs whole"
    known = any(type(module).__name__ in GATED for module in network.modules())
    reason = "gate, up and down are not all fused" if known else "of a kind that is not covered"
    return f"no MLP whole ({reason})"


def fuse(network: PeftModel, in_fp8: bool = False, learning_rate: float = ADDED_FROM) -> str:
    """Let each layer that can be computed by the functions above be so, and say in a line what was chosen and why.

    Numbers change by rounding alone, unless the frozen products are to be `in_fp8`. With the adapter disabled, or more
    than its input given, a layer is computed by PEFT. Raises UserError where not every layer can be `in_fp8`.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, Linear4bit)}
    reasons = {name: why_not(module, in_fp8) for name, module in modules.items()}
    free = {name: module for name, module in modules.items() if reasons[name] is None}
    why = ", ".join(sorted({reason for reason in reasons.values() if reason})) or "no 4-bit layer has an adapter"
    if in_fp8 and (not free or len(free) < len(modules)):
        raise UserError(f"recipe: fp8 cannot be had in every layer with an adapter ({why}); set fp8: false")
    if not free:
        return f"fused LoRA: none, PEFT's own computation ({why})"
    make_room(
        [module.base_layer.weight for module in free.values()], next(iter(free.values())).base_layer.compute_dtype
    )
    groups: list[Group] = []
    dropout = dropout_of(next(iter(free.values())))

    def grouped(*modules: Linear4bit) -> Group:
        groups.append(Group(modules, learning_rate >= ADDED_FROM, in_fp8, dropout, len(groups)))
        return groups[-1]

    gated, left = 0, dict(free)
    for name, module in network.named_modules():
        gate, up, down = (left.get(f"{name}.{child}") for child in ("gate_proj", "up_proj", "down_proj"))
        act = activation_of(module)
        if type(module).__name__ in GATED and act and gate and up and down:
            gated += 1
            _replace(module, (gate, up, down), partial(gated_mlp, grouped(gate, up), grouped(down), act))
            left = {other: layer for other, layer in left.items() if layer not in (gate, up, down)}
    for name in [name for name in left if name.endswith(".q_proj")]:
        stem = name.removesuffix("q_proj")
        q, k, v = (left.get(f"{stem}{child}") for child in ("q_proj", "k_proj", "v_proj"))
        if q and k and v:
            siblings = Siblings(grouped(q, k, v))
            for place, layer in enumerate((q, k, v)):
                _replace(layer, [layer], partial(siblings.output, place))
            left = {other: layer for other, layer in left.items() if layer not in (q, k, v)}
    for layer in left.values():
        _replace(layer, [layer], partial(alone, grouped(layer)))
    if in_fp8:
        fp8.make_room([group.fp8 for group in groups if group.fp8])
    refresh(groups)

    def begin(module: nn.Module, _: Any) -> None:
        refresh(groups)
        if dropout and module.training:
            dropout.draw()

    network.get_base_model().register_forward_pre_hook(begin)
    rest = len(modules) - len(free)
    approximate = ", frozen products approximate in FP8" if in_fp8 else ""
    masks = f", dropout {dropout.share:g} with one mask for layers of one input" if dropout else ""
    left_out = f"; {rest} left to PEFT ({why})" if rest else ""
    whole = whole_mlps(network, gated)
    return f"fused LoRA: {len(free)} layers, {whole}{where_added(groups, in_fp8)}{approximate}{masks}{left_out}"


def where_added(groups: Sequence[Group], in_fp8: bool) -> str:
    """Whether adapters are added to the weights, and where they could be and are not, why."""
    if any(group.added for group in groups):
        return ", adapters added to the weights"
    can = not in_fp8 and all(can_add(module.base_layer.weight) for group in groups for module in group.modules)
    slow = can and not any(group.dropout for group in groups)
    return f", adapters beside the weights (a learning rate below {ADDED_FROM:g})" if slow else ""


def _replace(module: nn.Module, layers: Sequence[Linear4bit], compute: Callable[[Tensor], Tensor]) -> None:
    """Let `module` compute so, unless an adapter is switched off or merged, or it is given more than its input."""
    original = module.forward

    def forward(_: nn.Module, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        if args or rest or any(layer.disable_adapters or layer.merged for layer in layers):
            return original(x, *args, **rest)
        return compute(x)

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
