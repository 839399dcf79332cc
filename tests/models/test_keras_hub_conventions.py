"""The conventions of KerasHub: its checks, and the bodies of its Llama tests."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras_hub_checks import (
    check_backbone,
    check_layer,
    check_precision,
    check_preprocessor,
    check_quantization,
    check_serialization,
    check_task,
)
from tensorflow_marks import first_on_tensorflow
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
    layers,
)
from keras_openllama.layers.embedding import Embedding
from keras_openllama.layers.projection import Projection

pytestmark = pytest.mark.usefixtures("compile_fast")

SIZES = dict(
    vocabulary_size=512,
    num_layers=1,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=8,
    intermediate_dim=16,
    max_sequence_length=32,
)
TEXTS = ["The class body", "If a name"]
ONES = {name: np.ones((2, 5), "int32") for name in ("token_ids", "padding_mask")}


def make_preprocessor(**options):
    tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
    return OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=8, **options)


def make_lm(dtype=None, **options):
    backbone = OpenLlamaBackbone(**SIZES, dtype=dtype)
    return OpenLlamaCausalLM(backbone, make_preprocessor(), **options)


# ----- The checks of KerasHub's test case

ATTENTION = dict(num_query_heads=4, num_key_value_heads=2, head_dim=4)
HIDDEN = {"x": np.ones((2, 5, 8), "float32")}
TABLE = np.ones((2, 1, 5, 2), "float32")
ATTENDED = {
    **HIDDEN,
    "cos": TABLE,
    "sin": TABLE,
    "mask": np.tril(np.ones((2, 1, 5, 5), bool)),
}
LAYERS = {
    "projection": (
        *(Projection, dict(units=6, initializer_std=0.1)),
        *({"inputs": HIDDEN["x"]}, (2, 5, 6), 1),
    ),
    "norm": (layers.RMSNorm, {}, HIDDEN, (2, 5, 8), 1),
    "feed_forward": (
        *(layers.FeedForward, dict(intermediate_dim=12)),
        *(HIDDEN, (2, 5, 8), 3),
    ),
    "attention": (layers.CausalSelfAttention, ATTENTION, ATTENDED, (2, 5, 8), 4),
    "decoder": (
        *(layers.DecoderLayer, dict(**ATTENTION, intermediate_dim=12)),
        *(ATTENDED, (2, 5, 8), 9),
    ),
}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
@pytest.mark.slow_on_tensorflow
def test_layers_pass_the_checks_of_keras_hub(case):
    cls, arguments, inputs, output_shape, num_weights = case
    inputs = {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    check_layer(cls, arguments, inputs, output_shape, num_weights)


def test_rotary_embedding_passes_the_checks_of_keras_hub_in_float32():
    inputs = {"positions": ops.ones((2, 5), "int32")}
    shapes = ((2, 1, 5, 2), (2, 1, 5, 2))
    arguments = dict(head_dim=4)
    check_layer(
        layers.RotaryEmbedding, arguments, inputs, shapes, 0, float32_outputs=True
    )


def test_projection_symbolic_shape_has_the_length_of_the_input():
    projection = Projection(6, initializer_std=0.1)
    assert projection(keras.KerasTensor((None, 5, 8))).shape == (None, 5, 6)
    assert projection.compute_output_shape((None, None, 8)) == (None, None, 6)


def test_backbone_passes_the_checks_of_keras_hub():
    inputs = {name: ops.convert_to_tensor(x) for name, x in ONES.items()}
    check_backbone(OpenLlamaBackbone, SIZES, inputs, (2, 5, 8))


def test_backbone_has_the_dtypes_of_its_policy():
    policies = ("mixed_float16", "mixed_bfloat16", "bfloat16")
    check_precision(
        lambda dtype: OpenLlamaBackbone(**SIZES, dtype=dtype), ONES, policies=policies
    )


@first_on_tensorflow("mode", ["int8", "float8"])
def test_backbone_is_created_with_quantized_layers(mode):
    types = {"int8": (Projection, Embedding), "float8": (Projection,)}
    check_quantization(
        lambda dtype: OpenLlamaBackbone(**SIZES, dtype=dtype), {mode: types[mode]}, ONES
    )


@pytest.mark.slow_on_tensorflow
def test_causal_lm_passes_the_checks_of_keras_hub():
    check_task(make_lm(), TEXTS, (2, 8, 512))


def test_causal_lm_layers_exclude_the_preprocessor():
    lm = make_lm()
    assert lm.lm_head in lm.layers
    assert not {lm.preprocessor, lm.preprocessor.tokenizer} & set(lm.layers)
    lines = []
    lm.summary(print_fn=lines.append)
    assert "open_llama_tokenizer" in "\n".join(lines)


def test_preprocessor_passes_the_checks_of_keras_hub():
    tokenizer = make_preprocessor().tokenizer
    ids = tokenizer.tokenize(["The", "is"])
    assert [len(sequence) for sequence in ids] == [1, 1]
    (the,), (is_,) = ids
    targets = np.array([[the, 2] + [0] * 6, [is_, 2] + [0] * 6])
    weights = np.array([[1, 1] + [0] * 6] * 2)
    x = {
        "token_ids": np.array([[1, the, 2] + [0] * 5, [1, is_, 2] + [0] * 5]),
        "padding_mask": np.array([[True] * 3 + [False] * 5] * 2),
    }
    check_preprocessor(make_preprocessor, ["The", "is"], (x, targets, weights))


def test_tokenizer_passes_the_checks_of_keras_hub():
    tokenizer = make_preprocessor().tokenizer
    check_serialization(tokenizer)
    assert tokenizer.detokenize(tokenizer(TEXTS)) == TEXTS
    assert [tokenizer(text) for text in TEXTS] == tokenizer(TEXTS)
    assert (tokenizer.start_token, tokenizer.end_token) == ("<s>", "</s>")
    for token, token_id in (
        (tokenizer.start_token, tokenizer.start_token_id),
        (tokenizer.end_token, tokenizer.end_token_id),
    ):
        assert tokenizer.token_to_id(token) == token_id


# ----- Without `compile`


def test_fit_and_generate_without_compile_name_it():
    lm = make_lm(compile=False)
    x, y, weights = lm.preprocessor(TEXTS)
    for train in (
        lambda: lm.fit(TEXTS),
        lambda: lm.train_on_batch(x, y, weights),
        lambda: lm.evaluate(TEXTS),
        lambda: lm.test_on_batch(x, y, weights),
        lambda: lm.generate("The"),
        lambda: next(lm.stream("The")),
        lm.make_generate_function,
    ):
        with pytest.raises(ValueError, match="You must call `compile"):
            train()
    assert lm.generate_function is None
    assert lm.predict(TEXTS, verbose=0).shape == (2, 8, 512)
    expected = make_lm().score(TEXTS).shape
    assert lm.score(TEXTS).shape == expected
    lm.compile()
    assert lm.generate("The", max_new_tokens=1).startswith("The")


def test_generate_function_is_kept_until_compile():
    lm = make_lm()
    lm.generate("The", max_new_tokens=1)
    first = lm.generate_function
    assert first is not None
    lm.generate("The", max_new_tokens=2)
    assert lm.generate_function is first
    lm.compile(sampler="greedy")
    assert lm.generate_function is None


def test_call_with_cache_names_the_alternatives():
    lm = make_lm()
    for method in (lm.call_with_cache, lm.generate_step):
        with pytest.raises(NotImplementedError, match="layer_intercept_fn"):
            method(np.ones((1, 1)), None, 0)

    class Overridden(OpenLlamaCausalLM):
        def call_with_cache(self, *args):
            return super().call_with_cache(*args)

    overridden = Overridden(lm.backbone, lm.preprocessor)
    with pytest.raises(NotImplementedError, match="Sampler"):
        overridden.generate("The")


# ----- Scoring


def test_score_takes_token_ids_by_name():
    lm = make_lm()
    arrays = lm.preprocessor.generate_preprocess(TEXTS)
    logits = lm.score(**arrays)
    assert logits.shape == (2, 8, 512)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(logits),
        ops.convert_to_numpy(lm.score(arrays["token_ids"], arrays["padding_mask"])),
    )
    targets = np.roll(arrays["token_ids"], -1, axis=1)
    losses = lm.score(**arrays, scoring_mode="loss", target_ids=targets)
    assert losses.shape == (2, 8)
    with pytest.raises(ValueError, match="exactly one of `inputs` and `token_ids`"):
        lm.score()
    with pytest.raises(ValueError, match="exactly one of `inputs` and `token_ids`"):
        lm.score(TEXTS, token_ids=arrays["token_ids"])


# ----- Saving

SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler(),
    "top_k": keras_hub.samplers.TopKSampler(k=3, seed=4, temperature=0.5),
    "top_p": keras_hub.samplers.TopPSampler(p=0.3, k=7, seed=1),
    "random": keras_hub.samplers.RandomSampler(temperature=0.7, seed=3),
    "beam": keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.3),
}


@first_on_tensorflow("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_load_model_restores_the_sampler_of_compile(tmp_path, sampler, recwarn):
    lm = make_lm()
    lm.compile(sampler=sampler)
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, OpenLlamaCausalLM)
    assert type(again.sampler) is type(sampler)
    assert again.sampler.get_config() == sampler.get_config()
    assert again.train_plan == lm.train_plan
    assert not [w for w in recwarn if "compile" in str(w.message)]
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again(ONES)), ops.convert_to_numpy(lm(ONES))
    )


@pytest.mark.slow_on_tensorflow
def test_load_model_continues_with_the_optimizer_of_compile(tmp_path):
    lm = make_lm()
    lm.compile(keras.optimizers.Adam(1e-2), weighted_metrics=[], sampler="top_p")
    lm.fit(TEXTS, verbose=0)
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    history = again.fit(TEXTS, verbose=0).history
    assert history == lm.fit(TEXTS, verbose=0).history
    assert sorted(history) == ["loss", "perplexity"]
    assert int(again.optimizer.iterations) == 2
    uncompiled = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert type(uncompiled.sampler) is keras_hub.samplers.GreedySampler


@pytest.mark.slow_on_tensorflow
def test_load_model_builds_no_optimizer_that_was_not_used(tmp_path):
    make_lm().save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert not again.optimizer.built  # Its state would take twice the model's memory.


def test_from_preset_loads_a_tokenizer_saved_alone(tmp_path):
    tokenizer = make_preprocessor().tokenizer
    tokenizer.save_to_preset(tmp_path)
    again = OpenLlamaTokenizer.from_preset(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(tmp_path)
    assert preprocessor.tokenizer.fingerprint == tokenizer.fingerprint
    for cls in (OpenLlamaBackbone, OpenLlamaCausalLM):
        with pytest.raises(OSError, match=r"config\.json is missing.*only a tokenizer"):
            cls.from_preset(tmp_path)


def test_from_preset_loads_a_preprocessor_saved_alone(tmp_path):
    template = {"user": "Q: {content}", "assistant": "A: {content}"}
    preprocessor = make_preprocessor(add_end_token=False, chat_template=template)
    preprocessor.save_to_preset(tmp_path)
    again = OpenLlamaCausalLMPreprocessor.from_preset(tmp_path)
    assert as_config(again) == as_config(preprocessor)
    assert OpenLlamaTokenizer.from_preset(tmp_path)(TEXTS) == again.tokenizer(TEXTS)


def as_config(preprocessor):
    config = preprocessor.get_config()
    return {name: config[name] for name in config if name not in ("name", "tokenizer")}


@pytest.mark.slow_on_tensorflow
def test_from_preset_does_not_initialize_the_head_of_a_saved_backbone(tmp_path):
    make_lm().backbone.save_to_preset(tmp_path)
    with pytest.raises(OSError, match="saved without the language-model head"):
        OpenLlamaCausalLM.from_preset(tmp_path, preprocessor=None)
