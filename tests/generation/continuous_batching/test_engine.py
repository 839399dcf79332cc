"""Continuous batching: each request gets what it gets alone."""

import threading

import numpy as np
import pytest
import tiny_models

from keras_openllama import SamplingConfig
from keras_openllama.generation.continuous_batching.engine import (
    Engine,
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
)
from keras_openllama.generation.limits import ContextLengthError
from keras_openllama.generation.onnx_runtime.token_loop import uses_onnx_runtime

pytestmark = pytest.mark.usefixtures("compile_fast")
GREEDY = SamplingConfig(temperature=0)


FLOAT32 = pytest.param("float32", marks=pytest.mark.slow_on_tensorflow)


@pytest.fixture(scope="module", params=[FLOAT32, "int4"])
def lm(request):
    return make_lm("grouped_heads", request.param)


def make_lm(name, precision="float32"):
    (shape,) = [s for s in tiny_models.SHAPES if s.name == name]
    lm = tiny_models.random_lm(shape)
    if precision != "float32":
        lm.quantize(precision)
    return lm


def prompts_of(lm, lengths, seed=0):
    random = np.random.default_rng(seed)
    size = lm.backbone.vocabulary_size
    return [random.integers(3, size, length).tolist() for length in lengths]


def alone(lm, prompt, new):
    """The tokens of `generate`."""
    ids = np.array([prompt])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    outputs = lm.generate(
        inputs, max_new_tokens=new, stop_token_ids=None, strip_prompt=True
    )
    return outputs["token_ids"][0, :new].tolist()


def tokens(events):
    return [event.token_id for event in events]


class Recorder:
    """Records the events of a request."""

    def __init__(self, on_token=None):
        self.events, self.on_token = [], on_token

    def __call__(self, event):
        self.events.append(event)
        if self.on_token is not None:
            self.on_token(len(self.events))

    @property
    def tokens(self):
        return [e.token_id for e in self.events if e.token_id is not None]

    @property
    def reasons(self):
        return [event.finish_reason for event in self.events]


def submit(engine, prompt, new, **options):
    recorder = Recorder(options.pop("on_token", None))
    request = EngineRequest(prompt, new, options.pop("sampling", GREEDY), **options)
    return engine.submit(request, recorder), recorder


def test_engine_gives_each_request_the_tokens_of_generate(lm):
    """More requests than slots, of different lengths: they join and leave."""
    lengths, news = (3, 40, 1, 7, 70, 2, 12), (9, 5, 12, 1, 6, 3, 8)
    prompts = prompts_of(lm, lengths)
    with Engine(lm, num_slots=3, context=128) as engine:
        found = [submit(engine, *pair) for pair in zip(prompts, news, strict=True)]
        for handle, _ in found:
            assert handle.finished.wait(100)
    for prompt, new, (_, recorder) in zip(prompts, news, found, strict=True):
        assert recorder.tokens == alone(lm, prompt, new)
        assert recorder.reasons == [None] * (new - 1) + ["length"]
    assert engine.stats.generated_tokens == sum(news)
    assert engine.stats.finished["length"] == len(news)
    assert engine.stats.active == engine.stats.queued == 0


@pytest.mark.slow_on_tensorflow
def test_engine_supports_the_head_dim_of_3b():
    lm = make_lm("head_dim_100")
    (prompt,) = prompts_of(lm, [20])
    with Engine(lm, num_slots=2, context=64) as engine:
        events = list(engine.stream(EngineRequest(prompt, 5, GREEDY)))
    assert tokens(events) == alone(lm, prompt, 5)


def test_engine_computes_prompts_in_small_chunks_while_others_decode(lm, monkeypatch):
    long, short = prompts_of(lm, (300, 4))
    with Engine(lm, num_slots=2, context=400) as engine:
        decoder, sizes = engine._batch._decoder, []

        def prefill(slot, tokens, start, compute=decoder.prefill):
            sizes.append(len(tokens))
            compute(slot, tokens, start)

        monkeypatch.setattr(decoder, "prefill", prefill)
        is_submitted = threading.Event()
        running, first = submit(
            *(engine, short, 30), on_token=lambda number: is_submitted.wait(100)
        )
        handle, second = submit(engine, long, 3)
        is_submitted.set()
        assert handle.finished.wait(100) and running.finished.wait(100)
    assert second.tokens == alone(lm, long, 3)
    assert first.tokens == alone(lm, short, 30)
    assert sum(sizes) == 3 + 299
    assert max(sizes) == decoder.chunk_beside_steps < decoder.chunks[-1]


