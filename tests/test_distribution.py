"""Training on eight devices equals training on one; layout rules and meshes."""

import dataclasses
import json
import re

import keras
import pytest
from fake_devices import run_on_eight_devices
from tiny_models import SHAPES, random_lm

from keras_openllama import OpenLlamaBackbone, presets
from keras_openllama.config import MESH_AXES
from keras_openllama.distribution import (
    OpenLlamaParallel,
    check_mesh,
    layout_map,
    make_mesh,
)

pytestmark = pytest.mark.backend_free  # Models are distributed on JAX only.

# Data, fsdp, model. The first two meshes cover each axis with several devices.
MESHES = ((2, 4, 1), (1, 4, 2), (1, 8, 1), (4, 1, 2))
OPTIONS = {
    "plain": {},
    "micro-batches, rematerialized": dict(micro_batches=4, rematerialize="full"),
    # As on TPUs.
    "a scan of layers": dict(scan=True, rematerialize="products"),
    # As on TPU slices whose `data` is 1. On a mesh with `model`, the default reduction.
    "all-to-alls": dict(
        all_to_all=True, scan=True, micro_batches=2, rematerialize="products"
    ),
}
# Each setting once; `fit` has none of them.
FEWER_OPTIONS = {
    name: OPTIONS[name] for name in ("micro-batches, rematerialized", "all-to-alls")
}
VARIABLES = 3 + 2 * 9  # Of the model below, which has two layers.
PROGRAM = """
import json, re, sys

import jax
import keras
import numpy as np

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.backend.keras_private import adam_moments
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.optimizers import AdamW
from keras_openllama.training.train_step_jax import TrainStepOptions, compute_gradients

jax.config.update("jax_disable_most_optimizations", True)  # Half the time.
devices = keras.distribution.list_devices()
assert len(devices) == 8
ROWS, LENGTH = 32, 40  # No size of the model is 40.
random = np.random.default_rng(0)
ids = random.integers(3, 192, (ROWS, LENGTH + 1), "int32")
x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH), "int32")}
weights = random.choice([0, 0.5, 1], (ROWS, LENGTH)).astype("float32")
data = x, ids[:, 1:], weights


def compiled_lm():
    keras.utils.set_random_seed(0)
    backbone = OpenLlamaBackbone(
        vocabulary_size=192,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=96,
        initializer_std=0.08,
    )
    lm = OpenLlamaCausalLM(backbone)
    lm.compile(optimizer=AdamW(1e-2))
    lm.optimizer.build(lm.trainable_variables)
    return lm


def loss_and_gradients(lm, batch, **options):
    trainable = [v.value for v in lm.trainable_variables]
    non_trainable = [v.value for v in lm.non_trainable_variables]
    sums, total, grads = jax.jit(
        lambda *values: compute_gradients(lm, *values, TrainStepOptions(**options))
    )(trainable, non_trainable, batch)
    grads = [np.asarray(g, "float64") for g in grads]
    return float(sums.loss / total), grads


def put(distribution):
    return jax.tree.map(
        lambda a: jax.device_put(a, distribution.batch_sharding(a.ndim)), data
    )


def fit(lm):
    options = dict(batch_size=ROWS, epochs=3, verbose=0)
    return lm.fit(*data[:2], sample_weight=data[2], **options).history["loss"]


def exchanged(lm, distribution):
    # Shapes of the floats that devices exchange in a step of `fit`.
    state = lm._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    step = jax.jit(lm.train_step).lower(state, put(distribution)).compile()
    lines = step.as_text().splitlines()
    lines = [l for l in lines if re.search(r" (all|collective|reduce)-[\\w-]+\\(", l)]
    return [
        [re.search(r" ([a-z-]+)\\(", line)[1], *map(int, shape.split(","))]
        for line in lines
        for shape in re.findall(r"f\\d+\\[([\\d,]+)\\]", line.split("(%")[0])
    ]


lm = compiled_lm()
expected_loss, expected = loss_and_gradients(lm, data)
results = dict(loss=[], gradients=[], parts=[], slots=[], fit={"one": fit(lm)})
for mesh in json.loads(sys.argv[1]):
    distribution = OpenLlamaParallel(make_mesh(*mesh))
    with distribution.scope():
        lm = compiled_lm()
        for options in json.loads(sys.argv[2]).values():
            if mesh[2] > 1:
                options.pop("all_to_all", None)
            loss, grads = loss_and_gradients(
                lm, put(distribution), mesh=distribution.device_mesh.backend_mesh,
                **options,
            )
            results["loss"].append(abs(loss - expected_loss) / expected_loss)
            results["gradients"].append({
                v.path: np.linalg.norm(g - e) / np.linalg.norm(e)
                for v, g, e in zip(lm.trainable_variables, grads, expected)
            })
        results["parts"].append({
            v.path: v.value.addressable_shards[0].data.size / v.value.size
            for v in lm.trainable_variables
        })
        for v in lm.trainable_variables:
            for slot in adam_moments(lm.optimizer, v)[:2]:
                same = slot.value.sharding.is_equivalent_to(v.value.sharding, v.ndim)
                results["slots"].append([slot.path, same])
        if mesh == [2, 4, 1]:
            results["fit"]["fsdp"] = fit(lm)
            results["exchanged"] = exchanged(lm, distribution)
        if mesh == [1, 4, 2]:
            results["fit"]["fsdp and model"] = fit(lm)

mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"), devices)
layouts = OpenLlamaBackbone.get_layout_map(mesh)
with keras.distribution.ModelParallel(
    layout_map=layouts, batch_dim_name="batch"
).scope():
    lm = compiled_lm()
    query = lm.backbone.transformer_layers[0].self_attention.query.kernel.value
    assert query.sharding.spec == jax.sharding.PartitionSpec("model", "batch")
    results["fit"]["get_layout_map"] = fit(lm)
print(json.dumps(results))
"""


