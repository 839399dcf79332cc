"""TrainStepOptions of the TPU compiler that overlap collectives with computation."""

from __future__ import annotations

import logging

import jax

# Overlap the all-gathers of weights with computation. MaxText sets the same flags
# (https://github.com/AI-Hypercomputer/maxtext).
ALL_GATHER_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Disables windowed einsum, which would split a matrix product into pieces in order
    # to overlap it with the gather of its own matrix.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# Overlap the reductions of gradients with computation. Use all of these, or none.
REDUCTION_OPTIONS = {
    "xla_enable_async_all_reduce": "true",
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    # Otherwise the fusions with reductions exceed the memory of a core (VMEM).
    "xla_tpu_async_collective_fusion_with_start_done_only": "true",
}
# Overlap the all-to-alls that reduce gradients on a mesh whose `data` is 1. There, the
# options above would exceed the memory of a core.
ALL_TO_ALL_OPTIONS = {
    "xla_tpu_enable_async_all_to_all": "true",
    # The memory up to which the scheduler overlaps, and below which the compiler does
    # not recompute results that it could save; less than 100 % by default. 7B on 8
    # chips of v4 needs more: it would overlap almost nothing, or recompute products.
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
    "xla_jf_rematerialization_percent_shared_memory_limit": "100",
}


def options_for(lowered: jax.stages.Lowered) -> dict[str, str]:
    """Returns the options that a program is compiled with at first.

    Args:
        lowered: The result of `jax.jit(…).lower(…)`.

    Example:
        >>> lowered = jax.jit(abs).lower(1.0)
        >>> options_for(lowered)["xla_enable_async_all_reduce"]
        'true'
    """
    if "all_to_all" in lowered.as_text():
        return {**ALL_GATHER_OPTIONS, **ALL_TO_ALL_OPTIONS}
    return {**ALL_GATHER_OPTIONS, **REDUCTION_OPTIONS}


def compile_lowered(
    lowered: jax.stages.Lowered, device: jax.Device
) -> jax.stages.Compiled:
    """Compiles a program, on TPUs with the options of this module.

    If overlapped reductions exceed the memory of a core, as those over a whole slice
    may, it logs a warning and compiles without overlapping them.

    Args:
        lowered: The result of `jax.jit(…).lower(…)`.
        device: One of the devices that the program will run on.

    Returns:
        The compiled program.

    Raises:
        jax.errors.JaxRuntimeError: from the compiler, for example for lack of memory.
    """
    if device.platform != "tpu":
        return lowered.compile()
    try:
        return lowered.compile(options_for(lowered))
    except jax.errors.JaxRuntimeError as error:
        if "in memory space vmem" not in str(error):
            raise
    logging.getLogger(__name__).warning(
        "The reductions of gradients do not overlap with computation, because a core "
        "has too little memory for it here. If data is 1, data=2 may be faster."
    )
    return lowered.compile(ALL_GATHER_OPTIONS)
