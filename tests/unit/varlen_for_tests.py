"""What PyTorch's attention over rows end to end computes, without its kernels, which a CPU lacks."""

import torch


def attention_of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """`varlen_attn` of torch 2.11, which shares heads of key and value unasked: (tokens, heads, width) each.

    The softmax is one of float32 at least. Nothing here waits for a device, as the kernel does not.
    """
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    left, right = window_size
    assert right == 0
    place = torch.arange(len(query), device=query.device)
    row = torch.searchsorted(cu_seq_q[1:].to(place.dtype), place, right=True)
    behind = place[:, None] - place
    seen = (row[:, None] == row) & (behind >= 0) & (behind <= (len(query) if left < 0 else left))
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    exact = torch.promote_types(scores.dtype, torch.float32)
    shares = scores.to(exact).masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
    return torch.einsum("hqk,khd->qhd", shares, value)


def attention_of_rows_that_asks(
    query: torch.Tensor, key: torch.Tensor, *rest: object, enable_gqa: bool = False, **options: object
) -> torch.Tensor:
    """`varlen_attn` from torch 2.12: heads of key and value are shared only where `enable_gqa` says so."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return attention_of_rows(query, key, *rest, **options)  # type: ignore[arg-type]
