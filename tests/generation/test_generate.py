"""`generate` and `stream`: batches, limits, stops, samplers, invalid arguments."""

import time

import keras
import keras_hub
import numpy as np
import pytest
from tensorflow_marks import first_on_tensorflow
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.generation import prefill_chunks, sharding, token_loop
from keras_openllama.generation.kv_cache import (
    init_cache,
    padded_batch_size,
    padded_cache_length,
)
from keras_openllama.generation.token_loop import TokenLoop

STEPS_BETWEEN_DONE_CHECKS = 8  # On PyTorch, which may run a few extra steps.
PROMPTS = ["The", "If the class body defines a name, it", "a = b\n    c"]


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def long_lm():
    return make_lm(context=1024)


def make_lm(context=128, **options):
    """A random model with large differences between logits, and a real tokenizer."""
    keras.utils.set_random_seed(0)
    tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
    backbone = OpenLlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=48,
        intermediate_dim=64,
        initializer_std=0.2,
        max_sequence_length=context,
        **{"num_layers": 2, **options},
    )
    preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=context)
    return OpenLlamaCausalLM(backbone, preprocessor)


def arrays(lm, prompts=PROMPTS):
    rows = lm.preprocessor.prompt_ids(prompts)
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), "int32")
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([[len(row)] for row in rows])
    return {"token_ids": ids, "padding_mask": np.arange(width) < lengths}


def greedy_without_cache(lm, prompt, steps):
    """The simplest greedy decoding: the full sequence is recomputed for each token."""
    ids = lm.preprocessor.prompt_ids([prompt])[0]
    for _ in range(steps):
        padded = np.zeros((1, 64), "int32")
        padded[0, : len(ids)] = ids
        logits = keras.ops.convert_to_numpy(lm.score(padded))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids


@pytest.mark.skipif(keras.config.backend() != "jax", reason="needs JAX devices")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_cache_creates_zeros_on_the_accelerator(monkeypatch, dtype):
    lm = make_lm(dtype=dtype)
    on_cpu = init_cache(lm.backbone, 3, 16)
    monkeypatch.setattr(sharding, "device_platform", lambda backbone: "gpu")
    monkeypatch.setattr(sharding, "to_device", None)  # It copies from the host.
    on_gpu = init_cache(lm.backbone, 3, 16)
    for pair, expected in zip(on_gpu, on_cpu, strict=True):
        for x, y in zip(pair, expected, strict=True):
            assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
            assert not x.any()


def test_generate_equals_greedy_decoding_without_cache(lm):
    outputs = lm.generate(arrays(lm), max_new_tokens=12, stop_token_ids=None)
    for i, prompt in enumerate(PROMPTS):
        expected = greedy_without_cache(lm, prompt, 12)
        assert outputs["token_ids"][i, : len(expected)].tolist() == expected
        assert outputs["padding_mask"][i].sum() == len(expected)