# ----- On eight devices


@pytest.fixture(
    scope="module",
    params=[
        (MESHES[:2], FEWER_OPTIONS),
        pytest.param((MESHES, OPTIONS), marks=pytest.mark.slow),
    ],
    ids=["two meshes", "all meshes"],
)
def results(request):
    meshes, options = request.param
    arguments = map(json.dumps, request.param)
    results = json.loads(run_on_eight_devices(PROGRAM, *arguments).splitlines()[-1])
    assert len(results["loss"]) == len(meshes) * len(options)
    return {"meshes": meshes, "options": options, **results}


def test_sharded_losses_equal_those_of_one_device(results):
    assert max(results["loss"]) < 1e-5


def test_sharded_gradients_equal_those_of_one_device(results):
    cases = [(mesh, name) for mesh in results["meshes"] for name in results["options"]]
    for case, distances in zip(cases, results["gradients"], strict=True):
        assert len(distances) == VARIABLES
        for path, distance in distances.items():
            assert distance < 1e-5, (case, path)


def test_each_device_stores_its_shard_of_each_matrix(results):
    meshes = results["meshes"]
    for (_, fsdp, model), parts in zip(meshes, results["parts"], strict=True):
        for path, part in parts.items():
            assert part == (1 if path.endswith("scale") else 1 / (fsdp * model)), path


def test_optimizer_state_is_sharded_like_its_variables(results):
    assert len(results["slots"]) == 2 * VARIABLES * len(results["meshes"])
    assert [path for path, same in results["slots"] if not same] == []


@pytest.mark.parametrize("layout", ["fsdp", "fsdp and model", "get_layout_map"])
def test_sharded_fit_has_the_losses_of_one_device(results, layout):
    expected = results["fit"]["one"]
    assert expected[-1] < 0.9 * expected[0]
    assert results["fit"][layout] == pytest.approx(expected, rel=1e-5)


def test_fsdp_communicates_weights_not_activations(results):
    shapes = [shape for _, *shape in results["exchanged"]]
    assert [96, 64] in shapes  # A kernel of the feed-forward network.
    assert [s for s in shapes if 40 in s or 32 * 40 in s] == []


def test_no_whole_gradient_is_all_reduced(results):
    reduced = [shape for kind, *shape in results["exchanged"] if kind == "all-reduce"]
    assert [192, 64] not in reduced  # The gradient of the embeddings or of the head.


# ----- Rules


