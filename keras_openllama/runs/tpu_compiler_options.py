"""What the TPU compiler is asked for: that links work while products are computed."""

import logging

import jax

# Weights are gathered while something else is computed. The names are those of flags
# that MaxText gives (https://github.com/AI-Hypercomputer/maxtext).
GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # XLA would cut products to pieces, to gather a piece of a matrix while another is
    # multiplied; here the whole one comes while something else is.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# Gradients are reduced while something else is computed: all of these, or none.
REDUCTIONS = {
    "xla_enable_async_all_reduce": "true",
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    # Else what is fused with a reduction needs more than a core's memory.
    "xla_tpu_async_collective_fusion_with_start_done_only": "true",
}


def compiled(lowered, device):
    """A program for TPUs or anything else.

    Where hidden reductions need more than a core's memory, as those over a whole slice
    may, it says so and leaves them in the open.

    Args:
        lowered: what `jax.jit(…).lower(…)` returns.
        device: `jax.Device`, one of those that it will run on.

    Returns:
        `jax.stages.Compiled`.

    Raises:
        jax.errors.JaxRuntimeError: from the compiler, such as of a lack of memory.
    """
    if device.platform != "tpu":
        return lowered.compile()
    try:
        return lowered.compile({**GATHERS, **REDUCTIONS})
    except jax.errors.JaxRuntimeError as error:
        if "in memory space vmem" not in str(error):
            raise
    logging.getLogger(__name__).warning(
        "Gradients are reduced while nothing else is computed: to do both at once, a "
        "core has too little memory here. If data is 1, data=2 may be faster."
    )
    return lowered.compile(GATHERS)
