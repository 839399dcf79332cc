"""The estimate of memory: by hand, in its proportions, and in what it refuses."""

import itertools

import pytest

from keras_openllama import presets
from keras_openllama.training.memory import check, estimate, table_of_presets

pytestmark = pytest.mark.backend_free

CONFIG = dict(
    vocabulary_size=100,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=8,
    intermediate_dim=12,
)
# Of a layer: query and output 8 x 8, key and value 4 x 8, three of 12 x 8.
LAYER = 2 * 64 + 2 * 32 + 3 * 96
PARAMETERS = 2 * LAYER + 2 * 100 * 8 + 5 * 8


def test_weights_gradients_and_moments_are_counted():
    parts = estimate(CONFIG, "float32").parts
    assert parts["weights"] == parts["gradients"] == 4 * PARAMETERS
    assert parts["moments of AdamW"] == 8 * PARAMETERS


def test_parameters_are_those_of_the_presets():
    preset = presets.find("3b_v2")
    parts = estimate(preset.config, "bfloat16", lora_rank=1).parts
    assert parts["weights"] == 2 * 3_426_473_600


def test_adapters_are_float32_on_whatever_base():
    options = dict(lora_rank=3, targets=("query", "key"))
    for dtype, int8, weights in (
        ("bfloat16", False, 2 * PARAMETERS),
        # The head and the norms stay what they are.
        ("bfloat16", True, 2 * LAYER + 800 + 2 * 840),
    ):
        parts = estimate(CONFIG, dtype, int8=int8, **options).parts
        assert parts["weights"] == weights
        assert parts["adapters"] == parts["gradients"] == 4 * 3 * 2 * (16 + 12)
        assert parts["moments of AdamW"] == 2 * parts["adapters"]


def test_a_layer_keeps_its_input_and_what_the_policy_says():
    def kept(policy):
        options = dict(batch_size=3, sequence_length=5, rematerialize=policy)
        options["device"] = "accelerator"
        return estimate(CONFIG, "float32", **options).parts["activations"]

    tokens = 2 * 3 * 5 * 4
    assert kept("full") == tokens * 8
    # Query, key, value, attention, the states after it; then gate and up.
    assert kept("projections") == tokens * (8 + 8 + 4 + 4 + 8 + 8)
    assert kept("products") == tokens * (8 + 8 + 4 + 4 + 8 + 8 + 24)
    assert kept("none") > kept("products")


@pytest.mark.parametrize("name", ["3b_v2", "7b_v2", "13b"])
def test_what_saves_memory_does_so_in_the_estimate(name):
    config = presets.find(name).config
    ways = [
        dict(dtype="float32"),
        dict(dtype="float32", micro_batches=4),
        dict(dtype="float32", micro_batches=4, rematerialize="full"),
        dict(dtype="float32", lora_rank=16, micro_batches=4, rematerialize="full"),
        dict(dtype="bfloat16", lora_rank=16, micro_batches=4, rematerialize="full"),
        dict(
            dtype="bfloat16",
            lora_rank=16,
            micro_batches=4,
            rematerialize="full",
            int8=True,
        ),
    ]
    options = dict(batch_size=64, device="accelerator")
    totals = [estimate(config, **options, **way).total for way in ways]
    assert all(more > less for more, less in itertools.pairwise(totals))
    whole, half = (estimate(config, "float32", devices=n).total for n in (1, 2))
    assert half == pytest.approx(whole / 2, rel=0.02)


def test_on_a_cpu_it_is_near_what_was_measured():
    # `python benchmarks/finetune.py memory`, in MiB; what XLA computes again it
    # computes early there.
    config = dict(
        vocabulary_size=32000,
        num_layers=8,
        num_query_heads=8,
        hidden_dim=512,
        intermediate_dim=1376,
    )
    for rank, measured in ((8, 3401), (None, 4551)):
        found = estimate(config, "float32", lora_rank=rank)
        assert found.total / 2**20 == pytest.approx(measured, rel=0.15)
        again = estimate(config, "float32", lora_rank=rank, rematerialize="full")
        assert again == found


def test_other_backends_keep_all_logits():
    def logits(backend):
        options = dict(batch_size=8, sequence_length=2048, backend=backend)
        config = presets.find("7b_v2").config
        return estimate(config, "float32", **options).parts["logits"]

    assert logits("torch") == 3 * 4 * 8 * 2048 * 32000
    assert logits("jax") == 3 * 4 * (16 << 20)


def test_what_cannot_fit_is_refused_with_numbers_and_remedies():
    found = estimate(presets.find("7b_v2").config, "float32")
    with pytest.raises(ValueError) as error:
        check(found, 24 * 2**30)
    message = str(error.value)
    assert f"{found.total / 2**30:.1f} GiB" in message and "24.0 GiB" in message
    assert message.index("--lora-rank") < message.index("--int8")
    check(found, None)
    check(found, found.total * 2)


def test_the_table_has_every_preset():
    table = table_of_presets(8, 512)
    for name in presets.registry():
        assert name in table