@pytest.mark.slow_on_tensorflow
def test_engine_stops_at_stop_token_ids(lm):
    (prompt,) = prompts_of(lm, [5])
    expected = alone(lm, prompt, 8)
    stop = expected[3]
    with Engine(lm, num_slots=1, context=64) as engine:
        request = EngineRequest(prompt, 8, GREEDY, stop_token_ids=[stop])
        events = list(engine.stream(request))
    assert tokens(events) == expected[: expected.index(stop) + 1]
    assert events[-1].finish_reason == "stop"


def test_engine_request_without_new_tokens_ends_with_length(lm):
    with Engine(lm, num_slots=1, context=64) as engine:
        (event,) = engine.stream(EngineRequest([5, 6], 0, GREEDY))
    assert (event.token_id, event.finish_reason) == (None, "length")


@pytest.mark.slow_on_tensorflow
def test_cancel_frees_the_slot(lm):
    first, second = prompts_of(lm, (5, 6))
    with Engine(lm, num_slots=1, context=256) as engine:
        handles = []
        handle, recorder = submit(
            *(engine, first, 200),
            on_token=lambda number: number == 3 and handles[0].cancel(),
        )
        handles.append(handle)
        waiting, ended_early = submit(engine, first, 200)
        waiting.cancel()
        next_handle, next_recorder = submit(engine, second, 4)
        assert next_handle.finished.wait(100)
    assert 3 <= len(recorder.tokens) < 200
    assert recorder.reasons[-1] == "cancelled"
    assert ended_early.reasons == ["cancelled"]
    assert next_recorder.tokens == alone(lm, second, 4)


@pytest.mark.slow_on_tensorflow
def test_closing_the_stream_cancels_the_request(lm):
    (prompt,) = prompts_of(lm, [5])
    with Engine(lm, num_slots=1, context=256) as engine:
        events = engine.stream(EngineRequest(prompt, 200, GREEDY))
        next(events)
        events.close()
        assert len(list(engine.stream(EngineRequest(prompt, 2, GREEDY)))) == 2
    assert engine.stats.finished["cancelled"] == 1


@pytest.mark.slow_on_tensorflow
def test_submit_to_a_full_queue_raises(lm):
    engine = Engine(lm, num_slots=1, context=64, max_queue=1)
    requests = [submit(engine, [5, 6], 2) for _ in range(2)]  # One for the free slot.
    with pytest.raises(QueueFullError, match="max_queue=1"):
        submit(engine, [5, 6], 2)
    assert engine.stats.rejected == 1
    engine.start()
    engine.shutdown()
    assert [recorder.reasons[-1] for _, recorder in requests] == ["length"] * 2


def test_submit_after_shutdown_raises(lm):
    engine = Engine(lm, num_slots=1, context=64)
    engine.shutdown()
    with pytest.raises(EngineStoppedError):
        submit(engine, [5], 2)


@pytest.mark.slow_on_tensorflow
def test_shutdown_without_drain_cancels_all_requests(lm):
    engine = Engine(lm, num_slots=1, context=512)
    started = threading.Event()
    engine.start()
    found = [
        submit(engine, [5], 400, on_token=lambda _: started.set()) for _ in range(2)
    ]
    assert started.wait(100)
    engine.shutdown(drain=False)
    assert [recorder.reasons[-1] for _, recorder in found] == ["cancelled"] * 2


@pytest.mark.slow_on_tensorflow
def test_shutdown_cancels_what_runs_after_the_timeout(lm):
    engine = Engine(lm, num_slots=1, context=512)
    started = threading.Event()
    engine.start()
    _, recorder = submit(engine, [5], 500, on_token=lambda _: started.set())
    assert started.wait(100)
    engine.shutdown(timeout=0.01)
    assert recorder.reasons[-1] == "cancelled"


class OnlyEven:
    """A constraint: even ids. It fails after some tokens."""

    def __init__(self, size, fails_after=None):
        self.mask = np.arange(size) % 2 == 0
        self.accepted, self.fails_after = [], fails_after

    def allowed(self):
        if len(self.accepted) == self.fails_after:
            raise RuntimeError("the constraint failed")
        return self.mask

    def accept(self, token_id):
        self.accepted.append(token_id)