def test_generate_on_a_batch_equals_generate_on_single_prompts(lm):
    together = lm.generate(PROMPTS, max_new_tokens=30)
    assert together == [lm.generate(p, max_new_tokens=30) for p in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


def test_max_length_includes_the_prompt_and_bos(lm):
    rows = lm.preprocessor.prompt_ids(PROMPTS)
    outputs = lm.generate(arrays(lm), max_length=25, stop_token_ids=None)
    assert outputs["padding_mask"].sum(axis=1).tolist() == [25] * 3
    outputs = lm.generate(
        arrays(lm), max_length=25, max_new_tokens=9, stop_token_ids=None
    )
    assert outputs["padding_mask"].sum(axis=1).tolist() == [
        min(25, len(row) + 9) for row in rows
    ]


def test_generate_returns_a_prompt_of_max_length_unchanged(lm):
    x = arrays(lm, PROMPTS[:1])
    outputs = lm.generate(x, max_length=x["token_ids"].shape[1], stop_token_ids=None)
    np.testing.assert_array_equal(outputs["token_ids"], x["token_ids"])


def test_max_length_defaults_to_sequence_length(lm):
    lm.preprocessor.sequence_length = 20
    try:
        text = lm.generate("The", stop_token_ids=None)
    finally:
        lm.preprocessor.sequence_length = 128
    n = len(lm.preprocessor.prompt_ids(["The"])[0])
    assert text == lm.generate("The", max_new_tokens=20 - n, stop_token_ids=None)


def test_stop_token_ids_end_only_their_sequence(lm):
    x = arrays(lm)
    free = lm.generate(x, max_new_tokens=20, stop_token_ids=None)
    lengths = x["padding_mask"].sum(axis=1)
    new = [
        row[n : n + 20].tolist()
        for row, n in zip(free["token_ids"], lengths, strict=True)
    ]
    stop = new[0][7]
    outputs = lm.generate(x, max_new_tokens=20, stop_token_ids=[stop, 3])
    for i, n in enumerate(lengths):
        ends = [k for k, t in enumerate(new[i]) if t in (stop, 3)]
        expected = new[i][: ends[0] + 1] if ends else new[i]
        assert outputs["token_ids"][i, n : n + len(expected)].tolist() == expected
        assert outputs["padding_mask"][i].sum() == n + len(expected)
        assert not outputs["token_ids"][i, n + len(expected) :].any()


def test_generate_removes_the_stop_string(lm):
    for prompt in PROMPTS:
        free = lm.generate(prompt, max_new_tokens=40, strip_prompt=True)
        stop = free[20:23]
        cut = lm.generate(prompt, max_new_tokens=40, strip_prompt=True, stop=stop)
        assert cut == free[: free.index(stop)]
    both = lm.generate(PROMPTS, max_new_tokens=40, stop=[stop, "\0"])
    assert both[2] == PROMPTS[2] + cut


def test_generate_accepts_a_tf_dataset(lm):
    tf = pytest.importorskip("tensorflow")
    expected = lm.generate(PROMPTS, max_new_tokens=5)
    dataset = tf.data.Dataset.from_tensor_slices(PROMPTS)
    assert lm.generate(dataset, max_new_tokens=5) == expected
    assert lm.generate(dataset.batch(2), max_new_tokens=5) == expected
    with pytest.raises(ValueError, match="inputs"):
        lm.generate(tf.data.Dataset.from_tensors(IDS), max_new_tokens=5)
    with pytest.raises(ValueError, match="must hold at least one prompt"):
        lm.generate(tf.data.Dataset.from_tensors(PROMPTS[:0]), max_new_tokens=5)


def test_strip_prompt_returns_the_new_text(lm):
    with_prompt = lm.generate(PROMPTS, max_new_tokens=10)
    new = lm.generate(PROMPTS, max_new_tokens=10, strip_prompt=True)
    assert with_prompt == [p + n for p, n in zip(PROMPTS, new, strict=True)]
    x = arrays(lm)
    stripped = lm.generate(x, max_new_tokens=10, stop_token_ids=None, strip_prompt=True)
    assert stripped["padding_mask"].sum(axis=1).tolist() == [10, 10, 10]


@first_on_tensorflow("stop", [None, "e", ["th", "zz"]])
def test_stream_yields_the_text_of_generate(lm, stop):
    options = dict(max_new_tokens=40, stop=stop)
    for prompt in PROMPTS:
        pieces = list(lm.stream(prompt, **options))
        assert "".join(pieces) == lm.generate(prompt, strip_prompt=True, **options)
        assert all(pieces)
        if stop is None:
            assert len(pieces) > 10


def test_stream_raises_before_the_first_piece(lm):
    with pytest.raises(ValueError, match="empty prompt"):
        lm.stream("")
    with pytest.raises(ValueError, match="empty prompt"):
        lm.stream(["a", ""])
    with pytest.raises(ValueError, match="texts or chats"):
        lm.stream({"token_ids": [[1, 5]]})
    with pytest.raises(ValueError, match="needs a `preprocessor`"):
        OpenLlamaCausalLM(lm.backbone).stream("a")
    with pytest.raises(TypeError, match="Call `generate` with `logprobs`"):
        lm.stream("a", logprobs=1)


def test_stream_yields_the_reply_to_a_chat():
    lm = make_lm()
    lm.preprocessor.chat_template = {
        "user": "Q: {content}\n",
        "assistant": "A: {content}",
    }
    chat = {"messages": [{"role": "user", "content": "The"}]}
    pieces = list(lm.stream(chat, max_new_tokens=8))
    assert "".join(pieces) == lm.generate(chat, max_new_tokens=8)
    assert len(pieces) > 1


@first_on_tensorflow(
    "sampler", ["greedy", "random", "top_k", "top_p", "beam", "contrastive"]
)
def test_generate_supports_every_sampler_of_keras_hub(sampler):
    lm = make_lm()
    lm.compile(sampler=sampler)
    outputs = lm.generate(arrays(lm), max_new_tokens=6, stop_token_ids=None)
    lengths = arrays(lm)["padding_mask"].sum(axis=1)
    assert (outputs["padding_mask"].sum(axis=1) == lengths + 6).all()
    assert outputs["token_ids"].max() < lm.backbone.vocabulary_size


@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.TopKSampler(k=1),
        keras_hub.samplers.TopPSampler(p=1e-6),
        keras_hub.samplers.RandomSampler(temperature=0),
        keras_hub.samplers.RandomSampler(temperature=1e-300),
        keras_hub.samplers.TopKSampler(k=5, temperature=0.0),
        keras_hub.samplers.BeamSampler(num_beams=1),
        keras_hub.samplers.ContrastiveSampler(k=1, alpha=0.6),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.slow_on_tensorflow
def test_samplers_with_a_single_candidate_are_greedy(lm, sampler):
    expected = lm.generate(PROMPTS, max_new_tokens=12)
    try:
        lm.compile(sampler=sampler)
        assert lm.generate(PROMPTS, max_new_tokens=12) == expected
    finally:
        lm.compile(sampler="greedy")


@pytest.mark.slow_on_tensorflow
def test_beam_search_finds_likelier_texts_than_greedy(lm):
    options = dict(max_new_tokens=8, stop_token_ids=None)
    greedy = [lm.generate(arrays(lm, [p]), **options) for p in PROMPTS]
    try:
        lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=8))
        beam = [lm.generate(arrays(lm, [p]), **options) for p in PROMPTS]
    finally:
        lm.compile(sampler="greedy")

    def loss(outputs):
        losses = 0.0
        for ids in (x["token_ids"] for x in outputs):
            scores = lm.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])
            losses += keras.ops.convert_to_numpy(scores)[0, -8:].sum()
        return losses

    assert loss(beam) < loss(greedy) - 0.01


