"""Each unexported name of Keras that the package uses behaves as expected."""

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.backend import keras_private

BACKEND = keras.config.backend()


def dense_model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])


def variable(value=(1.0, 2.0), **options):
    return keras.Variable(np.array(value, "float32"), **options)


def test_flatten_layers_returns_nested_layers_in_order():
    inner = dense_model()
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dropout(0.1)])
    layers = list(keras_private.flatten_layers(model))
    assert layers[0] is model
    assert {id(inner.layers[-1]), id(model.layers[-1])} <= set(map(id, layers))
    inside = list(keras_private.flatten_layers(model, include_self=False))
    assert inside == layers[1:]


def test_kernel_variable_is_the_kernel_without_adapters():
    layer = keras.layers.EinsumDense("ab,bc->ac", (2,))
    layer.build((None, 3))
    kernel = layer.kernel
    layer.enable_lora(1)
    assert keras_private.kernel_variable(layer) is kernel
    assert layer.kernel is not kernel


def test_embeddings_variable_is_the_table_without_adapters():
    layer = keras.layers.Embedding(5, 3)
    layer.build((None,))
    embeddings = layer.embeddings
    layer.enable_lora(1)
    assert keras_private.embeddings_variable(layer) is embeddings
    assert layer.embeddings is not embeddings


def test_variables_of_a_built_layer_are_untracked_and_tracked():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    layer(np.ones((1, 3), "float32"))
    kernel, bias = layer.variables
    keras_private.untrack_variables(layer, [bias])
    assert [v.path for v in layer.variables] == [kernel.path]
    keras_private.track_variables(layer, [bias])
    assert [v.path for v in layer.variables] == [kernel.path, bias.path]
    with pytest.raises(ValueError, match="cannot add new elements"):
        layer.another = variable()  # Locked again.


@pytest.mark.backend_free
def test_is_selected_and_finish_quantization_do_what_quantize_does():
    layer = keras.layers.Dense(2, name="gate")
    for filters in (None, "gate", ["up", "ga"], lambda layer: layer.units == 2):
        assert keras_private.is_selected(layer, filters)
    assert not keras_private.is_selected(layer, "up")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0)
    assert model.train_function is not None
    keras_private.finish_quantization(model, "int8")
    assert model.train_function is None


@pytest.mark.skipif(BACKEND != "torch", reason="Only PyTorch has parameters.")
def test_register_torch_parameters_makes_variables_parameters():
    with keras_private.collect_uninitialized_variables():
        with keras.StatelessScope(initialize_variables=False):
            model = dense_model()
    for weight in model.weights:
        keras_private.initialize_deferred(weight)
    keras_private.register_torch_parameters(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert parameters == {id(weight.value) for weight in model.weights}


def test_variable_layout_is_what_was_set():
    weight = variable()
    assert keras_private.variable_layout(weight) is None
    keras_private.set_variable_layout(weight, "layout")
    assert keras_private.variable_layout(weight) == "layout"


@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes on JAX only.")
def test_variable_layout_is_set_by_a_distribution():
    mesh = keras.distribution.DeviceMesh((1,), ("batch",), [ops.ones(()).device])
    with keras.distribution.DataParallel(mesh).scope():
        weight = variable()
    assert keras_private.variable_layout(weight) is not None


def test_stored_value_ignores_a_stateless_scope():
    weight = variable()
    stored = keras_private.stored_value(weight)
    with keras.StatelessScope(state_mapping=[(weight, ops.zeros((2,)))]):
        assert keras_private.stored_value(weight) is stored
        assert ops.convert_to_numpy(weight.value).tolist() == [0, 0]
    np.testing.assert_array_equal(ops.convert_to_numpy(stored), [1, 2])


def test_disable_autocast_keeps_float32_in_a_mixed_layer():
    class Dtypes(keras.layers.Layer):
        def build(self, input_shape):
            self.cast = self.add_weight(shape=())
            self.uncast = self.add_weight(shape=())
            keras_private.disable_autocast(self.uncast)

        def call(self, x):
            seen.extend(keras.backend.standardize_dtype(v.value.dtype) for v in own)
            return x

    seen = []
    layer = Dtypes(dtype="mixed_bfloat16")
    layer.build((1,))
    own = (layer.cast, layer.uncast)
    layer(np.ones((1,), "float32"))
    assert seen[-2:] == ["bfloat16", "float32"]


def test_uninitialized_variables_are_collected_and_then_initialized():
    before = keras_private.uninitialized_variables()
    assert not keras_private.in_stateless_scope()
    with keras_private.collect_uninitialized_variables() as created:
        with keras.StatelessScope(initialize_variables=False):
            assert keras_private.in_stateless_scope()
            first = keras.Variable("zeros", shape=(2,), dtype="float32")
            second = keras.Variable("ones", shape=(2,), dtype="float32")
            assert len(keras_private.uninitialized_variables()) == 2
    assert keras_private.uninitialized_variables() == before
    assert [id(v) for v in created] == [id(first), id(second)]
    assert keras_private.stored_value(first) is None

    value = ops.convert_to_tensor(np.array([3.0, 4.0], "float32"))
    if BACKEND == "torch":
        import torch

        value = torch.nn.Parameter(value)
    keras_private.initialize_with(first, value)
    keras_private.initialize_deferred(second)
    np.testing.assert_array_equal(ops.convert_to_numpy(first), [3, 4])
    np.testing.assert_array_equal(ops.convert_to_numpy(second), [1, 1])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="JAX and PyTorch.")
