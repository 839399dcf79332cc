"""Names that Keras and KerasHub do not export are used in three modules only."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_openllama.backend import keras_hub

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parents[2]
ALLOWED = {
    ROOT / "keras_openllama/backend/keras_hub.py",
    ROOT / "keras_openllama/backend/keras_private.py",
    ROOT / "keras_openllama/backend/lazy_imports.py",
}


def sources(*folders):
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 5
    return sorted(set(paths) - ALLOWED - {Path(__file__)})


def trained_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.AdamW(amsgrad=True), "mse", metrics=["mae"])
    model.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0)
    return model


def unexported_names():
    """Underscore attributes of objects of Keras and KerasHub."""
    model = trained_model()
    embedding = keras.layers.Embedding(4, 2)
    embedding.build((None,))
    einsum = keras.layers.EinsumDense("ab,bc->ac", (2,))
    einsum.build((None, 3))
    objects = [
        model,
        keras.Model(model.inputs, model.outputs),
        model.layers[0],
        model.weights[0],
        model.optimizer,
        embedding,
        einsum,
        keras.KerasTensor((1,)),
        keras.StatelessScope(),
        keras.callbacks.Callback(),
        keras.distribution.DeviceMesh,
        keras.distribution.LayoutMap,
        keras.distribution.ModelParallel,
        keras.distribution.TensorLayout,
        keras.dtype_policies.get("int8_from_float32"),
        keras.metrics.Mean(),
        keras.random.SeedGenerator(0),
        keras_hub.Backbone,
        keras_hub.CausalLM,
        keras_hub.CausalLMPreprocessor,
        keras_hub.GreedySampler(),
        keras_hub.PresetLoader,
        keras_hub.KerasPresetSaver,
        keras_hub.Tokenizer,
    ]
    names = {name for thing in objects for name in dir(thing)}
    # Attributes that objects get only when used, or only backbones with adapters have.
    names |= {"_layout_map", "_lora_rank", "_available", "_save_state"}
    return {name for name in names if name.startswith("_") and name[1] != "_"}


def own_names(tree):
    """Names that the classes of a file define, as methods or attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
    return names


def uses(tree, names):
    """Yields line and name of each attribute in `names` not defined in the file."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names - own:
            yield node.lineno, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value in names - own
        ):
            yield node.lineno, node.args[1].value


def test_unexported_attributes_are_used_in_backend_only():
    names = unexported_names()
    assert {"_flatten_layers", "_value", "_kernel", "_tracker", "_momentums"} <= names
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("keras_openllama", "train", "benchmarks", "tests")
        for line, name in uses(ast.parse(path.read_text()), names)
    ]
    assert not found, "\n".join(found)


def test_uses_finds_attributes_and_names_in_strings():
    code = "class A:\n  def _own(self): layer._kernel; self._own\ngetattr(x, '_value')"
    found = set(uses(ast.parse(code), {"_kernel", "_value", "_own"}))
    assert found == {(2, "_kernel"), (3, "_value")}


def test_keras_src_is_mentioned_in_backend_only():
    found = [
        str(path.relative_to(ROOT))
        for path in sources("keras_openllama", "train", "benchmarks", "tests")
        if "keras.src" in path.read_text() or "keras_hub.src" in path.read_text()
    ]
    assert not found


def test_keras_hub_is_imported_in_backend_only():
    found = []
    for path in sources("keras_openllama", "train"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            if any(name.split(".")[0] == "keras_hub" for name in imported):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
