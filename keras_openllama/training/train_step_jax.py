"""The train step on JAX, shared by `fit`, training runs and `pretrain --plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.backend.keras_private import compiled_metrics, loss_tracker
from keras_openllama.distribution import BATCH_AXES, OpenLlamaParallel
from keras_openllama.layers.attention_kernels import select_attention
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.layers.projection import is_float8
from keras_openllama.layers.sharded_embedding import embedding_lookup
from keras_openllama.layers.sharded_projection import reduce_gradients_by_all_to_all
from keras_openllama.training.chunked_loss import (
    chunked_cross_entropy,
    chunked_cross_entropy_of_head,
)
from keras_openllama.training.loss_scaling import has_dynamic_loss_scale, scales_loss
from keras_openllama.training.step_metrics import LossSums, StepMetrics
from keras_openllama.training.target_weights import target_weights
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class TrainStepOptions(NamedTuple):
    """Options of the train step. Only `z_loss` changes what it computes.

    Attributes:
        micro_batches: number of parts of a batch for gradient accumulation. Only the
            activations of one part are in memory. There is one update per batch.
        rematerialize: one of `config.REMATERIALIZATION`.
        z_loss: weight of the squared logarithm of the softmax's denominator.
        mesh: mesh with the axes of `distribution.make_mesh`; `None` for one device.
        loss_chunks: see `chunked_loss.chunked_cross_entropy`.
        attention_fn: kernel of `attention_kernels.select_attention`; `None` is the
            attention that every platform supports.
        scan: whether the layers run in a scan. It reduces compilation time, but is
            slower on CPUs.
        all_to_all: whether the gradients of the layers are reduced over the mesh by
            all-to-alls, see `sharded_projection.project_sharded`.

    Example:
        >>> TrainStepOptions(micro_batches=4).rematerialize
        'none'
    """

    micro_batches: int = 1
    rematerialize: str = "none"
    z_loss: float = 0.0
    mesh: jax.sharding.Mesh | None = None
    loss_chunks: int | None = None
    attention_fn: Callable[..., Tensor] | None = None
    scan: bool = False
    all_to_all: bool = False


def options_for_devices(
    options: TrainStepOptions, distribution: OpenLlamaParallel | None = None
) -> TrainStepOptions:
    """Adapts options to the devices that the step will run on.

    Args:
        options: the options.
        distribution: distribution of the model; `None` for JAX's default device.

    Returns:
        The options with the mesh, the fastest attention kernel, and on TPUs a scan over
        the layers.

    Example:
        >>> options_for_devices(TrainStepOptions()).scan  # On a CPU.
        False
    """
    mesh, device = None, jax.devices()[0]
    if distribution is not None:
        mesh = distribution.device_mesh.backend_mesh
        device = mesh.devices.flat[0]
    return options._replace(
        mesh=mesh,
        attention_fn=select_attention(device, mesh),
        scan=device.platform == "tpu",
        all_to_all=_prefers_all_to_all(device, mesh),
    )


def _prefers_all_to_all(device, mesh):
    """Whether all-to-alls are the fastest reduction of gradients.

    Heuristic, from the programs of the TPU compiler: it overlaps a reduce-scatter with
    computation unless its groups contain all chips of the slice. It rejects an
    asynchronous all-to-all on v5e and v6e, whose links have two axes.
    """
    if mesh is None or device.device_kind not in ("TPU v4", "TPU v5", "TPU v5p"):
        return False
    return mesh.shape["data"] == mesh.shape["model"] == 1 < mesh.shape["fsdp"]


def loss_sums(
    lm: CausalLM,
    values: tuple[list, list],
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
    options: TrainStepOptions,
) -> LossSums:
    """Computes the weighted sum of the loss over a batch.

    Args:
        lm: `OpenLlamaCausalLM`.
        values: values of its trainable and of its non-trainable variables.
        batch: `(x, targets, weights)`: a dict of int `"token_ids"` and
            `"padding_mask"`, int targets, float32 weights; all `(batch, length)`.
        options: options of the step.

    Returns:
        The sums of loss, z-loss and correct targets.

    Raises:
        ValueError: if the model is quantized to float8.

    Example:
        >>> ids = jnp.array([[1, 357, 1239]])
        >>> x = {"token_ids": ids[:, :-1], "padding_mask": jnp.ones((1, 2), "int32")}
        >>> values = [
        ...     [v.value for v in variables]
        ...     for variables in (lm.trainable_variables, lm.non_trainable_variables)
        ... ]
        >>> batch = x, ids[:, 1:], jnp.ones((1, 2))
        >>> loss_sums(lm, values, batch, TrainStepOptions()).loss.round()
        Array(8., dtype=float32)
    """
    if is_float8(lm):
        raise ValueError(
            "A model that is quantized to float8 is trained by the train step of "
            "Keras. Call `compile` after `quantize`."
        )
    x, targets, weights = batch
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    mapping = zip(variables, [*values[0], *values[1]], strict=True)
    mesh_of_gradients = options.mesh if options.all_to_all else None
    with (
        keras.StatelessScope(state_mapping=mapping),
        reduce_gradients_by_all_to_all(mesh_of_gradients),
    ):
        hidden = lm.backbone.hidden_states(
            x["token_ids"],
            x["padding_mask"],
            layer_intercept_fn=lambda states, index: _shard_by_batch(
                states, options.mesh
            ),
            execution=LayerExecution(
                rematerialize=options.rematerialize,
                attention_fn=options.attention_fn,
                scan=options.scan,
                # Steps of a scan do not overlap: the first gather and the last
                # all-to-all of each are exposed.
                layers_per_step=2 if options.all_to_all else 1,
                embedding_fn=_embedding_fn(lm.backbone, options.mesh),
            ),
        )
        if lm.lm_head.quantization_mode is not None:
            return chunked_cross_entropy_of_head(
                lm.lm_head,
                hidden,
                targets,
                weights,
                options.z_loss,
                options.loss_chunks,
            )
        kernel = jnp.asarray(lm.lm_head.kernel).astype(hidden.dtype)
        return chunked_cross_entropy(
            hidden,
            kernel,
            targets,
            weights,
            options.z_loss,
            options.loss_chunks,
            options.mesh,
        )


def _embedding_fn(backbone, mesh):
    """Returns the embedding lookup on a mesh; `None` to use the layer itself."""
    layer = backbone.token_embedding
    if mesh is None or layer.quantization_mode is not None:
        return None
    return lambda token_ids: embedding_lookup(
        jnp.asarray(layer.embeddings), token_ids, mesh, layer.compute_dtype
    )


def _shard_by_batch(states, mesh):
    """Shards hidden states by the batch; XLA might replicate them otherwise."""
    if mesh is None:
        return states
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    return jax.lax.with_sharding_constraint(states, sharding)


def compute_gradients(
    lm: CausalLM,
    trainable: list,
    non_trainable: list,
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
    options: TrainStepOptions = TrainStepOptions(),  # noqa: B008
    loss_scale: Tensor | None = None,
) -> tuple[LossSums, Tensor, list]:
    """Computes the gradients of the mean loss over the targets of a batch.

    Args:
        lm: `OpenLlamaCausalLM`.
        trainable: values of its trainable variables.
        non_trainable: values of its non-trainable variables.
        batch: see `loss_sums`.
        options: options of the step.
        loss_scale: factor of the gradients, which float16 needs; `None` is 1.

    Returns:
        The sums over the batch; the sum of its weights; and the gradients, in the
        dtypes of the trainable variables.

    Raises:
        ValueError: if `micro_batches` does not divide the batch size.
    """
    batch_size = batch[1].shape[0]
    if batch_size % options.micro_batches:
        raise ValueError(
            "`micro_batches` must divide the batch size. Received: "
            f"micro_batches={options.micro_batches}, batch_size={batch_size}"
        )
    total = jnp.maximum(jnp.sum(batch[2]), 1e-9)  # Without targets, the gradient is 0.

    def loss(values, part):
        sums = loss_sums(lm, (values, non_trainable), part, options)
        mean = sums.loss / total
        return (mean if loss_scale is None else mean * loss_scale), sums

    gradient = jax.grad(loss, has_aux=True)
    if options.micro_batches == 1:
        grads, sums = gradient(trainable, batch)
        return sums, total, grads

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, gradient(trainable, part)), None

    parts = jax.tree.map(lambda a: split_micro_batches(a, options.micro_batches), batch)
    shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda a: a[0], parts))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, start, parts)
    return sums, total, grads


def split_micro_batches(array: Tensor, micro_batches: int) -> Tensor:
    """Splits a batch into micro-batches, each with sequences of every device.

    Args:
        array: `(batch, …)`.
        micro_batches: number of micro-batches, a divisor of `batch`.

    Returns:
        `(micro_batches, batch / micro_batches, …)`.

    Example:
        >>> split_micro_batches(jnp.arange(4), 2)
        Array([[0, 2],
               [1, 3]], dtype=int32)
    """
    size = array.shape[0] // micro_batches
    array = array.reshape(size, micro_batches, *array.shape[1:])
    return jnp.moveaxis(array, 1, 0)


def train_step(
    lm: CausalLM,
    state: tuple[list, list, list],
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
    options: TrainStepOptions = TrainStepOptions(),  # noqa: B008
    max_loss: Tensor | None = None,
) -> tuple[StepMetrics, tuple[list, list]]:
    """Computes one training step.

    The step is skipped if the batch has no targets, or if loss or gradient is not
    finite: the new values are then the old ones. (`LossScaleOptimizer` still reduces
    its scale if only the gradient is not finite.)

    Args:
        lm: `OpenLlamaCausalLM`, compiled.
        state: values of its trainable, its non-trainable and its optimizer's
            variables.
        batch: see `loss_sums`.
        options: options of the step.
        max_loss: float scalar; the step is skipped if the loss is larger. `None` is no
            limit.

    Returns:
        The metrics of the step, and the new values of the trainable and the optimizer's
        variables.

    Raises:
        ValueError: if `micro_batches` does not divide the batch size.
    """
    trainable, non_trainable, optimizer = state
    scale = _loss_scale(lm.optimizer, optimizer)
    sums, total, grads = compute_gradients(
        lm, trainable, non_trainable, batch, options, scale
    )
    targets = jnp.sum(batch[2])
    # The mean over nothing is not a number, and above all not the best loss of all.
    loss, accuracy = (
        jnp.where(targets > 0, value / total, jnp.nan)
        for value in (sums.loss, sums.correct)
    )
    grad_norm = global_norm(grads)
    if scale is not None:
        grad_norm /= scale
    usable = jnp.isfinite(loss)
    if max_loss is not None:
        usable &= loss <= max_loss
    applied = usable & jnp.isfinite(grad_norm)
    param_norm = global_norm(trainable)
    replaced = usable if has_dynamic_loss_scale(lm.optimizer) else applied
    new = _update_if(
        replaced,
        lambda old: lm.optimizer.stateless_apply(old[1], grads, old[0]),
        (trainable, optimizer),
        last_use=param_norm,
    )
    with keras.StatelessScope(
        state_mapping=zip(lm.optimizer.variables, optimizer, strict=True)
    ):
        learning_rate = jnp.asarray(lm.optimizer.learning_rate, "float32")
    metrics = StepMetrics(
        loss=loss,
        accuracy=accuracy,
        targets=targets,
        grad_norm=grad_norm,
        param_norm=param_norm,
        learning_rate=learning_rate,
        applied=applied,
    )
    return metrics, new


def _update_if(condition, update, old, last_use):
    """Returns `update(old)`, or `old` if the condition is False.

    XLA on a CPU would copy all old values to select from. The carry of a loop that runs
    once or never is updated in place, after `last_use`, a norm of old values.
    """

    def select(condition, old, _):
        return jax.tree.map(
            lambda a, b: jnp.where(condition, a, b), tuple(update(old)), old
        )

    def loop(condition, old, last_use):
        # Always true. XLA overwrites values only after every other use of them.
        condition &= ~(last_use < -1)

        def body(carry):
            return jnp.zeros_like(condition), tuple(update(carry[1]))

        return jax.lax.while_loop(lambda carry: carry[0], body, (condition, old))[1]

    return jax.lax.platform_dependent(
        condition, old, last_use, cpu=loop, default=select
    )


def _loss_scale(optimizer, values):
    """Returns the factor that the optimizer divides gradients by; `None` is 1."""
    if not scales_loss(optimizer):
        return None
    mapping = zip(optimizer.variables, values, strict=True)
    with keras.StatelessScope(state_mapping=mapping):
        return optimizer.scale_loss(jnp.ones((), "float32"))


def global_norm(tensors: list) -> Tensor:
    """Computes the Euclidean norm of several tensors together.

    Args:
        tensors: tensors of any shape and float dtype.

    Returns:
        float32 scalar.

    Example:
        >>> global_norm([jnp.array([3.0]), jnp.array([[4.0]])])
        Array(5., dtype=float32)
    """
    squares = [jnp.sum(jnp.square(t.astype("float32"))) for t in tensors]
    return jnp.sqrt(sum(squares))


class JaxTrainStep:
    """The train step of `OpenLlamaCausalLM` on JAX, which `fit` and `evaluate` compile.

    With the default loss and metrics it is the step of this module, which computes the
    loss in chunks. Other losses and metrics need all logits, so the step of Keras is
    used.
    """

    def train_step(self, state: tuple, data: Any) -> tuple[dict[str, Any], tuple]:
        """See `keras.Model.train_step` on JAX."""
        if not self.train_plan.fused:
            return super().train_step(state, data)
        trainable, non_trainable, optimizer, metrics = state
        batch = prepare_batch(*keras.utils.unpack_x_y_sample_weight(data))
        options = self._step_options_for_devices()
        step_metrics, (trainable, optimizer) = train_step(
            self, (trainable, non_trainable, optimizer), batch, options
        )
        logs, metrics = self._update_metrics(
            metrics, step_metrics.loss, step_metrics.accuracy, step_metrics.targets
        )
        return logs, (trainable, non_trainable, optimizer, metrics)

    def test_step(self, state: tuple, data: Any) -> tuple[dict[str, Any], tuple]:
        """See `keras.Model.test_step` on JAX."""
        if not self.train_plan.fused:
            return super().test_step(state, data)
        trainable, non_trainable, metrics = state
        batch = prepare_batch(*keras.utils.unpack_x_y_sample_weight(data))
        # Without a backward pass, there is nothing to rematerialize.
        options = self._step_options_for_devices()._replace(rematerialize="none")
        sums = loss_sums(self, (trainable, non_trainable), batch, options)
        targets = jnp.sum(batch[2])
        total = jnp.maximum(targets, 1e-9)
        logs, metrics = self._update_metrics(
            metrics, sums.loss / total, sums.correct / total, targets
        )
        return logs, (trainable, non_trainable, metrics)

    def _step_options_for_devices(self):
        options = self.train_plan.step_options
        distribution = keras.distribution.distribution()
        # XLA cannot partition attention kernels; only our layout defines how to.
        if distribution is None or isinstance(distribution, OpenLlamaParallel):
            return options_for_devices(options, distribution)
        return options

    def _update_metrics(self, metrics, loss, accuracy, targets):
        """Adds a batch to the metrics; returns their results and variables."""
        mapping = zip(self.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss, accuracy = (
                jnp.where(targets > 0, mean, 0) for mean in (loss, accuracy)
            )
            loss_tracker(self).update_state(loss, sample_weight=targets)
            for metric in compiled_metrics(self):  # Token accuracy, or none.
                metric.total.assign_add(accuracy * targets)
                metric.count.assign_add(targets)
            logs = self.get_metrics_result()
        variables = [
            v.value if (new := scope.get_current_value(v)) is None else new
            for v in self.metrics_variables
        ]
        return logs, variables


def prepare_batch(
    x: dict[str, Tensor], y: Tensor, weights: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Converts the arguments of `fit` to the batch of `loss_sums`.

    Args:
        x: dict of `"token_ids"` and `"padding_mask"`, `(batch, length)`.
        y: targets, int `(batch, length)`.
        weights: sample weights, `(batch,)` or `(batch, length)`, or `None`.

    Returns:
        `(x, targets, weights)` of int32 and float32; padding has zero weight.

    Example:
        >>> x = {"token_ids": [[1, 5]], "padding_mask": jnp.array([[1, 0]])}
        >>> prepare_batch(x, [[5, 0]])[2]
        Array([[1., 0.]], dtype=float32)
    """
    weights = target_weights(x["padding_mask"], weights)
    x = {name: jnp.asarray(x[name], "int32") for name in ("token_ids", "padding_mask")}
    return x, jnp.asarray(y, "int32"), weights
