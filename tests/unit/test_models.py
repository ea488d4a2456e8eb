"""In what precision a card computes."""

import pytest
import torch

from qlora.models import compute_dtype


@pytest.mark.parametrize(("card_has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_card_without_bfloat16_computes_in_float16(
    card_has_it: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:  # a T4 says yes where emulation counts
        return card_has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert compute_dtype("auto", "cuda") == dtype
    assert compute_dtype("auto", "cpu") == torch.float32
    assert compute_dtype("float16", "cuda") == torch.float16