@pytest.mark.slow_on_tensorflow
def test_top_p_sampling_with_p_1_is_random_sampling():
    lm, texts = make_lm(), []
    for sampler in (
        keras_hub.samplers.TopPSampler(p=1.0, seed=3),
        keras_hub.samplers.RandomSampler(seed=3),
        keras_hub.samplers.TopPSampler(p=0.5, seed=3),
    ):
        lm.compile(sampler=sampler)
        texts.append(lm.generate(PROMPTS, max_new_tokens=20))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
@pytest.mark.slow_on_tensorflow
def test_beam_and_contrastive_search_are_deterministic(sampler):
    texts = set()
    for _ in "ab":
        lm = make_lm()
        lm.compile(sampler=sampler)
        texts.add(lm.generate("The", max_new_tokens=20))
        texts.add(lm.generate("The", max_new_tokens=20))
    assert len(texts) == 1


def test_sampling_with_a_seed_is_reproducible():
    lm = make_lm()
    texts = []
    for seed in (1, 1, 2):
        lm.compile(sampler=keras_hub.samplers.TopKSampler(k=20, seed=seed))
        texts.append(
            [lm.generate("The", max_new_tokens=20, strip_prompt=True) for _ in "ab"]
        )
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_compile_rejects_unsupported_samplers(lm):
    with pytest.raises(ValueError, match="draft model"):
        lm.compile(sampler="speculative")
    with pytest.raises(ValueError, match="return_all_beams"):
        lm.compile(sampler=keras_hub.samplers.BeamSampler(return_all_beams=True))
    with pytest.raises(ValueError, match="sampler"):
        lm.compile(sampler=print)
    lm.compile()


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("RandomSampler", {"temperature": t}) for t in (-1, np.nan, np.inf, "1")],
        *[("TopKSampler", {"k": k}) for k in (0, -1, 2.5, True)],
        *[("TopPSampler", {"k": k, "p": 0.9}) for k in (0, -1)],
        *[("TopPSampler", {"p": p}) for p in (0, 1.5, np.nan, None)],
        *[("BeamSampler", {"num_beams": n}) for n in (0, None)],
        ("BeamSampler", {"temperature": 0}),
        *[("ContrastiveSampler", {"k": k}) for k in (0, 100_000)],
        ("ContrastiveSampler", {"alpha": 2}),
    ],
    ids=str,
)
def test_compile_rejects_sampler_arguments_out_of_range(lm, name, arguments):
    sampler = getattr(keras_hub.samplers, name)(**arguments)
    argument, value = next(iter(arguments.items()))
    with pytest.raises(
        ValueError, match=rf"`{name}\.{argument}` must be.*{argument}={value!r}"
    ):
        lm.compile(sampler=sampler)


