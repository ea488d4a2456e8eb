"""Liger's Triton kernels for norms and rotary positions, where they cover the family."""

import logging

from transformers import PreTrainedModel

try:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
except ImportError:  # it needs Triton, which comes with the CUDA build of torch alone
    MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance = {}, None

log = logging.getLogger("qlora")


def use_liger(network: PreTrainedModel) -> None:
    """Put Liger's norms and rotary positions into `network`, in place; MLPs and the loss are computed elsewhere."""
    family = network.config.model_type
    if _apply_liger_kernel_to_instance is None:
        log.info("Liger kernels: none, liger-kernel is not installed")
    elif family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        log.info("Liger kernels: none for %s", family)
    else:
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
        log.info("Liger kernels: norms and rotary positions of %s", family)
