"""Projections that reduce their gradients by all-to-alls (JAX).

`tests/test_distribution.py` compares their gradients on eight devices with one device.
"""

import keras
import pytest

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

import types

import jax
import numpy as np

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.sharded_projection import (
    mesh_of_gradients,
    project_sharded,
    reduce_gradients_by_all_to_all,
)
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)


def test_reduce_gradients_by_all_to_all_applies_inside_the_block_only():
    mesh = make_mesh(devices=jax.devices()[:1]).backend_mesh
    with reduce_gradients_by_all_to_all(mesh):
        assert mesh_of_gradients() is mesh
    assert mesh_of_gradients() is None


def test_reduce_gradients_by_all_to_all_rejects_a_mesh_that_shards_the_model():
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 4, "model": 2})
    with (
        pytest.raises(ValueError, match=r"only on a mesh with model=1\. Received: "),
        reduce_gradients_by_all_to_all(mesh),
    ):
        pass


@pytest.mark.parametrize(
    ("parent", "name"), [("self_attention", "query"), ("feedforward", "down")]
)
def test_projection_has_the_gradients_of_the_default_reduction(parent, name):
    distribution = OpenLlamaParallel(make_mesh(devices=["cpu:0"]))
    scopes = keras.name_scope("transformer_layer_0"), keras.name_scope(parent)
    with distribution.scope(), scopes[0], scopes[1]:
        projection = Projection(6, 0.1, name=name)
        projection.build((None, None, 4))
    mesh = distribution.device_mesh.backend_mesh
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")

    def loss(kernel, x):
        mapping = [(projection.trainable_variables[0], kernel)]
        with keras.StatelessScope(state_mapping=mapping):
            return (projection(x) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    kernel = projection.trainable_variables[0].value
    expected = gradients(kernel, x)
    with reduce_gradients_by_all_to_all(mesh):
        program = str(jax.make_jaxpr(gradients)(kernel, x))
        found = gradients(kernel, x)
    assert "all_to_all" in program
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_project_sharded_rejects_a_kernel_that_is_not_sharded():
    distribution = OpenLlamaParallel(make_mesh(devices=["cpu:0"]))
    layout = types.SimpleNamespace(
        backend_layout=jax.sharding.NamedSharding(
            distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec()
        )
    )
    kernel = types.SimpleNamespace(path="a/kernel", _layout=layout)
    mesh = distribution.device_mesh.backend_mesh
    with pytest.raises(ValueError, match=r"sharded over fsdp\. Received: a/kernel"):
        project_sharded(np.ones((1, 2, 4)), kernel, mesh)


@pytest.mark.parametrize(
    ("sizes", "kind", "expected"),
    [
        ((1, 8, 1), "TPU v4", True),
        ((2, 4, 1), "TPU v4", False),
        ((1, 4, 2), "TPU v4", False),
        ((1, 8, 1), "TPU v6 lite", False),
        ((1, 8, 1), "cpu", False),
    ],
)
def test_options_for_devices_reduces_over_a_whole_slice_by_all_to_all(
    sizes, kind, expected
):
    device = types.SimpleNamespace(
        platform=kind.partition(" ")[0].lower(), device_kind=kind
    )
    mesh = types.SimpleNamespace(
        shape=dict(zip(("data", "fsdp", "model"), sizes, strict=True)),
        devices=np.full(sizes, device),
    )
    distribution = types.SimpleNamespace(
        device_mesh=types.SimpleNamespace(backend_mesh=mesh)
    )
    options = options_for_devices(TrainStepOptions(), distribution)
    assert options.all_to_all is expected