@pytest.mark.parametrize("k", [100_000, None])
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.slow_on_tensorflow
def test_samplers_with_k_above_the_vocabulary_sample_from_all_tokens(lm, k, p):
    texts = []
    for sampler in (
        keras_hub.samplers.TopPSampler(p=p, k=k, seed=1),
        keras_hub.samplers.TopKSampler(k=k or 5000, seed=1)
        if p == 1
        else keras_hub.samplers.TopPSampler(p=p, seed=1),
    ):
        lm.compile(sampler=sampler)
        texts.append(lm.generate("The", max_new_tokens=12))
    lm.compile()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
@pytest.mark.slow_on_tensorflow
def test_rope_scaling_depends_on_the_final_length(rope_type):
    lm = make_lm(context=16, rope_scaling={"rope_type": rope_type, "factor": 4.0})
    x = arrays(lm, PROMPTS[:2])
    n = x["padding_mask"].sum(axis=1)
    outputs = lm.generate(x, max_length=40, stop_token_ids=None)
    # Each token was sampled with the RoPE scaling of the final length.
    logits = keras.ops.convert_to_numpy(lm.score(outputs["token_ids"]))
    for i in range(2):
        chosen = outputs["token_ids"][i, n[i] : 40]
        np.testing.assert_array_equal(logits[i, n[i] - 1 : 39].argmax(-1), chosen)


def test_cache_length_and_batch_size_are_rounded_up():
    assert [padded_cache_length(n) for n in (2, 256, 257, 1900)] == [
        256,
        256,
        512,
        2048,
    ]
    assert [padded_batch_size(n) for n in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, 16]


def short_generations(lm, batches, lengths, limits):
    """Generates one token for prompts of all these sizes: all ids are stop ids."""
    every_id = list(range(lm.backbone.vocabulary_size))
    for batch in batches:
        for length in lengths:
            ids = np.full((batch, length), 5, "int32")
            for limit in limits:
                lm.generate(
                    {"token_ids": ids, "padding_mask": np.ones_like(ids)},
                    max_new_tokens=limit,
                    stop_token_ids=every_id,
                )


@pytest.mark.skipif(keras.config.backend() == "torch", reason="needs XLA")
@pytest.mark.slow_on_tensorflow
def test_generate_compiles_twelve_programs_for_all_lengths(caplog, monkeypatch):
    lm = make_lm(context=2048, num_layers=1)
    traced = []
    advance = TokenLoop._advance
    monkeypatch.setattr(
        TokenLoop,
        "_advance",
        lambda self, **k: traced.append(k["state"].tokens.shape) or advance(self, **k),
    )
    monkeypatch.setattr(lm, "generate_function", None)

    def run():
        short_generations(
            lm, (1, 2, 4, 5, 8), (1, 255, 256, 300), (1, 211, 212, 724, 1748)
        )

    if keras.config.backend() == "jax":
        import jax

        with jax.log_compiles(), caplog.at_level("WARNING"):
            run()
        messages = [r.message for r in caplog.records]
        assert sum("Compiling" in m for m in messages) == 12
    else:
        run()
    assert len(traced) == len(set(traced)) == 12


@pytest.mark.parametrize(
    "length",
    [
        *(31, 257),
        *(
            pytest.param(length, marks=pytest.mark.slow_on_tensorflow)
            for length in (32, 33, 256, 290, 545)
        ),
    ],
)
def test_generate_prefills_long_prompts_in_chunks(long_lm, length):
    ids = np.random.default_rng(length).integers(3, 500, (2, length)).astype("int32")
    mask = np.arange(length) < np.array([[length], [length - 30]])
    out = long_lm.generate(
        {"token_ids": ids, "padding_mask": mask}, max_new_tokens=3, stop_token_ids=None
    )
    for row, n in zip(out["token_ids"], mask.sum(axis=1), strict=True):
        # What follows does not change the logits, and one length is compiled once.
        padded = np.zeros((1, 600), "int32")
        padded[0, : n + 3] = row[: n + 3]
        logits = keras.ops.convert_to_numpy(long_lm.score(padded))[0]
        assert row[n : n + 3].tolist() == logits[n - 1 : n + 2].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("rows", "columns", "sizes"),
    [
        (1, 256, [256]),
        (1, 2048, [1024, 256]),
        (4, 2048, [1024, 256, 64]),
        (16, 2048, [512, 256, 32]),
        (64, 2048, [256, 32]),
        (64, 256, [32]),
    ],
)
def test_prefill_chunks_are_larger_on_accelerators(rows, columns, sizes):
    assert prefill_chunks.prefill_chunks("gpu", rows, columns) == sizes
    small = [32] if columns == 256 else [256, 32]
    assert prefill_chunks.prefill_chunks("cpu", rows, columns) == small


