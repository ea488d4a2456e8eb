"""Attention over rows end to end, against transformers' sdpa over each row alone; the kernel by plain PyTorch.

What the kernel itself gives is tested on a GPU: test_gpu_steps.py.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import make_base
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from varlen_for_tests import attention_of_rows, attention_of_rows_that_asks

from qlora import packed_attention
from qlora.batches import PackedBatch
from qlora.loss import add_supervised_loss
from qlora.packed_attention import NAME, no_mask, use_packed_attention

torch.set_num_threads(1)
LENGTHS = (17, 30, 9)
GROUPED = SimpleNamespace(is_causal=True, num_key_value_groups=2)
EQUAL = SimpleNamespace(is_causal=True, num_key_value_groups=1)
Attention = Callable[..., tuple[torch.Tensor, None]]


@pytest.fixture(params=[False, True], ids=["as in torch 2.11", "as in torch 2.13"])
def asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether heads are shared only where that is asked for; the kernel's place is taken."""
    wanted = bool(request.param)
    monkeypatch.setattr(packed_attention, "ASKS", wanted)
    monkeypatch.setattr(varlen, "varlen_attn", attention_of_rows_that_asks if wanted else attention_of_rows)
    return wanted


def registered(base: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A network that takes rows apart as one on a GPU would, in float64 then, so that rounding hides nothing."""
    monkeypatch.setattr(packed_attention, "why_not_packed", lambda *_: None)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    assert use_packed_attention(network) is None
    assert network.config._attn_implementation == NAME
    return network.double()


def heads(module: SimpleNamespace, tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value: (1, heads, tokens, 8)."""
    generator = torch.Generator().manual_seed(0)
    counts = (4, 4 // module.num_key_value_groups, 4 // module.num_key_value_groups)
    return [torch.randn(1, count, tokens, 8, generator=generator, dtype=torch.float64).to(dtype) for count in counts]


def windowed(tokens: int, window: int | None) -> torch.Tensor:
    """Which keys a query sees, itself the last of `window`: (1, 1, tokens, tokens)."""
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return ((behind >= 0) & (behind < (window or tokens)))[None, None]


@pytest.mark.usefixtures("asks")
@pytest.mark.parametrize("module", [EQUAL, GROUPED], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_each_row_is_attended_to_by_itself(
    module: SimpleNamespace, window: int | None, scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(make_base(tmp_path), monkeypatch)
    packed: Attention = ALL_ATTENTION_FUNCTIONS[NAME]
    starts = torch.tensor([0, 17, 47, 56, 64, 64, 64], dtype=torch.int32)  # the last: padding, and rows of no token
    query, key, value = heads(module, 64)
    found, _ = packed(
        module, query, key, value, no_mask(query.device),
        cu_seq_lens_q=starts, max_length_q=64, scaling=scale, sliding_window=window,
    )  # fmt: skip
    assert found.shape == (1, 64, 4, 8)
    for start, end in zip((0, 17, 47), (17, 47, 56), strict=True):
        row = (part[:, :, start:end] for part in (query, key, value))
        alone, _ = sdpa_attention_forward(module, *row, windowed(end - start, window), scaling=scale)
        torch.testing.assert_close(found[:, start:end], alone)


@pytest.mark.usefixtures("asks")
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama2", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma", {}),
        ("qwen2.5", {}),
        ("qwen3", {}),
        ("phi-2", {}),
        ("phi3", {"sliding_window": 8}),
    ],
)
def test_packed_rows_have_the_loss_of_each_row_alone(
    family: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = registered(make_base(tmp_path, family, **sizes), monkeypatch)
    add_supervised_loss(network)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(6, 300, (length,), generator=generator) for length in LENGTHS]
    dataset = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    batch = PackedBatch(dataset, 48, 0, documents=3)([{"rows": [0, 1]}, {"rows": [2]}])
    del batch["tokens"]
    with torch.no_grad():
        packed = network(**batch, loss_items=1)
        network.config._attn_implementation = "sdpa"
        alone = [network(input_ids=row[None]).logits[0, :-1] for row in rows]
    losses = [
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
        for logits, row in zip(alone, rows, strict=True)
    ]
    torch.testing.assert_close(packed.double(), torch.stack(losses).sum(), rtol=1e-6, atol=0)


def test_float32_goes_through_the_kernel_in_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(*args: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.extend(part.dtype for part in args[:3])
        return attention_of_rows_that_asks(*args, **rest)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    query, key, value = heads(EQUAL, 9, torch.float32)
    ends = torch.tensor([0, 9], dtype=torch.int32)
    found, _ = packed_attention.packed_attention(EQUAL, query, key, value, None, ends, 9)
    assert seen == [torch.get_autocast_dtype("cuda")] * 3
    assert found.dtype == torch.float32


def test_without_rows_it_is_sdpa() -> None:
    query, key, value = heads(GROUPED, 9)
    packed = packed_attention.packed_attention(GROUPED, query, key, value, windowed(9, 4), scaling=0.7)
    alone, _ = sdpa_attention_forward(GROUPED, query, key, value, windowed(9, 4), scaling=0.7)
    assert torch.equal(packed[0], alone)


@pytest.mark.parametrize("module", [EQUAL, GROUPED], ids=["equal heads", "grouped heads"])
def test_the_installed_torch_takes_what_is_passed(module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function over tensors without data: arguments by their names, shapes forward and backward."""
    installed, bound = varlen.varlen_attn, []

    def recorded(*args: object, **rest: object) -> object:
        bound.append(inspect.signature(installed).bind(*args, **rest).arguments)
        return installed(*args, **rest)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    query, key, value = (part.to("meta").requires_grad_() for part in heads(module, 12, torch.bfloat16))
    ends = torch.empty(5, dtype=torch.int32, device="meta")
    call = partial(packed_attention.packed_attention, module, query, key, value, None, ends, 12, scaling=0.5)
    found, _ = call(sliding_window=4)
    found.sum().backward()
    assert found.shape == (1, 12, 4, 8)
    assert [part.grad.shape for part in (query, key, value)] == [part.shape for part in (query, key, value)]
    call()
    places = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size"]
    asked = ["enable_gqa"] if module is GROUPED and packed_attention.ASKS else []
    assert [list(arguments) for arguments in bound] == [places + asked] * 2
    assert [arguments["window_size"] for arguments in bound] == [(3, 0), (-1, 0)]
    assert all(arguments["max_q"] == 12 and arguments["scale"] == 0.5 for arguments in bound)


def test_the_installed_torch_asks_where_heads_are_shared() -> None:
    query, key, value = (part.to("meta").flatten(0, 1).transpose(0, 1) for part in heads(GROUPED, 12, torch.bfloat16))
    ends = torch.empty(2, dtype=torch.int32, device="meta")
    if packed_attention.ASKS:
        with pytest.raises(ValueError, match="enable_gqa=True"):
            varlen.varlen_attn(query, key, value, ends, ends, 12, 12, window_size=(-1, 0))
    else:  # until torch 2.11
        assert varlen.varlen_attn(query, key, value, ends, ends, 12, 12, window_size=(-1, 0)).shape == query.shape