@pytest.mark.slow_on_tensorflow
def test_constraint_restricts_the_tokens_of_its_request_alone(lm):
    prompt, other = prompts_of(lm, (5, 8))
    constraint = OnlyEven(lm.backbone.vocabulary_size)
    with Engine(lm, num_slots=2, context=64) as engine:
        handle, recorder = submit(engine, prompt, 6, constraint=constraint)
        free, free_recorder = submit(engine, other, 6)
        assert handle.finished.wait(100) and free.finished.wait(100)
    assert recorder.tokens == constraint.accepted
    assert all(token % 2 == 0 for token in recorder.tokens)
    assert free_recorder.tokens == alone(lm, other, 6)


@pytest.mark.slow_on_tensorflow
def test_failing_constraint_ends_its_request_alone(lm):
    prompt, other = prompts_of(lm, (5, 8))
    constraint = OnlyEven(lm.backbone.vocabulary_size, fails_after=2)
    with Engine(lm, num_slots=2, context=64) as engine:
        handle, recorder = submit(engine, prompt, 6, constraint=constraint)
        free, free_recorder = submit(engine, other, 6)
        assert handle.finished.wait(100) and free.finished.wait(100)
    assert len(recorder.tokens) == 2
    assert recorder.reasons[-1] == "error"
    assert "the constraint failed" in str(recorder.events[-1].error)
    assert free_recorder.tokens == alone(lm, other, 6)


@pytest.mark.slow_on_tensorflow
def test_constraint_without_an_allowed_token_is_an_error(lm):
    constraint = OnlyEven(lm.backbone.vocabulary_size)
    constraint.mask[:] = False
    request = EngineRequest([5], 3, GREEDY, constraint=constraint)
    with Engine(lm, num_slots=1, context=64) as engine:
        with pytest.raises(ValueError, match="allows some token"):
            list(engine.stream(request))


@pytest.mark.slow_on_tensorflow
def test_failing_on_event_ends_its_request_alone(lm):
    def fail(number):
        raise RuntimeError("the client failed")

    (prompt,) = prompts_of(lm, [8])
    with Engine(lm, num_slots=2, context=64) as engine:
        handle, _ = submit(engine, [5], 6, on_token=fail)
        other, recorder = submit(engine, prompt, 6)
        assert handle.finished.wait(100) and other.finished.wait(100)
    assert recorder.tokens == alone(lm, prompt, 6)
    assert engine.stats.finished["error"] == 1


@pytest.mark.slow_on_tensorflow
def test_engine_goes_on_after_a_failed_step(lm, monkeypatch):
    (prompt,) = prompts_of(lm, [8])
    with Engine(lm, num_slots=2, context=64) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._batch._sampler, "choose", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(engine.stream(EngineRequest(prompt, 6, GREEDY)))
        events = list(engine.stream(EngineRequest(prompt, 6, GREEDY)))
    assert tokens(events) == alone(lm, prompt, 6)


@pytest.mark.slow_on_tensorflow
def test_engine_that_cannot_go_on_ends_all_requests(lm, monkeypatch):
    engine = Engine(lm, num_slots=1, context=64)
    monkeypatch.setattr(engine, "_advance", lambda: 1 / 0)
    found = [submit(engine, [5], 6) for _ in range(2)]
    engine.start()
    for handle, recorder in found:
        assert handle.finished.wait(100)
        assert recorder.reasons == ["error"]
    with pytest.raises(EngineStoppedError, match="division by zero"):
        submit(engine, [5], 6)


def test_engine_samples_by_the_seed_whatever_runs_beside(lm):
    prompt, other = prompts_of(lm, (5, 9))
    config = SamplingConfig(temperature=1.5, top_p=0.9, seed=3)
    requests = [EngineRequest(prompt, 6, config, sample=i) for i in range(2)]
    with Engine(lm, num_slots=4, context=64) as engine:
        expected = [tokens(engine.stream(request)) for request in requests]
        noise, _ = submit(engine, other, 40, sampling=SamplingConfig(seed=7))
        found = [tokens(engine.stream(request)) for request in reversed(requests)]
        noise.cancel()
    assert found[::-1] == expected
    assert expected[0] != expected[1]


