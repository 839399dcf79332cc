"""Decoding with static shapes on PyTorch, here without CUDA graphs.

On a GPU, `benchmarks/gpu_check` runs the same steps captured.
"""

import gc

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import keras_hub
import tiny_models
import torch

from keras_openllama import SamplingConfig
from keras_openllama.backend.keras_private import kernel_variable
from keras_openllama.generation import generate as generation
from keras_openllama.generation.pytorch import token_loop as token_loop_torch
from keras_openllama.generation.pytorch.decoder import TorchDecoder
from keras_openllama.generation.pytorch.network import weights_key

STOP_IDS = [5, 7, 9, 11, 13]


@pytest.fixture(autouse=True)
def decode_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(token_loop_torch, "DECODING", {"cpu": "captured"})
    monkeypatch.setattr(generation, "uses_onnx_runtime", lambda model: False)


def generate(lm, lengths=(3, 12, 7), new=30, stop_token_ids=STOP_IDS):
    ids = tiny_models.batch(tiny_models.SHAPES[0], len(lengths), max(lengths))
    mask = tiny_models.right_padding(lengths, max(lengths))
    return lm.generate(
        {"token_ids": ids, "padding_mask": mask},
        max_new_tokens=new,
        stop_token_ids=stop_token_ids,
    )["token_ids"].tolist()


def sample(lm, lengths=(3, 12, 7)):
    ids = tiny_models.batch(tiny_models.SHAPES[0], len(lengths), max(lengths))
    mask = tiny_models.right_padding(lengths, max(lengths))
    configs = [
        SamplingConfig(1.2, top_k=40, frequency_penalty=0.3, seed=1),
        SamplingConfig(temperature=0, repetition_penalty=1.4),
        SamplingConfig(temperature=0),
    ]
    results = lm.generate(
        {"token_ids": ids, "padding_mask": mask},
        max_new_tokens=20,
        stop_token_ids=STOP_IDS,
        sampling=configs,
        logprobs=2,
    )
    return [result.token_ids for result in results], results[0].logprobs


def with_eager_steps(monkeypatch, run):
    """The result of the steps that CPUs run."""
    with monkeypatch.context() as context:
        context.setattr(token_loop_torch, "DECODING", {})
        return run()


