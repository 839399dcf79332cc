"""The checks that KerasHub makes of each of its models, layers and preprocessors.

They follow `keras_hub/src/tests/test_case.py` of KerasHub 0.32.
"""

import json
import re

import keras
import keras_hub
import numpy as np
from keras import ops, tree

from keras_openllama.backend.keras_private import flatten_layers


def as_json(config):
    return json.dumps(config, sort_keys=True)


def shapes(structure):
    return tree.map_structure(lambda x: tuple(x.shape), structure)


def check_serialization(instance):
    """A copy by `from_config`, or by Keras's serialization, has the same config."""
    config = instance.get_config()
    is_tokenizer = isinstance(instance, keras_hub.tokenizers.Tokenizer)
    copies = [
        type(instance).from_config(instance.get_config()),
        keras.saving.deserialize_keras_object(
            json.loads(json.dumps(keras.saving.serialize_keras_object(instance)))
        ),
    ]
    for copy in copies:
        assert type(copy) is type(instance)
        assert as_json(copy.get_config()) == as_json(config)
        # TensorFlow itself sets attributes of a tokenizer when they are first read.
        if keras.config.backend() != "tensorflow" or not is_tokenizer:
            names, copied = set(dir(instance)), set(dir(copy))
            assert names - {"__annotations__"} == copied - {"__annotations__"}


def check_precision(
    make, inputs, float32_outputs=False, policies=("mixed_float16", "bfloat16")
):
    """Under each policy, tensors, weights and sublayers have its dtypes.

    Args:
        make: callable `(dtype)` that returns a layer or model.
        inputs: dict of its inputs.
        float32_outputs: whether the layer returns float32 under every policy.
        policies: names of the policies.
    """
    for name in policies:
        policy = keras.dtype_policies.get(name)
        layer = make(dtype=policy)
        is_model = isinstance(layer, keras.Model)
        arguments, options = ((inputs,), {}) if is_model else ((), inputs)
        outputs = tree.flatten(layer(*arguments, **options))
        specs = tree.flatten(layer.compute_output_spec(*arguments, **options))
        expected = "float32" if float32_outputs else policy.compute_dtype
        for tensor in outputs + specs:
            assert keras.backend.standardize_dtype(tensor.dtype) == expected, name
        for weight in layer.weights:
            assert weight.dtype == policy.variable_dtype, (name, weight.path)
        for part in flatten_layers(layer):
            if not isinstance(part, keras.layers.InputLayer):
                dtypes = part.compute_dtype, part.variable_dtype
                assert dtypes == (policy.compute_dtype, policy.variable_dtype), part


def check_layer(cls, arguments, inputs, output_shape, num_weights, **options):
    """A layer is built by shapes, by symbols and by tensors, and it trains.

    Args:
        cls: the class.
        arguments: of its constructor.
        inputs: dict of the tensors of a call, by name.
        output_shape: expected shape, or a tuple of them.
        num_weights: expected number of trainable weights; there are no others.
        **options: see `check_precision`.
    """
    check_serialization(cls(**arguments))
    by_name = {f"{name}_shape": tuple(x.shape) for name, x in inputs.items()}
    built = cls(**arguments)
    if len(by_name) == 1:
        built.build(*by_name.values())
        assert built.compute_output_shape(*by_name.values()) == output_shape
    else:
        built.build(**by_name)
        assert built.compute_output_shape(**by_name) == output_shape
    symbolic, eager = cls(**arguments), cls(**arguments)
    symbols = {n: keras.KerasTensor(x.shape, x.dtype) for n, x in inputs.items()}
    assert shapes(symbolic(**symbols)) == output_shape
    outputs = eager(**inputs)
    assert shapes(outputs) == output_shape
    for layer in (built, symbolic, eager):
        assert layer.built
        assert len(layer.trainable_weights) == num_weights
        assert not layer.non_trainable_variables
    if num_weights:
        _check_training(eager, inputs, outputs)
    check_precision(lambda dtype: cls(**arguments, dtype=dtype), inputs, **options)