@pytest.mark.skipif(keras.config.backend() != "jax", reason="needs JAX devices")
@pytest.mark.parametrize("length", [70, 1290])
def test_prefill_does_not_depend_on_the_chunk_size(length, monkeypatch):
    lm = make_lm(context=2048)
    prompt = np.random.default_rng(0).integers(3, 500, length).tolist()
    stop_ids, found = np.full(4, -1, "int32"), {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(token_loop, "device_platform", lambda _, p=platform: p)
        loop = TokenLoop(lm)
        state, prompt_layout = loop.start([prompt], [3])
        state = loop.advance(
            state=state,
            prompt_layout=prompt_layout,
            stop_ids=stop_ids,
            until=np.int32(3),
        )
        found[platform] = np.array(state.cache)[..., : length + 2, :]
    np.testing.assert_allclose(found["gpu"], found["cpu"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "sizes"),
    [
        (1, 256, [256]),
        (1, 512, [256, 512]),
        (1, 2048, [256, 1024, 2048]),
        (1, 8192, [256, 2048]),
        (16, 1024, [256, 1024]),
        (16, 2048, [256, 1024]),
        (64, 256, [256]),
        (256, 2048, [256]),
    ],
)
def test_first_chunks_hold_most_prompts_whole(rows, columns, sizes):
    assert prefill_chunks.first_chunks(rows, columns) == sizes


@pytest.mark.skipif(keras.config.backend() != "jax", reason="needs JAX devices")
@pytest.mark.parametrize("lengths", [[1], [70, 40], [256, 257], [500, 9], [1290, 700]])
def test_token_loop_prefills_the_first_chunk_with_a_fused_kernel(lengths, monkeypatch):
    from keras_openllama.layers.attention_kernels import cudnn_prefill_attention

    lm = make_lm(context=2048)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 500, length).tolist() for length in lengths]
    columns = padded_cache_length(max(lengths) + 3)
    limits, stop_ids = [3] * len(prompts), np.full(4, -1, "int32")
    expected = list(TokenLoop(lm).generate(prompts, limits, stop_ids, stride=1))
    # In float32, XLA computes it. The longest prompts need a second chunk.
    monkeypatch.setattr(prefill_chunks, "FIRST_CHUNK", 1024)
    monkeypatch.setattr(
        token_loop, "prefill_attention", lambda backbone: cudnn_prefill_attention
    )
    used = []
    forward = token_loop.forward_with_cache

    def recorded(backbone, tokens, *arguments):
        if arguments[3:] == (cudnn_prefill_attention,):
            used.append(tokens.shape[1])
        return forward(backbone, tokens, *arguments)

    monkeypatch.setattr(token_loop, "forward_with_cache", recorded)
    assert list(TokenLoop(lm).generate(prompts, limits, stop_ids, stride=1)) == expected
    assert set(used) == set(
        prefill_chunks.first_chunks(padded_batch_size(len(prompts)), columns)
    )


def test_generate_stops_when_all_sequences_have_ended(lm, monkeypatch):
    x = arrays(lm)
    free = lm.generate(x, max_new_tokens=6, stop_token_ids=None)
    lengths = x["padding_mask"].sum(axis=1)
    rows = zip(free["token_ids"], lengths, strict=True)
    stops = [int(row[n + 4]) for row, n in rows]
    steps = []
    advance = lm.make_generate_function().advance

    def counted(**arguments):
        state = advance(**arguments)
        steps.append(int(state.step))
        return state

    monkeypatch.setattr(lm.make_generate_function(), "advance", counted)
    lm.generate(x, max_new_tokens=100, stop_token_ids=stops)
    assert len(steps) == 1
    assert steps[0] <= 5 + STEPS_BETWEEN_DONE_CHECKS