def test_replace_value_keeps_the_variable_and_its_parameter():
    weight = variable()
    stored = keras_private.stored_value(weight)
    keras_private.replace_value(weight, ops.convert_to_tensor([5.0, 6.0]))
    np.testing.assert_array_equal(ops.convert_to_numpy(weight), [5, 6])
    if BACKEND == "torch":
        assert keras_private.stored_value(weight) is stored
    weight.assign([7.0, 8.0])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight), [7, 8])


def test_uninitialized_variables_are_restored_after_an_error():
    before = keras_private.uninitialized_variables()
    with pytest.raises(RuntimeError, match="on purpose"):
        with keras_private.collect_uninitialized_variables() as created:
            with keras.StatelessScope(initialize_variables=False):
                keras.Variable("zeros", shape=(2,), dtype="float32")
                raise RuntimeError("on purpose")
    assert not created
    assert keras_private.uninitialized_variables() == before


def test_loss_tracker_and_compiled_metrics_are_those_of_compile():
    model = dense_model()
    model.compile("sgd", "mse", metrics=["mae"])
    history = model.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0).history
    assert keras_private.loss_tracker(model) in model.metrics
    loss = float(keras_private.loss_tracker(model).result())
    assert loss == pytest.approx(history["loss"][0])
    (metric,) = keras_private.compiled_metrics(model)
    assert metric.name == "mae"


def test_optimized_variables_are_those_the_optimizer_was_built_for():
    weight = variable()
    optimizer = keras.optimizers.AdamW()
    assert list(keras_private.optimized_variables(optimizer)) == []
    optimizer.build([weight])
    assert [id(v) for v in keras_private.optimized_variables(optimizer)] == [id(weight)]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_moments_are_those_of_the_variable(amsgrad):
    first, second = variable(), variable((3.0, 4.0, 5.0))
    optimizer = keras.optimizers.Adam(
        0.1, beta_1=0.5, beta_2=0.75, amsgrad=amsgrad, epsilon=1e-8
    )
    optimizer.build([first, second])
    gradients = [ops.zeros((2,)), ops.full((3,), 2.0)]
    optimizer.apply(gradients, [first, second])
    mean, square, largest = keras_private.adam_moments(optimizer, second)
    np.testing.assert_allclose(ops.convert_to_numpy(mean), [1, 1, 1])
    np.testing.assert_allclose(ops.convert_to_numpy(square), [1, 1, 1])
    assert (largest is not None) == amsgrad
    if amsgrad:
        np.testing.assert_allclose(ops.convert_to_numpy(largest), [1, 1, 1])


def test_save_state_passes_every_variable_to_a_store_except_of_skipped_layers():
    class Paths(keras_private.H5IOStore):
        def __init__(self):
            self.paths, self.group = [], None

        def __bool__(self):
            return True

        def make(self, path, metadata=None):
            self.group = path
            return self

        def __setitem__(self, key, value):
            self.paths.append(f"{self.group}/vars/{key}")

    model = dense_model()
    store, skipping = Paths(), Paths()
    keras_private.save_state(model, store)
    assert store.paths == ["layers/dense/vars/0", "layers/dense/vars/1"]
    keras_private.save_state(model, skipping, model.layers)
    assert skipping.paths == []


def test_open_hdf5_files_with_opens_the_files_that_keras_writes(tmp_path):
    opened = []

    def open_file(path, mode):
        opened.append((path, mode))
        return h5py.File(path, mode)

    model, path = dense_model(), str(tmp_path / "model.weights.h5")
    with keras_private.open_hdf5_files_with(open_file):
        model.save_weights(path)
        model.load_weights(path)  # Opened as always.
    model.save_weights(tmp_path / "other.weights.h5")
    assert opened == [(path, "w")]


@pytest.mark.skipif(BACKEND != "torch", reason="Of PyTorch alone.")
def test_torch_device_and_dtype_are_those_of_keras_tensors():
    import torch

    tensor = ops.ones((1,), "bfloat16")
    assert tensor.device.type == torch.device(keras_private.torch_device()).type
    assert keras_private.torch_dtype("bfloat16") == tensor.dtype


def test_tensorflow_availability_is_restored():
    lazy = keras_private.module_utils.tensorflow
    known = lazy.__dict__["_available"]
    with keras_private.preserve_tensorflow_availability():
        lazy.__dict__["_available"] = "changed"
        assert lazy.available == "changed"  # Keras reads this attribute.
    assert lazy.__dict__["_available"] is known
