"""The training step on JAX: what `fit` compiles, and pretraining, and its plan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.backend.keras_private import compiled_metrics, loss_tracker
from keras_openllama.distribution import BATCH_AXES, OpenLlamaParallel
from keras_openllama.layers.attention_kernels import select_attention
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.layers.sharded_embedding import embedding_lookup
from keras_openllama.training.chunked_loss import chunked_cross_entropy
from keras_openllama.training.step_metrics import StepMetrics
from keras_openllama.training.target_weights import target_weights


class TrainStepOptions(NamedTuple):
    """How a step is computed; none of it changes what is computed, but `z_loss`.

    Attributes:
        micro_batches: int, parts of the batch that follow each other, so that the
            activations of one part are in memory. One update for all.
        rematerialize: string, one of `config.REMATERIALIZATION`.
        z_loss: float, weight of the squared log of the softmax's denominator.
        mesh: `jax.sharding.Mesh` with the axes of `distribution.make_mesh`; `None` for
            one device.
        loss_chunks: int, see `chunked_loss.chunked_cross_entropy`.
        attend: callable of `attention_kernels.select_attention`, or `None` for what
            every platform can compute.
        scan: bool, whether the layers are a scan, which compiles sooner; one after the
            other they are faster on CPUs.
    """

    micro_batches: int = 1
    rematerialize: str = "none"
    z_loss: float = 0.0
    mesh: jax.sharding.Mesh | None = None
    loss_chunks: int | None = None
    attend: object = None
    scan: bool = False


def options_for_devices(options, distribution=None):
    """Options for the devices that a step will run on.

    Args:
        options: `TrainStepOptions`.
        distribution: `OpenLlamaParallel`, or `None` for JAX's default device.

    Returns:
        `TrainStepOptions` with the mesh, the fastest attention kernel, and on TPUs a
        scan over the layers.
    """
    mesh, device = None, jax.devices()[0]
    if distribution is not None:
        mesh = distribution.device_mesh.backend_mesh
        device = mesh.devices.flat[0]
    return options._replace(
        mesh=mesh, attend=select_attention(device, mesh), scan=device.platform == "tpu"
    )


def loss_sums(lm, values, batch, options):
    """The sums of `chunked_loss.chunked_cross_entropy` over a batch.

    Args:
        lm: `OpenLlamaCausalLM`.
        values: pair of lists, values of its trainable and non-trainable variables.
        batch: `(x, targets, weights)`: a dict of int `"token_ids"` and
            `"padding_mask"`, int targets, float32 weights; all `(batch, length)`.
        options: `TrainStepOptions`.

    Returns:
        `step_metrics.LossSums`.

    Raises:
        ValueError: if the head is quantized.
    """
    if lm.lm_head.quantization_mode is not None:
        raise ValueError(
            "The loss is computed from the head's kernel, and that is quantized: "
            f"{lm.lm_head.quantization_mode!r}. Call `compile` after `quantize`."
        )
    x, targets, weights = batch
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    mapping = zip(variables, [*values[0], *values[1]], strict=True)
    with keras.StatelessScope(state_mapping=mapping):
        hidden = lm.backbone.hidden_states(
            x["token_ids"],
            x["padding_mask"],
            layer_intercept_fn=lambda states, index: _sharded(states, options.mesh),
            execution=LayerExecution(
                rematerialize=options.rematerialize,
                attention_fn=options.attend,
                scan=options.scan,
                embedding_fn=_embed(lm.backbone, options.mesh),
            ),
        )
        kernel = jnp.asarray(lm.lm_head.kernel).astype(hidden.dtype)
        return chunked_cross_entropy(
            *(hidden, kernel, targets, weights),
            options.z_loss,
            options.loss_chunks,
            options.mesh,
        )


def _embed(backbone, mesh):
    """What looks up embeddings on a mesh; `None` where the layer itself does."""
    layer = backbone.token_embedding
    if mesh is None or layer.quantization_mode is not None:
        return None
    return lambda token_ids: embedding_lookup(
        jnp.asarray(layer.embeddings), token_ids, mesh, layer.compute_dtype
    )


def _sharded(states, mesh):
    """Hidden states by rows, else XLA may hold those of all rows on every device."""
    if mesh is None:
        return states
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    return jax.lax.with_sharding_constraint(states, sharding)


def compute_gradients(lm, trainable, non_trainable, batch, options=TrainStepOptions()):  # noqa: B008
    """Loss and gradient of a batch: the mean over its targets.

    Args:
        lm: `OpenLlamaCausalLM`.
        trainable, non_trainable: lists, values of its variables.
        batch: see `loss_sums`.
        options: `TrainStepOptions`.

    Returns:
        `step_metrics.LossSums` of the batch, the sum of its weights, and the gradients,
        float32 or of the variables' dtype, of the mean loss.

    Raises:
        ValueError: if the micro-batches do not divide the rows.
    """
    rows = batch[1].shape[0]
    if rows % options.micro_batches:
        raise ValueError(
            "`micro_batches` divides the rows of a batch. Received: "
            f"micro_batches={options.micro_batches}, rows={rows}"
        )
    total = jnp.maximum(jnp.sum(batch[2]), 1e-9)  # No target at all: no gradient.

    def loss(values, part):
        sums = loss_sums(lm, (values, non_trainable), part, options)
        return sums.loss / total, sums

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


def split_micro_batches(array, parts):
    """`(batch, …)` to `(parts, batch / parts, …)`, each with rows of every device."""
    array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
    return jnp.moveaxis(array, 1, 0)


def train_step(lm, state, batch, options=TrainStepOptions(), limit=None):  # noqa: B008
    """One step of training.

    Args:
        lm: `OpenLlamaCausalLM`, compiled.
        state: triple of lists: values of its trainable, its non-trainable and its
            optimizer's variables.
        batch: see `loss_sums`.
        options: `TrainStepOptions`.
        limit: float scalar; a loss above it skips the step. `None` is no limit.

    Returns:
        `StepMetrics`, and the new trainable and optimizer values.
    """
    trainable, non_trainable, optimizer = state
    sums, total, grads = compute_gradients(lm, trainable, non_trainable, batch, options)
    loss, grad_norm = sums.loss / total, global_norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if limit is not None:
        applied &= loss <= limit
    new = lm.optimizer.stateless_apply(optimizer, grads, trainable)
    old = trainable, optimizer
    new = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)
    with keras.StatelessScope(
        state_mapping=zip(lm.optimizer.variables, optimizer, strict=True)
    ):
        learning_rate = jnp.asarray(lm.optimizer.learning_rate, "float32")
    metrics = StepMetrics(
        loss=loss,
        accuracy=sums.correct / total,
        targets=jnp.sum(batch[2]),
        grad_norm=grad_norm,
        param_norm=global_norm(trainable),
        learning_rate=learning_rate,
        applied=applied,
    )
    return metrics, new


def global_norm(tensors):
    """The Euclidean norm of all tensors together, in float32."""
    squares = [jnp.sum(jnp.square(t.astype("float32"))) for t in tensors]
    return jnp.sqrt(sum(squares))


class JaxTrainStep:
    """`OpenLlamaCausalLM` on JAX: `fit` and `evaluate` take the step of this module.

    They do so where the loss and the metrics are the model's own. With others, which
    want all logits, the step is Keras's.
    """

    def train_step(self, state, data):
        if not self.train_plan.fused:
            return super().train_step(state, data)
        trainable, non_trainable, optimizer, metrics = state
        batch = prepare_batch(*keras.utils.unpack_x_y_sample_weight(data))
        options = self._placed_options()
        found, (trainable, optimizer) = train_step(
            self, (trainable, non_trainable, optimizer), batch, options
        )
        logs, metrics = self._measured(
            metrics, found.loss, found.accuracy, found.targets
        )
        return logs, (trainable, non_trainable, optimizer, metrics)

    def test_step(self, state, data):
        if not self.train_plan.fused:
            return super().test_step(state, data)
        trainable, non_trainable, metrics = state
        batch = prepare_batch(*keras.utils.unpack_x_y_sample_weight(data))
        # Nothing is kept for a backward pass, and the policy is for one.
        options = self._placed_options()._replace(rematerialize="none")
        sums = loss_sums(self, (trainable, non_trainable), batch, options)
        targets = jnp.sum(batch[2])
        total = jnp.maximum(targets, 1e-9)
        logs, metrics = self._measured(
            metrics, sums.loss / total, sums.correct / total, targets
        )
        return logs, (trainable, non_trainable, metrics)

    def _placed_options(self):
        options = self.train_plan.step_options
        distribution = keras.distribution.distribution()
        # Kernels cannot be divided by XLA, and only our layout says how to.
        if distribution is None or isinstance(distribution, OpenLlamaParallel):
            return options_for_devices(options, distribution)
        return options

    def _measured(self, metrics, loss, accuracy, targets):
        """Adds a batch to the metrics: what they are now, and their variables."""
        mapping = zip(self.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss_tracker(self).update_state(loss, sample_weight=targets)
            for metric in compiled_metrics(self):  # Accuracy, or none.
                metric.total.assign_add(accuracy * targets)
                metric.count.assign_add(targets)
            logs = self.get_metrics_result()
        variables = [
            v.value if (new := scope.get_current_value(v)) is None else new
            for v in self.metrics_variables
        ]
        return logs, variables


def prepare_batch(x, y, weights=None):
    """What `fit` was given, in the form of `loss_sums`; padding weighs nothing."""
    weights = target_weights(x["padding_mask"], weights)
    x = {name: jnp.asarray(x[name], "int32") for name in ("token_ids", "padding_mask")}
    return x, jnp.asarray(y, "int32"), weights
