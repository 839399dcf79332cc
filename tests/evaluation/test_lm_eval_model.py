"""The adapter gives the same results as the harness's `hf` on an exported model."""

import lm_eval
import pytest
from keras import ops
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from local_tasks import write_own_task, write_tasks
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

import keras_openllama.evaluation
from keras_openllama.evaluation import tasks

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = TinyShape("grouped_head_dim_100", 4, 1, 100, hidden_dim=48, context=512)
LONG = "the value of the expression is a sequence " * 60
PAIRS = [
    ("The value", " of the expression"),
    ("The value ", "of the expression"),
    ("  Spaces before", "  and two between"),
    ("A line\n", "and another"),
    ("A line\n\n", " and\n\nanother"),
    ("", "No context"),
    ("", " No context, and a space"),
    ("\n", "x"),
    ("Tab\tand\r\nmore", "\tx"),
    ("Caf\u00e9 na\u00efve \u4e2d\u6587", " \u65e5\u672c\u8a9e \U0001f600"),
    ("a\u00a0b", "\u00a0c"),
    ("An exam", "ple cut within a word"),
    ("<s>Begins with a token", " of control"),
    ("Ends</s>", " with one"),
    ("It is <unk> to", " <unk> me"),
]


def instances(kind, all_arguments):
    return [Instance(kind, {}, arguments, 0) for arguments in all_arguments]


def loglikelihoods(model, pairs):
    return model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def assert_close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (value, _), (expected_value, _) in zip(found, expected, strict=True):
        assert value == pytest.approx(expected_value, abs=1e-3)


@pytest.fixture(
    scope="module",
    params=[
        "keeps spaces",
        pytest.param("merges spaces", marks=pytest.mark.slow_on_tensorflow),
    ],
)
def lm(request):
    lm = random_lm(SHAPE, trained_model(keep_spaces=request.param == "keeps spaces"))
    # Generates no byte tokens: transformers renders invalid UTF-8 differently.
    head = ops.convert_to_numpy(lm.lm_head.kernel).copy()
    head[3:259] = 0
    lm.lm_head.kernel.assign(head)
    return lm