def test_stream_yields_the_first_piece_right_after_prefill(lm, monkeypatch):
    """Each piece needs one more step."""
    loop = lm.make_generate_function()
    advance, requested_steps = loop.advance, []
    monkeypatch.setattr(
        loop,
        "advance",
        lambda **k: requested_steps.append(int(k["until"])) or advance(**k),
    )
    pieces = [
        (piece, list(requested_steps)) for piece in lm.stream("The", max_new_tokens=40)
    ]
    calls = [len(until) for _, until in pieces]
    # A piece needs several tokens if one ends within a character.
    assert calls[0] <= 4
    assert calls == sorted(set(calls))
    assert requested_steps == list(range(1, len(requested_steps) + 1))


@pytest.mark.slow_on_tensorflow
def test_stream_yields_pieces_at_even_intervals(lm):
    list(lm.stream("The", max_new_tokens=100))  # Compiles.
    moments = [time.perf_counter()]
    for _ in lm.stream("The", max_new_tokens=100):
        moments.append(time.perf_counter())
    total = moments[-1] - moments[0]
    # If all pieces were generated first, one interval would take nearly all the time.
    assert max(np.diff(moments)) < total / 3


@pytest.mark.slow_on_tensorflow
def test_stream_can_be_closed_early(lm):
    expected = lm.generate("The", max_new_tokens=30, strip_prompt=True)
    for pieces in (0, 1, 5):
        stream = lm.stream("The", max_new_tokens=100)
        for _ in range(pieces):
            next(stream)
        stream.close()
        assert lm.generate("The", max_new_tokens=30, strip_prompt=True) == expected
    one, other = (lm.stream("The", max_new_tokens=30) for _ in "ab")
    both = [a + b for a, b in zip(one, other, strict=True)]
    assert "".join(x[: len(x) // 2] for x in both) == expected


IDS = {"token_ids": np.array([[1, 5, 9]]), "padding_mask": np.ones((1, 3))}


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("", {}, "empty prompt"),
        (["a", ""], {}, r"`inputs\[1\]` is an empty prompt"),
        ([], {}, "inputs"),
        (7, {}, "7"),
        ("a b c d e f g h", dict(max_length=4), "max_length=4"),
        ("The " * 200, dict(max_new_tokens=4), "context of this model is 128"),
        ("The", dict(max_new_tokens=500), "max_new_tokens`=500"),
        ("The", dict(max_length=129), "max_length`=129"),
        ("The", dict(max_new_tokens=0), "max_new_tokens=0"),
        ("The", dict(max_length=2.5), "max_length=2.5"),
        ("The", dict(stop=""), "stop=''"),
        ("The", dict(stop=[3]), "stop"),
        ("The", dict(stop_token_ids=[512]), "stop_token_ids"),
        ("The", dict(stop_token_ids="eos"), "stop_token_ids='eos'"),
        (IDS, dict(stop="x"), "stop_token_ids"),
        ({"ids": [[1]]}, {}, r"\['ids'\]"),
        ({**IDS, "token_ids": np.array([1, 2])}, {}, r"shape \(2,\)"),
        ({**IDS, "token_ids": np.array([[1, 5, 512]])}, {}, "512"),
        ({**IDS, "token_ids": np.array([[1, 5, -1]])}, {}, "-1"),
        ({**IDS, "token_ids": np.array([[1.0, 5.0, 2.0]])}, {}, "float"),
        ({**IDS, "padding_mask": np.ones((1, 2))}, {}, r"shape \(1, 2\)"),
        ({**IDS, "padding_mask": np.zeros((1, 3))}, {}, r"sequences \[0\]"),
        ({**IDS, "padding_mask": np.array([[0, 1, 1]])}, {}, "on the right"),
    ],
    ids=str,
)
def test_generate_rejects_invalid_arguments(lm, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(inputs, **{"stop_token_ids": "auto", **options})


def test_generate_without_preprocessor_needs_stop_token_ids(lm):
    bare = OpenLlamaCausalLM(lm.backbone)
    with pytest.raises(ValueError, match="preprocessor"):
        bare.generate(IDS)
    with pytest.raises(ValueError, match="token_ids"):
        bare.generate("text", stop_token_ids=None)