def test_torch_decoder_samples_as_eager_steps_do(monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    expected, expected_logprobs = with_eager_steps(monkeypatch, lambda: sample(lm))
    found, logprobs = sample(lm)
    assert found == expected
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def free_decoders(lm):
    return lm.make_generate_function()._free_decoders


@pytest.mark.parametrize("shape", tiny_models.SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [(1,), (9,), (3, 12, 7)], ids=str)
def test_torch_decoder_equals_eager_steps(shape, lengths, monkeypatch):
    lm = tiny_models.random_lm(shape)
    expected = with_eager_steps(monkeypatch, lambda: generate(lm, lengths))
    assert generate(lm, lengths) == expected
    assert len(free_decoders(lm)) == 1
    assert generate(lm, lengths) == expected  # With the same buffers.


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize("decoding", ["captured", "eager"])
def test_torch_decoder_computes_in_the_dtype_of_the_model(dtype, decoding, monkeypatch):
    monkeypatch.setattr(token_loop_torch, "DECODING", {"cpu": decoding})
    lm = tiny_models.random_lm(tiny_models.SHAPES[2], dtype=dtype)
    for row, length in zip(generate(lm, new=8), (3, 12, 7), strict=True):
        # By the Keras layers, each new token has the largest logit up to rounding.
        ids = torch.tensor([row[: length + 8]])
        logits = lm.score(ids)[0, length - 1 : -1].float()
        chosen = logits.gather(-1, ids[0, length:, None])[:, 0]
        best = logits.max(dim=-1).values
        assert (best - chosen < 0.05 * logits.std()).all()


@pytest.mark.parametrize("shape", tiny_models.SHAPES, ids=str)
def test_torch_decoder_with_int8_cache_equals_eager_steps(shape, monkeypatch):
    lm = tiny_models.random_lm(shape)
    lm.compile(kv_cache_dtype="int8")
    expected = with_eager_steps(monkeypatch, lambda: generate(lm))
    assert generate(lm) == expected
    [decoder] = free_decoders(lm)
    assert {x.dtype for x in decoder.cache[0]} == {torch.int8, torch.float32}


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_torch_decoder_scales_positions(rope_type, monkeypatch):
    scaling = {"rope_type": rope_type, "factor": 2.0}
    lm = tiny_models.random_lm(
        tiny_models.SHAPES[0], rope_scaling=scaling, max_sequence_length=16
    )
    expected = with_eager_steps(monkeypatch, lambda: generate(lm, new=20))
    assert generate(lm, new=20) == expected


def test_torch_decoder_reads_more_columns_as_they_fill(monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    used = []
    compute = TorchDecoder._compute
    monkeypatch.setattr(
        TorchDecoder,
        "_compute",
        lambda self, columns, greedy: (
            used.append(columns) or compute(self, columns, greedy)
        ),
    )
    long = {"lengths": (250, 200), "new": 20, "stop_token_ids": None}
    expected = with_eager_steps(monkeypatch, lambda: generate(lm, **long))
    assert used == [*range(250, 270)]  # Not padded on a CPU.
    used.clear()
    assert generate(lm, **long) == expected
    assert sorted(set(used)) == [256, 512]
    assert used == sorted(used)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_torch_decoder_computes_quantized_layers_with_keras(mode, monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.quantize(mode)
    expected = with_eager_steps(monkeypatch, lambda: generate(lm))
    assert generate(lm) == expected


def test_torch_decoder_adopts_changed_weights_and_adapters(monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[2])
    before = generate(lm)
    kernel = kernel_variable(lm.backbone.transformer_layers[0].feedforward.up)
    kernel.assign(-kernel.value)
    changed = generate(lm)
    assert changed != before
    assert changed == with_eager_steps(monkeypatch, lambda: generate(lm))
    lm.backbone.enable_lora(rank=2)
    for weight in lm.trainable_weights:
        weight.assign(0.3 * torch.randn(weight.shape))
    adapted = generate(lm)
    assert adapted != changed
    assert adapted == with_eager_steps(monkeypatch, lambda: generate(lm))


def test_weights_key_changes_with_variables_but_not_with_values():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    before = weights_key(lm)
    weight = lm.weights[0]
    weight.assign(2 * weight.value)
    assert weights_key(lm) == before
    lm.backbone.enable_lora(rank=2)
    assert weights_key(lm) != before


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: keras_hub.samplers.TopKSampler(k=5, seed=3),
        lambda: keras_hub.samplers.TopPSampler(p=0.9, seed=3),
        lambda: keras_hub.samplers.RandomSampler(temperature=0.0),
    ],
    ids=["top_k", "top_p", "temperature_0"],
)
def test_torch_decoder_samples_with_the_seed_of_the_sampler(make_sampler, monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    # Without padding of the batch, whose random numbers are drawn as well.
    inputs = {"lengths": (3, 12, 7, 4), "stop_token_ids": None}

    def run():
        lm.compile(sampler=make_sampler())
        return generate(lm, **inputs)

    assert run() == with_eager_steps(monkeypatch, run)


def test_generations_in_progress_have_their_own_decoders():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    loop = lm.make_generate_function()
    prompts = [[3, 4, 8], [9, 10, 14]]
    expected = [next(loop.generate([ids], [12], []))[0] for ids in prompts]
    both = [loop.generate([ids], [12], [], stride=2) for ids in prompts]
    found = [[], []]
    for _ in range(6):
        for tokens, steps in zip(found, both, strict=True):
            [new] = next(steps)
            tokens += new
    assert found == expected
    del both, steps
    gc.collect()
    assert len(loop._free_decoders) == 2


def test_decoders_with_large_caches_are_not_kept(monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    generate(lm, lengths=(5,), new=3)
    (small,) = free_decoders(lm)
    monkeypatch.setattr(
        token_loop_torch, "kept_cache_bytes", lambda device: 2 * small.nbytes
    )
    generate(lm, lengths=(5,) * 8, new=3)
    assert free_decoders(lm) == []
    generate(lm, lengths=(5,), new=3)
    assert len(free_decoders(lm)) == 1


def test_generate_in_inference_mode_and_outside():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    with torch.inference_mode():
        found = generate(lm, new=8)
        more = generate(lm, new=8, stop_token_ids=None)
    # With the same buffers, which must not be tensors of inference mode.
    assert generate(lm, new=8) == found
    assert generate(lm, new=8, stop_token_ids=None) == more
    assert len(free_decoders(lm)) == 1


def test_torch_decoder_forgets_the_cache_of_earlier_generations():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    expected = generate(lm, new=8)
    for keys, values in free_decoders(lm)[0].cache:
        keys.fill_(float("nan"))  # As after an overflow in float16.
        values.fill_(float("inf"))
    assert generate(lm, new=8) == expected


def test_decoders_of_another_device_are_dropped():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    expected = generate(lm, new=8)
    (decoder,) = free_decoders(lm)
    decoder.device = torch.device("meta")  # As if the model had been there then.
    assert generate(lm, new=8) == expected
    (new,) = free_decoders(lm)
    assert new is not decoder


@pytest.mark.parametrize("change", ["none", "int8", "adapters"])
def test_torch_decoder_does_not_capture_layers_of_keras(change, monkeypatch):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    if change == "int8":
        lm.quantize("int8")
    elif change == "adapters":
        lm.backbone.token_embedding.enable_lora(2)
    expected = generate(lm, new=8)
    captured = []
    monkeypatch.setattr(
        TorchDecoder,
        "_capture",
        lambda self, *key: captured.append(key) or (None, None),
    )
    free_decoders(lm)[0]._can_capture = True  # As on a GPU.
    assert generate(lm, new=8) == expected
    assert bool(captured) == (change == "none")
