"""The bias-free matrices of the network."""

import functools
import math
import warnings

import keras
from keras import ops

from keras_openllama.backend.keras_private import (
    kernel_variable,
    track_variables,
    untrack_variables,
)

if keras.config.backend() == "jax":
    import jax

# Ours: from so many rows on, a CPU is kept busy by arithmetic in either order.
MANY_ROWS = 128
BLOCK = 64  # Ours: outputs of a block on PyTorch; it fits in a core's cache.


@keras.saving.register_keras_serializable(package="keras_openllama")
class Projection(keras.layers.EinsumDense):
    """A matrix without bias, its kernel `(outputs, inputs)`, as in checkpoints.

    In this orientation the inputs of each output lie side by side, which is how CPUs
    multiply a few rows at the memory's speed (`benchmarks/README.md`), and loading
    need not turn anything.

    Args:
        units: int, size of the output.
        initializer_std: float, standard deviation of the normal initialisation.

    Call arguments:
        inputs: float tensor `(batch, length, inputs)`.

    Returns:
        A tensor `(batch, length, units)`.

    Example:
        Projection(8640, initializer_std=0.02)(hidden_states)
    """

    def __init__(self, units, initializer_std, **kwargs):
        super().__init__(
            "bti,oi->bto",
            output_shape=(None, units),
            # One each: an initializer that is shared gives equal values.
            kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_std),
            **kwargs,
        )

    def call(self, inputs, training=None):
        return self._adapted(inputs, multiply(inputs, kernel_variable(self)))

    def quantized_call(self, inputs, training=None):
        # Keras's own would take the adapters for those of a kernel (inputs, outputs).
        enabled, self.lora_enabled = self.lora_enabled, False
        try:
            outputs = super().quantized_call(inputs, training=training)
        finally:
            self.lora_enabled = enabled
        return self._adapted(inputs, outputs)

    def _adapted(self, inputs, outputs):
        """Outputs with what the adapters add; the kernel itself stays as it is."""
        if not self.lora_enabled:
            return outputs
        narrow = multiply(inputs, self._computed_in(self.lora_kernel_b))
        added = multiply(narrow, self._computed_in(self.lora_kernel_a))
        return outputs + (self.lora_alpha / self.lora_rank) * added

    def _computed_in(self, adapter):
        return ops.cast(adapter, self.compute_dtype)

    def save_own_variables(self, store):
        if self.lora_enabled and self.quantization_mode is not None:
            warnings.warn(
                "Adapters are merged into int8 weights and rounded, since the model "
                "is saved whole. `save_adapters` keeps them as they are.",
                stacklevel=2,
            )
        super().save_own_variables(store)

    def enable_lora(
        self, rank, lora_alpha=None, a_initializer="zeros", b_initializer=None
    ):
        """Adds adapters: `kernel + lora_alpha / rank * a @ b`.

        As in the paper and in PEFT the factor at the inputs is random, the one at the
        outputs zero. (Keras's names go by the axes of its kernels, which are the other
        way round.)

        Args:
            rank: int, rank of the adapters.
            lora_alpha: float, see above; `rank` if `None`.
            a_initializer, b_initializer: of `a`, `(outputs, rank)`, and of `b`,
                `(rank, inputs)`. `None` is uniform within 1 / sqrt(inputs), PEFT's.

        Raises:
            ValueError: if the layer has adapters.

        Source: LoRA (arXiv:2106.09685), section 4.1; https://github.com/huggingface/peft.
        """
        if b_initializer is None:
            limit = kernel_variable(self).shape[-1] ** -0.5
            b_initializer = keras.initializers.RandomUniform(-limit, limit)
        super().enable_lora(rank, lora_alpha, a_initializer, b_initializer)

    def adapters(self):
        """The adapters that the layer has: dict of `keras.Variable` by name."""
        names = ("lora_kernel_a", "lora_kernel_b") if self.lora_enabled else ()
        return {name: getattr(self, name) for name in names}

    def remove_adapters(self):
        """Takes the adapters off the layer, and returns what `put_adapters` takes."""
        removed = (self.adapters(), self.lora_rank, self.lora_alpha)
        untrack_variables(self, removed[0].values())
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None
        return removed

    def put_adapters(self, removed):
        """Puts adapters on again that were taken off."""
        variables, self.lora_rank, self.lora_alpha = removed
        track_variables(self, variables.values())
        self.lora_enabled = True

    def quantize(self, mode=None, type_check=True, config=None):
        # The check is for subclasses that compute something else.
        super().quantize(mode, type_check=False, config=config)

    def get_config(self):
        config = keras.layers.Layer.get_config(self)
        _, units = self.partial_output_shape
        return {
            **config,
            "units": units,
            "initializer_std": self.kernel_initializer.stddev,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def multiply(inputs, kernel):
    """`inputs @ kernel.T`, in the order of operands that the backend is fastest in.

    Args:
        inputs: float tensor `(..., inputs)`.
        kernel: tensor `(outputs, inputs)` of the same dtype.

    Returns:
        A tensor `(..., outputs)` of that dtype.
    """
    kernel = ops.convert_to_tensor(kernel)
    if keras.config.backend() == "jax":
        return _choose()(inputs, kernel)
    if keras.config.backend() == "torch" and _blocks_pay(inputs, kernel):
        return _multiply_by_blocks(inputs, kernel)
    return _multiply(inputs, kernel)


def _blocks_pay(inputs, kernel):
    return (
        inputs.device.type == "cpu"
        and inputs.dtype.itemsize == 4
        and math.prod(inputs.shape[:-1]) < MANY_ROWS
        and len(kernel) % BLOCK == 0
    )


def _multiply_by_blocks(inputs, kernel):
    """MKL's product of a few rows is slower than a batch of products with blocks."""
    x = inputs.reshape(-1, inputs.shape[-1])
    blocks = kernel.view(-1, BLOCK, kernel.shape[1]).transpose(1, 2)
    outputs = (x @ blocks).transpose(0, 1)
    return outputs.reshape(*inputs.shape[:-1], len(kernel))


@functools.cache
def _choose():
    """The choice is made where a program is compiled, for what it will run on."""
    return jax.jit(
        lambda *operands: jax.lax.platform_dependent(
            *operands, cpu=_multiply_on_cpu, default=_multiply
        )
    )


def _multiply(inputs, kernel):
    return ops.matmul(inputs, ops.transpose(kernel))


def _multiply_on_cpu(inputs, kernel):
    """With XLA on a CPU the weights are the left operand, which is read as it lies.

    The right one is packed first, and so read, written and read again. Matrix times
    vector is another kernel of XLA's, without that: but it is slow in bfloat16, which
    has a fast kernel for two rows or more whose sums are float32.
    """
    barrier = jax.lax.optimization_barrier
    rows = math.prod(inputs.shape[:-1])
    is_bfloat16 = inputs.dtype == "bfloat16"
    if not is_bfloat16 and rows >= MANY_ROWS:
        return _multiply(inputs, kernel)
    x = inputs.reshape(rows, -1)
    if is_bfloat16 and rows == 1:
        x = jax.numpy.concatenate([x, x])
    columns = jax.lax.dot_general(
        kernel,
        barrier(x),  # Else what makes the inputs is done again for each output.
        (((1,), (1,)), ((), ())),
        preferred_element_type="float32" if is_bfloat16 else None,
    )
    # Else XLA would swap the operands to have no transposition.
    outputs = barrier(columns).T[:rows].astype(inputs.dtype)
    return outputs.reshape(*inputs.shape[:-1], len(kernel))
