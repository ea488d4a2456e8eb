"""Liger's Triton kernels for norms and rotary positions, where they cover the family.

Its gated MLP is left out: `fused_lora` computes MLPs, and where that steps aside, transformers does. Liger would also
replace the family's class for every network made later in the process, which `fused_lora` then would not know.
"""

from transformers import PreTrainedModel

try:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
except ImportError:  # it needs Triton, which comes with the CUDA build of torch alone
    MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance = {}, None


def use_liger(network: PreTrainedModel) -> str:
    """Put Liger's norms and rotary positions into `network`, in place, and say so; the rest is computed elsewhere."""
    family = network.config.model_type
    if _apply_liger_kernel_to_instance is None:
        return "no Liger kernels, liger-kernel is not installed"
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"no Liger kernels for {family}"
    _apply_liger_kernel_to_instance(
        network,
        rope=True,
        rms_norm=True,
        layer_norm=True,
        swiglu=False,
        geglu=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    return "Liger's norms and rotary positions"