@pytest.mark.slow_on_tensorflow
def test_engine_returns_log_probabilities(lm):
    (prompt,) = prompts_of(lm, [5])
    request = EngineRequest(prompt, 3, GREEDY, top_logprobs=2)
    with Engine(lm, num_slots=2, context=64) as engine:
        submit(engine, prompt, 3)  # Without log-probabilities.
        events = list(engine.stream(request))
    for event in events:
        (best, logprob), (_, second) = event.top_logprobs
        assert (best, logprob) == (event.token_id, event.logprob)
        assert second < logprob < 0
    assert tokens(events) == alone(lm, prompt, 3)


@pytest.mark.slow_on_tensorflow
def test_engine_scores_a_prompt_as_the_tokens_that_it_generates(lm):
    (prompt,) = prompts_of(lm, [5])
    with Engine(lm, num_slots=2, context=400) as engine:
        generated = list(
            engine.stream(EngineRequest(prompt, 300, GREEDY, top_logprobs=2))
        )
        whole = [*prompt, *tokens(generated)]
        request = EngineRequest(whole, 0, GREEDY, prompt_logprobs=2)
        scores, end = engine.stream(request)
        more = EngineRequest(whole, 2, GREEDY, prompt_logprobs=0)
        again, *_ = engine.stream(more)
    assert (end.token_id, end.finish_reason) == (None, "length")
    assert [scored.token_id for scored in scores.prompt] == whole[1:]
    scored = scores.prompt[len(prompt) - 1 :]
    expected = [event.logprob for event in generated]
    # ONNX Runtime rounds activations to 8 bits, those of several tokens otherwise.
    tolerance = 0.05 if uses_onnx_runtime(lm) else 1e-4
    assert [s.logprob for s in scored] == pytest.approx(expected, abs=tolerance)
    if tolerance < 0.01:
        best = [event.top_logprobs[0][0] for event in generated]
        assert [s.top_logprobs[0][0] for s in scored] == best
    assert [s.logprob for s in again.prompt] == pytest.approx(
        [s.logprob for s in scores.prompt], abs=1e-5
    )


@pytest.mark.backend_free
def test_engine_compiles_a_bounded_number_of_programs():
    """It depends on the sizes of chunks and batches, and not on the requests."""
    import jax

    from keras_openllama.generation.continuous_batching.slot_decoder_xla import CHUNKS

    lm, compiled = make_lm("grouped_heads"), []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(seed, number):
        random = np.random.default_rng(seed)
        with Engine(lm, num_slots=4, context=256) as engine:
            for prompt in prompts_of(lm, random.integers(1, 200, number), seed):
                config = SamplingConfig(temperature=int(random.integers(2)), seed=1)
                new = int(random.integers(1, 30))
                submit(engine, prompt, new, sampling=config)

    jax.monitoring.register_event_duration_secs_listener(count)
    for seed, number in enumerate([10, 20]):
        run(seed, number)
    # Per size of chunk 2, per number of rows 4, and 2 for attention and saved prompts.
    sizes, rows = len(CHUNKS), 3  # 1, 2 and 4 rows.
    assert 0 < len(compiled) <= 2 * sizes + 4 * rows + 2


def test_engine_scores_a_prompt_of_one_token(lm):
    with Engine(lm, num_slots=1, context=64) as engine:
        request = EngineRequest([5], 2, GREEDY, prompt_logprobs=1)
        first, *events = engine.stream(request)
    assert first.prompt == () and len(events) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "at least one"),
        ({"prompt_ids": [10**6]}, "vocabulary"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)
def test_submit_rejects_malformed_requests(lm, changes, message):
    arguments = {"prompt_ids": [5], "max_new_tokens": 4, "sampling": GREEDY}
    engine = Engine(lm, num_slots=1, context=64)
    with pytest.raises(ValueError, match=message):
        engine.submit(EngineRequest(**arguments | changes), print)


def test_submit_rejects_requests_that_exceed_the_context(lm):
    engine = Engine(lm, num_slots=1, context=64)
    with pytest.raises(ContextLengthError, match="at most 64 tokens"):
        submit(engine, [5] * 60, 5)


@pytest.mark.slow_on_tensorflow
def test_engine_measures_the_time_to_the_first_token(lm):
    with Engine(lm, num_slots=1, context=64) as engine:
        list(engine.stream(EngineRequest([5, 6, 7], 3, GREEDY)))
    stats = engine.stats
    assert stats.time_to_first_token_count == len(stats.time_to_first_token) == 1
    assert stats.time_to_first_token_sum == stats.time_to_first_token[0] > 0
    assert (stats.submitted, stats.prompt_tokens, stats.steps) == (1, 3, 3)