def _check_training(layer, inputs, outputs):
    class OneLayer(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def call(self, x):
            return self.layer(**x)

    model = OneLayer()
    jit_compile = keras.config.backend() != "torch"
    model.compile(optimizer="sgd", loss="mse", jit_compile=jit_compile)
    data = tree.map_structure(ops.convert_to_numpy, (dict(inputs), outputs))
    assert np.isfinite(model.fit(*data, verbose=0).history["loss"][0])


def check_backbone(cls, arguments, inputs, output_shape):
    """A backbone takes each length, predicts, and is named after its class.

    Args:
        cls: the class.
        arguments: of its constructor.
        inputs: dict of its inputs, each `(batch, length)`.
        output_shape: expected shape.
    """
    backbone = cls(**arguments)
    check_serialization(backbone)
    assert shapes(backbone(inputs)) == output_shape
    assert backbone.token_embedding(ops.zeros((2, 3), "int32")).shape[:2] == (2, 3)
    for length in (2, 4):
        backbone({name: x[:, :length] for name, x in inputs.items()})
    arrays = tree.map_structure(ops.convert_to_numpy, inputs)
    assert backbone.predict(arrays, verbose=0).shape == output_shape
    words = re.findall("[A-Z][a-z]+", cls.__name__)
    assert re.match("_".join(words).lower(), backbone.name)


def check_quantization(make, layer_types, inputs):
    """A model is created with quantized layers, restored, and takes their weights.

    Args:
        make: callable `(dtype)` that returns a model.
        layer_types: dict from a quantization mode to classes of layers.
        inputs: of a call.
    """
    for mode, types in layer_types.items():
        policies = keras.dtype_policies.DTypePolicyMap("float32")
        for layer in flatten_layers(make(dtype="float32")):
            if type(layer) in types:
                policies[layer.path] = keras.dtype_policies.get(f"{mode}_from_float32")
        model = make(dtype=policies)
        outputs = ops.convert_to_numpy(model(inputs))
        modes = {x.quantization_mode for x in flatten_layers(model) if type(x) in types}
        assert modes == {mode}
        copy = type(model).from_config(model.get_config())
        assert copy.get_config() == model.get_config()
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(ops.convert_to_numpy(copy(inputs)), outputs)


def check_task(task, texts, output_shape):
    """A task predicts and trains on texts, on batches, and on preprocessed batches.

    Args:
        task: the task.
        texts: a list of strings.
        output_shape: expected shape of their predictions.
    """
    check_serialization(task)
    preprocessor = task.preprocessor
    x, y, weights = preprocessor(texts)
    tree.assert_same_structure(x, task.input, check_types=False)
    predicted = task.predict(texts, verbose=0)
    assert predicted.shape == output_shape
    task.fit(texts, batch_size=2, verbose=0)
    task.preprocessor = None
    task.fit(x, y, sample_weight=weights, batch_size=2, verbose=0)
    again = task.predict(x, verbose=0)
    assert again.shape == output_shape
    assert not np.array_equal(again, predicted)  # It was trained.
    task.preprocessor = preprocessor
    np.testing.assert_array_equal(task.predict(texts, verbose=0), again)


def check_preprocessor(make, texts, expected):
    """A preprocessor returns the same for texts, batches and elements of a source.

    Args:
        make: callable that returns a preprocessor.
        texts: a list of strings.
        expected: `(x, y, sample_weight)`, arrays.
    """
    layer = make()
    check_serialization(layer)
    outputs = layer(texts)
    tree.map_structure(np.testing.assert_array_equal, outputs, expected)
    one_by_one = [layer(text) for text in texts]
    stacked = tree.map_structure(lambda *x: np.stack(x), *one_by_one)
    tree.map_structure(np.testing.assert_array_equal, stacked, outputs)
    for array in tree.flatten((outputs, one_by_one)):
        assert type(array) is np.ndarray  # Grain's processes pickle them.
    layer.sequence_length = 17
    x, _, _ = layer(texts)
    assert x["token_ids"].shape[-1] == 17