@pytest.mark.parametrize("width", [96, 256])
def test_get_variable_layout_shards_outputs_where_that_is_faster(width):
    lm = random_lm(dataclasses.replace(SHAPES[2], intermediate_dim=width))
    parallel = OpenLlamaParallel(one_device())
    specs = {
        variable.path.split("/")[-2]: parallel.get_variable_layout(
            variable
        ).backend_layout.spec
        for variable in lm.backbone.transformer_layers[0].trainable_variables
    }
    joint, separate = (("model", "fsdp"), None), ("model", "fsdp")
    for name in ("query", "key", "value"):
        assert tuple(specs[name]) == joint
    for name in ("gate", "up"):  # 256 is a multiple of the vector lanes, 96 is not.
        assert tuple(specs[name]) == (separate if width == 256 else joint)
    for name in ("output", "down"):
        assert tuple(specs[name]) == ("fsdp", "model")


def one_device(axes=MESH_AXES):
    return keras.distribution.DeviceMesh((1,) * len(axes), axes, ["cpu:0"])


@pytest.mark.parametrize("prefix", ["", "open_llama_causal_lm/", "a/b/"])
def test_layout_map_has_one_rule_for_each_matrix(prefix):
    lm = random_lm(SHAPES[2])
    rules = layout_map(one_device())
    used = set()
    for variable in lm.trainable_variables:
        path = prefix + variable.path
        matching = [rule for rule in rules if re.fullmatch(rule, path)]
        assert len(matching) == (variable.ndim == 2), path
        used.update(matching)
        if matching:
            assert sorted(rules[path].axes) == ["fsdp", "model"], path
    assert used == set(rules)


def test_layout_map_shards_outputs_like_the_inputs_of_the_next_matrix():
    """The outputs of one matrix are the inputs of the next, on the same mesh axis."""
    rules = layout_map(one_device())
    layer = "transformer_layer_7"
    axes = {
        name: dict(
            zip(
                ("outputs", "inputs"), rules[f"{layer}/{name}/kernel"].axes, strict=True
            )
        )
        for name in (
            *(f"self_attention/{n}" for n in ("query", "key", "value", "output")),
            *(f"feedforward/{n}" for n in ("gate", "up", "down")),
        )
    }
    for part, firsts, last in (
        ("self_attention", ("query", "key", "value"), "output"),
        ("feedforward", ("gate", "up"), "down"),
    ):
        for first in firsts:
            assert axes[f"{part}/{first}"]["outputs"] == "model"
        assert axes[f"{part}/{last}"]["inputs"] == "model"


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Needs JAX.")
def test_open_llama_parallel_rejects_a_matrix_without_a_rule():
    with OpenLlamaParallel(one_device()).scope():
        random_lm(SHAPES[2])
        with pytest.raises(ValueError, match="no rule for the matrix other/kernel"):
            keras.layers.Dense(3, name="other").build((None, 4))
        keras.layers.LayerNormalization().build((None, 4))  # Vectors need no rule.


@pytest.mark.parametrize("axes", [("batch", "model"), ("rows", "columns")])
def test_get_layout_map_accepts_other_axis_names(axes):
    data, model = axes
    rules = OpenLlamaBackbone.get_layout_map(
        one_device(axes), model_parallel_dim_name=model, data_parallel_dim_name=data
    )
    assert rules["token_embedding/embeddings"].axes == (model, data)
    output = rules["transformer_layer_0/self_attention/output/kernel"]
    assert output.axes == (data, model)
    assert rules["final_norm/scale"] is None


def test_get_layout_map_has_the_defaults_of_keras_hub():
    rules = OpenLlamaBackbone.get_layout_map(one_device(("batch", "model")))
    assert rules["lm_head/kernel"].axes == ("model", "batch")
    with pytest.raises(ValueError, match=r"no axis 'model'\. It has: batch, tensor"):
        OpenLlamaBackbone.get_layout_map(one_device(("batch", "tensor")))
    with pytest.raises(
        ValueError, match=r"no axis 'batch'\. It has: data, fsdp, model"
    ):
        OpenLlamaBackbone.get_layout_map(one_device())