@pytest.fixture(scope="module")
def exported(lm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    lm.export_to_transformers(directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(lm):
    return get_model("keras_openllama")(lm=lm, batch_size=2)


@pytest.fixture(scope="module")
def hf(exported):
    return get_model("hf")(
        pretrained=exported, device="cpu", dtype="float32", batch_size=2
    )


@pytest.mark.filterwarnings("ignore:.*merges runs of spaces")
def test_loglikelihood_matches_hf_on_difficult_strings(adapter, hf):
    assert_close(loglikelihoods(adapter, PAIRS), loglikelihoods(hf, PAIRS))


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_flags_a_greedy_generation(adapter, hf):
    (text,) = adapter.generate_until(
        instances("generate_until", [("The value", {"max_gen_toks": 2, "until": []})])
    )
    pairs = [("The value", " " + text), ("The value", " zebra")]
    found = loglikelihoods(adapter, pairs)
    assert_close(found, loglikelihoods(hf, pairs))


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_truncates_long_contexts_like_hf_without_keep_bos(lm, hf):
    model = get_model("keras_openllama")(lm=lm, keep_bos=False)
    pairs = [(LONG, " of the expression")]
    assert_close(loglikelihoods(model, pairs), loglikelihoods(hf, pairs))


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_keeps_bos_of_truncated_contexts(adapter, hf):
    pair = LONG, " of the expression"
    context, ids = hf._encode_pair(*pair)
    truncated = [context[0], *(context + ids)[-hf.max_length :][: -len(ids)]]
    expected = hf._loglikelihood_tokens([(pair, truncated, ids)], disable_tqdm=True)
    assert_close(loglikelihoods(adapter, [pair]), expected)


def test_tok_encode_adds_one_start_token(adapter):
    start = adapter.prefix_token_id
    for text in ("", "The value", "<s>The value", "<s>"):
        ids = adapter.tok_encode(text)
        assert ids[0] == start
        assert start not in ids[1:]
    assert start not in adapter.tok_encode("The value", add_special_tokens=False)
    marked, bare = (
        adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        for text in ("<s>The value", "The value")
    )
    assert marked == bare


def test_loglikelihood_rolling_matches_hf_with_one_start_token(adapter, hf):
    texts = [("The value of the expression",), ("",), (LONG,), ("\u4e2d\u6587",)]
    requests = instances("loglikelihood_rolling", texts)
    found = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    hf.add_bos_token = False  # Otherwise `hf` adds two.
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    hf.add_bos_token = None
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow_on_tensorflow
def test_generate_until_matches_hf(adapter, hf):
    requests = [
        ("The value", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("An expression list", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("A", {"until": ["e", "zz"], "max_gen_toks": 7}),
        (LONG, {"until": [], "max_gen_toks": 5}),
    ]
    # `hf` does not keep `<s>` of the long prompt.
    like_hf = get_model("keras_openllama")(lm=adapter.lm, batch_size=2, keep_bos=False)
    expected = hf.generate_until(
        instances("generate_until", requests), disable_tqdm=True
    )
    found = like_hf.generate_until(
        instances("generate_until", requests), disable_tqdm=True
    )
    assert found == expected
    assert (
        adapter.generate_until(instances("generate_until", requests[:3]))
        == expected[:3]
    )


NAMES = ("hellaswag", "arc_easy", "winogrande", "boolq", "record", "truthfulqa_mc2")


@pytest.fixture
def load(tmp_path):
    def load(*names):
        loaded, skipped = tasks.load_tasks(
            names, write_tasks(tmp_path / "tasks", count=8)
        )
        assert not skipped
        return loaded

    return load


@pytest.mark.slow_on_tensorflow
def test_evaluate_tasks_matches_hf(adapter, hf, load):
    found = tasks.evaluate_tasks(adapter, load(*NAMES))
    expected = tasks.evaluate_tasks(hf, load(*NAMES))
    assert [row["task"] for row in found] == [row["task"] for row in expected]
    assert {row["task"] for row in found} == set(NAMES)
    for row, other in zip(found, expected, strict=True):
        tolerance = 1e-3 if row["task"] == "truthfulqa_mc2" else 0
        assert row == other | {
            key: pytest.approx(other[key], abs=tolerance) for key in ("value", "stderr")
        }


@pytest.mark.slow_on_tensorflow
def test_evaluate_tasks_with_few_shot_examples_matches_hf(adapter, hf, load):
    options = {"num_fewshot": 2, "limit": 5}
    found = tasks.evaluate_tasks(adapter, load("arc_easy"), **options)
    assert found == tasks.evaluate_tasks(hf, load("arc_easy"), **options)
    assert (found[0]["samples"], found[0]["num_fewshot"]) == (5, 2)


# --- Beyond `hf` ---


@pytest.mark.slow_on_tensorflow
def test_response_cache_avoids_computing_responses_again(lm, tmp_path, monkeypatch):
    path = tmp_path / "responses.sqlite"
    requests = [*PAIRS[:5], (LONG, " of it"), PAIRS[0]]
    prompts = [("The value", {"max_gen_toks": 4, "until": []})]
    first = get_model("keras_openllama")(lm=lm, response_cache=path)
    expected = loglikelihoods(first, requests)
    texts = first.generate_until(instances("generate_until", prompts))
    again = get_model("keras_openllama")(lm=lm, response_cache=path)

    def refuse(*args):
        raise AssertionError("This response is cached.")

    monkeypatch.setattr(again.scorer, "score_batch", refuse)
    monkeypatch.setattr(
        "keras_openllama.evaluation.lm_eval_model.generate_until", refuse
    )
    assert loglikelihoods(again, requests) == expected
    assert again.generate_until(instances("generate_until", prompts)) == texts


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_resumes_bit_exactly_after_an_interruption(
    lm, tmp_path, monkeypatch
):
    pairs = [(f"{i} {LONG[i : 150 + i]}", f" of {i}") for i in range(24)]
    options = {"lm": lm, "batch_size": 1}
    expected = loglikelihoods(get_model("keras_openllama")(**options), pairs)
    path = tmp_path / "responses.sqlite"
    killed = get_model("keras_openllama")(**options, response_cache=path)
    score_batch, calls = killed.scorer.score_batch, []

    def score_once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(score_batch(*arguments))
        return calls[0]

    monkeypatch.setattr(killed.scorer, "score_batch", score_once)
    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(killed, pairs)
    resumed = get_model("keras_openllama")(**options, response_cache=path)
    assert loglikelihoods(resumed, pairs) == expected


@pytest.mark.slow_on_tensorflow
def test_the_cache_of_the_harness_works(lm, tmp_path, monkeypatch):
    model = get_model("keras_openllama")(lm=lm)
    path = str(tmp_path / "cache.db")
    requests = instances("loglikelihood", PAIRS)
    first = CachingLM(model, path).loglikelihood(requests)
    again = get_model("keras_openllama")(lm=lm)
    monkeypatch.setattr(again.scorer, "score_batch", None)
    assert CachingLM(again, path).loglikelihood(requests) == first


@pytest.mark.slow_on_tensorflow
def test_generate_until_draws_distinct_samples_and_restores_the_sampler(lm):
    model = get_model("keras_openllama")(lm=lm)
    sampler = lm.sampler
    options = {"do_sample": True, "max_gen_toks": 12, "until": [], "seed": 1}
    requests = instances("generate_until", [("The value", options)] * 12)
    texts = model.generate_until(requests)  # In two batches.
    assert len(set(texts)) > 9
    again = get_model("keras_openllama")(lm=lm)
    assert again.generate_until(requests) == texts
    assert lm.sampler is sampler


@pytest.mark.slow_on_tensorflow
def test_generate_until_reads_temperature_0_as_greedy_and_top_k_0_as_off(lm):
    def responses(**options):
        options = {"max_gen_toks": 8, "until": [], "seed": 1, **options}
        model = get_model("keras_openllama")(lm=lm)
        return model.generate_until(instances("generate_until", [("The", options)]))

    assert responses(do_sample=True, temperature=0.0) == responses()
    sampled = responses(do_sample=True, temperature=2.0)
    for top_k in (0, -1, 100_000):
        assert responses(do_sample=True, temperature=2.0, top_k=top_k) == sampled
    with pytest.raises(ValueError, match=r"`TopKSampler\.k` must be.*k=-5"):
        responses(do_sample=True, top_k=-5)


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_scores_a_token_that_spans_the_boundary(adapter):
    (inside,) = loglikelihoods(adapter, [("expressio", "n")])
    assert inside[0] < 0


@pytest.mark.slow_on_tensorflow
def test_loglikelihood_of_an_empty_continuation_is_zero(adapter):
    assert loglikelihoods(adapter, [("The value", ""), ("", "")]) == [(0.0, True)] * 2


@pytest.mark.slow_on_tensorflow
def test_the_first_token_is_predicted_from_bos_without_add_bos(lm):
    bare = get_model("keras_openllama")(lm=lm, add_bos=False)
    model = get_model("keras_openllama")(lm=lm)
    assert loglikelihoods(bare, [(" ", "x")]) == loglikelihoods(model, [("", " x")])
    options = {"max_gen_toks": 4, "until": []}
    assert len(bare.generate_until(instances("generate_until", [("", options)]))) == 1


def test_add_bos_defaults_to_the_preprocessor(lm):
    lm.preprocessor.add_start_token = False
    try:
        model = get_model("keras_openllama")(lm=lm)
        marked = get_model("keras_openllama")(lm=lm, add_bos=True)
    finally:
        lm.preprocessor.add_start_token = True
    start = model.prefix_token_id
    assert start not in model.tok_encode("The value")
    assert start in marked.tok_encode("The value")


def test_no_requests_give_no_responses(adapter):
    assert loglikelihoods(adapter, []) == []
    assert adapter.generate_until([]) == []


@pytest.mark.slow_on_tensorflow
def test_separate_tokenization_of_continuations(lm, adapter):
    separate = get_model("keras_openllama")(lm=lm, separate_tokenization=True)
    ids = separate._encode_pair("The value", " of it")[1]
    tokenizer = lm.preprocessor.tokenizer
    assert ids == tokenizer.tokenize(" of it")
    merged = adapter._encode_pair("The value", " of it")[1] == ids
    assert merged is not tokenizer.keeps_spaces


def test_importing_the_package_registers_the_model():
    assert keras_openllama.evaluation.MODEL == "keras_openllama"
    model = get_model("keras_openllama").create_from_arg_string(
        "preset=open_llama_nano,dtype=float32,max_length=64",
        {"batch_size": "auto", "device": "cuda:0"},  # As the harness passes them.
    )
    assert (model.batch_size, model.max_length) == (8, 64)
    assert model.get_model_info()["model_num_parameters"] == 4_524_288


@pytest.mark.parametrize(
    "model_args", ["preset=nano", {"preset": "nano"}], ids=["text", "dict"]
)
@pytest.mark.slow_on_tensorflow
def test_simple_evaluate_creates_the_model_from_its_name(model_args, tmp_path):
    data = write_tasks(tmp_path / "data", count=4)
    write_own_task(tmp_path, data / "boolq.jsonl")
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    found = lm_eval.simple_evaluate(
        "keras_openllama", model_args, tasks=["mine"], task_manager=manager, limit=3
    )
    assert found["n-samples"]["mine"] == {"original": 4, "effective": 3}
    assert found["results"]["mine"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    assert found["config"]["model_num_parameters"] == 4_524_288


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass one of `preset`"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        (
            {"max_length": 10**6},
            "from 1 to 512. Received: max_length=1000000",
        ),
        ({"max_length": "1k"}, "max_length='1k'"),
        ({"max_gen_toks": 0}, "`max_gen_toks` must be .* Received: max_gen_toks=0"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many'"),
        ({"add_bos": "off"}, "`add_bos` must be .* Received: add_bos='off'"),
        ({"separate_tokenization": 1}, "separate_tokenization=1"),
        ({"dtype": "bfloat16"}, "apply to `preset` only.* Received: dtype='bfloat16'"),
        ({"revision": "main", "fsdp": 2}, "Received: revision='main', fsdp=2"),
    ],
)
def test_model_rejects_invalid_arguments(lm, arguments, message):
    model = {"lm": lm} if arguments else {}
    with pytest.raises(ValueError, match=message):
        get_model("keras_openllama")(**model, **arguments)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_gen_toks"])
def test_model_rejects_invalid_arguments_before_it_loads_the_preset(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}=0"):
        get_model("keras_openllama")("no preset", **{name: 0})


def test_model_rejects_invalid_requests(adapter):
    with pytest.raises(ValueError, match="A continuation has"):
        loglikelihoods(adapter, [("The value", LONG)])
    beams = {"num_beams": 4, "until": []}
    with pytest.raises(ValueError, match="num_beams"):
        adapter.generate_until(instances("generate_until", [("The value", beams)]))
    endless = {"max_gen_toks": 512, "until": []}
    with pytest.raises(ValueError, match="less than the context length of 512"):
        adapter.generate_until(instances("generate_until", [("The value", endless)]))
