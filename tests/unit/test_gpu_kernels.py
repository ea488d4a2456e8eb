"""The kernels of a GPU against PyTorch's own operations. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from test_fused_lora import distance
from tiny_models import QUANTIZATION, layers_in_4_bits, make_base
from transformers.activations import ACT2FN

from qlora import fp8
from qlora.activations import Activation
from qlora.loss import TILE, summed_nll
from qlora.models import load_quantized
from qlora.nf4 import can_add, dequantized
from qlora.render import IGNORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = {**QUANTIZATION, "compute_dtype": "bfloat16"}
EXACT = {**QUANTIZATION, "compute_dtype": "float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_an_adapter_added_to_a_weight_is_rounded_once(dtype: torch.dtype, rank: int, tmp_path: Path) -> None:
    network = load_quantized(make_base(tmp_path / "base"), EXACT, "cuda", "sdpa")
    generator = torch.Generator().manual_seed(2)
    for layer in layers_in_4_bits(network):
        assert can_add(layer.weight)
        exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        b, a = (torch.randn(size, rank, generator=generator).cuda().to(dtype) for size in exact.shape)
        exact = exact + b.double() @ a.double().t()
        found = dequantized(layer.weight, dtype, (b, a.t().contiguous())).double()
        step = max(torch.finfo(dtype).eps / 2, 2e-6)
        torch.testing.assert_close(found, exact, rtol=1.01 * step, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("ranks", [(), (8, 8), (1, 5)])
@pytest.mark.parametrize("shape", [(64, 256), (70, 200), (3, 65)])
def test_a_gated_product_and_its_gradients_are_rounded_once(
    shape: tuple[int, int], ranks: tuple[int, ...], function: str, dtype: torch.dtype
) -> None:
    """With adapters of gate and up, and without, against float64."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).cuda().to(dtype)

    act = Activation(ACT2FN[function])
    (gate, up, grad), height, width = (drawn(*shape) for _ in range(3)), *shape
    adapters = [drawn(height, sum(ranks)), *(drawn(width, rank) / 4 for rank in ranks)] if ranks else []
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    added = list(wide)
    if ranks:
        assert act.can_add(gate, ranks)
        parts = adapters[0].double().split(ranks, dim=1)
        added = [one + part @ b.double().t() for one, part, b in zip(wide, parts, adapters[1:], strict=True)]
    product = act.function(added[0]) * added[1]
    exact = [*torch.autograd.grad(product, wide, grad.double()), product.detach()]
    found = [act.forward(gate, up, adapters), *act.backward(gate, up, grad, adapters)]
    step = max(torch.finfo(dtype).eps / 2, 2e-6)
    for one, other in zip(found, [exact[2], *exact], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1.01 * step, atol=1e-5 * float(other.abs().max()))


def test_wide_adapters_are_not_added_in_the_activation() -> None:
    act, x = Activation(torch.nn.SiLU()), torch.ones(1, device="cuda")
    assert act.can_add(x, (8, 1))
    assert not act.can_add(x, (1, 9))
    assert not Activation(torch.nn.ReLU()).can_add(x, (1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("labels", "softcap", "bias"), [(300, None, True), (300, 30.0, False), (32000, None, False)])
def test_the_loss_and_its_gradient_are_those_of_pytorch(
    labels: int, softcap: float | None, bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(64, labels, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(labels, 64, generator=generator))
    hidden = torch.randn(TILE + 100, 64, generator=generator).cuda().to(dtype).requires_grad_()
    wanted = torch.randint(0, labels, (len(hidden),), generator=generator).cuda()
    wanted[-10:] = IGNORED  # as packs are filled up
    found = summed_nll(hidden, wanted, head, softcap, len(wanted) - 10)
    logits = head(hidden).double()
    expected = torch.nn.functional.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, wanted)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    scale = 1024.0  # of a loss in float16
    gradients = [torch.autograd.grad(scale * loss, hidden)[0].float() / scale for loss in (found, expected)]
    assert distance(gradients[:1], gradients[1:]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 24, 64])
@pytest.mark.parametrize("shape", [(64, 256), (70, 200), (3, 65)])
def test_a_low_rank_product_is_added_and_rounded_once(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """Of a slice of a wider narrow matrix, and of B's transpose, as adapters have them; against float64."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).cuda().to(dtype)

    (height, width), before = shape, drawn(*shape)
    narrow, b = drawn(height, rank + 3)[:, 2:-1], drawn(width, rank)
    for wide in (b.t(), b.t().contiguous()):
        output = before.clone()
        found = fp8.add(output, narrow, wide)
        assert found is output
        exact = before.double() + narrow.double() @ wide.double()
        step = max(torch.finfo(dtype).eps / 2, 2e-6)
        torch.testing.assert_close(found.double(), exact, rtol=1.01 * step, atol=1e-6 * float(exact.abs().max()))


def test_products_of_higher_rank_are_left_to_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "low_rank_triton", None)
    generator = torch.Generator().manual_seed(2)
    output, narrow, wide = (
        torch.randn(size, generator=generator).cuda().bfloat16() for size in ((64, 256), (64, 65), (65, 256))
    )
    assert torch.equal(fp8.add(output.clone(), narrow, wide), output.addmm_(narrow, wide))


def test_rows_of_any_width_are_scaled_into_8_bits() -> None:
    """Side by side, with and without factors of their columns, against the same written in PyTorch."""
    generator = torch.Generator().manual_seed(2)
    for widths in ([48], [4096], [4112], [16, 5000], [2048, 4096, 9008]):
        parts = [torch.randn(5, width, generator=generator).cuda().bfloat16() for width in widths]
        factors = torch.rand(sum(widths), generator=generator).cuda()
        for columns in (None, factors):
            eighth, scales = fp8.fp8_triton.scaled_rows(parts, columns)
            exact = torch.cat(parts, dim=1).float() * (1 if columns is None else columns)
            expected = exact.abs().amax(1, keepdim=True) / 448
            torch.testing.assert_close(scales, expected)
            assert torch.equal(eighth.float(), (exact / expected).to(torch.float8_e4m3fn).float())


def test_products_in_fp8_are_those_of_rounded_rows(tmp_path: Path) -> None:
    """Against the same rounding written in PyTorch, and near the exact product."""
    network = load_quantized(make_base(tmp_path / "base"), HALF, "cuda", "sdpa")
    generator = torch.Generator().manual_seed(2)

    def rounded(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (rows / scales).to(torch.float8_e4m3fn).float() * scales

    def of_rows(rows: torch.Tensor) -> torch.Tensor:
        return rounded(rows, rows.abs().amax(1, keepdim=True) / 448)

    for layer in layers_in_4_bits(network):
        weight, exact = fp8.Weight(layer.weight), dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        x = torch.randn(48, exact.shape[1], generator=generator).cuda().bfloat16()
        grad = torch.randn(48, exact.shape[0], generator=generator).cuda().bfloat16()
        scales = weight.scales[:, None]
        eighth = rounded(exact, scales)
        (found,) = (product.float() for product in fp8.products([weight], x))
        assert distance([found], [of_rows(x.float()) @ eighth.t()]) < 0.01
        assert distance([found], [x.float() @ exact.t()]) < 0.06
        found = fp8.gradient([weight], [grad]).float()
        assert distance([found], [of_rows(grad.float() * weight.scales) @ (eighth / scales)]) < 0.01
        assert distance([found], [grad.float() @ exact]) < 0.06
        for number in (2, 3):
            together = fp8.gradient([weight] * number, [grad / (place + 1) for place in range(number)]).float()
            assert distance([together], [sum(1 / (place + 1) for place in range(number)) * found]) < 0.05