# ----- Meshes


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1)),
        (dict(data=2), (2, 4, 1)),
        (dict(data=2, model=2), (2, 2, 2)),
        (dict(data=2, fsdp=4), (2, 4, 1)),
        (dict(fsdp=1, model=8), (1, 1, 8)),
    ],
    ids=str,
)
def test_make_mesh_uses_all_devices(sizes, shape):
    mesh = make_mesh(**sizes, devices=[f"cpu:{i}" for i in range(8)])
    assert tuple(mesh.shape) == shape
    assert tuple(mesh.axis_names) == ("data", "fsdp", "model")
    assert mesh.devices.reshape(-1).tolist() == [f"cpu:{i}" for i in range(8)]


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=3),
        dict(fsdp=4),
        dict(data=2, fsdp=2, model=4),
        dict(data=16),
        dict(data=-2, fsdp=-4),
        dict(data=0),
    ],
    ids=str,
)
def test_make_mesh_rejects_sizes_that_do_not_match_the_devices(sizes):
    with pytest.raises(ValueError, match=f"devices, 8.*data={sizes.get('data', 1)}, "):
        make_mesh(**sizes, devices=[f"cpu:{i}" for i in range(8)])


SIZES = dict(
    num_layers=2,
    head_dim=16,
    hidden_dim=64,
    num_query_heads=6,
    num_key_value_heads=2,
    intermediate_dim=96,
    vocabulary_size=160,
)


def mesh(data, fsdp, model):
    return dict(data=data, fsdp=fsdp, model=model)


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [(mesh(2, 4, 1), 8), (mesh(1, 4, 2), 4), (mesh(1, 1, 1), 1)],
)
def test_check_mesh_accepts_a_mesh_that_divides_all_sizes(sizes, batch_size):
    check_mesh(sizes, SIZES, batch_size)


@pytest.mark.parametrize(
    ("sizes", "change", "problem"),
    [
        (mesh(1, 8, 1), dict(hidden_dim=60), "fsdp = 8 .* hidden_dim = 60"),
        (mesh(2, 1, 4), dict(), "model = 4 .* num_query_heads = 6"),
        (mesh(2, 1, 4), dict(), "model = 4 .* num_key_value_heads = 2"),
        (
            mesh(4, 1, 2),
            dict(num_key_value_heads=None, num_query_heads=3),
            "model = 2 .* num_key_value_heads = 3",
        ),
        (
            mesh(4, 1, 2),
            dict(intermediate_dim=95),
            "model = 2 .* intermediate_dim = 95",
        ),
        (
            mesh(4, 1, 2),
            dict(vocabulary_size=161),
            "model = 2 .* vocabulary_size = 161",
        ),
        (mesh(4, 2, 1), dict(batch_size=12), "data . fsdp = 8 .* sequences .* = 12"),
        (
            mesh(4, 2, 1),
            dict(batch_size=32, micro_batches=8),
            "fsdp = 8 .* sequences .* = 4",
        ),
    ],
    ids=str,
)
def test_check_mesh_rejects_sizes_that_do_not_divide(sizes, change, problem):
    change = dict(change)
    batch_size = change.pop("batch_size", 16)
    micro_batches = change.pop("micro_batches", 1)
    with pytest.raises(ValueError, match=f"does not fit: .*{problem}"):
        check_mesh(sizes, {**SIZES, **change}, batch_size, micro_batches)


def meshes_named(error):
    """The meshes that a message suggests."""
    named = str(error).partition("that fit: ")[2]
    return [
        {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", part)}
        for part in named.split("|")
        if part
    ]


def test_check_mesh_suggests_all_meshes_that_fit():
    with pytest.raises(ValueError) as error:
        check_mesh(mesh(1, 1, 8), SIZES, 4)
    named = meshes_named(error.value)
    fitting = [
        mesh(data, fsdp, model)
        for data in (1, 2, 4, 8)
        for fsdp in (1, 2, 4, 8)
        for model in (1, 2)  # There are two key/value heads.
        if data * fsdp * model == 8 and data * fsdp <= 4
    ]
    assert sorted(map(str, named)) == sorted(map(str, fitting))
    assert len(named) == 3
    for sizes in named:
        check_mesh(sizes, SIZES, 4)


def test_check_mesh_says_that_no_mesh_fits():
    with pytest.raises(ValueError, match="No mesh of 7 devices fits"):
        check_mesh(mesh(7, 1, 1), SIZES, 8)


@pytest.mark.parametrize(
    "preset", ["open_llama_3b_v2", "open_llama_7b", "open_llama_13b"]
)
def test_check_mesh_accepts_large_presets_on_eight_devices(preset):
    check_mesh(mesh(1, 8, 1), presets.find(preset).config, 8)


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"needs the JAX backend.*'torch'"):
        OpenLlamaParallel(one_device())
