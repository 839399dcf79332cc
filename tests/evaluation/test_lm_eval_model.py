"""The harness gets from us what its own `hf` gets from an export of the model."""

import pytest
from keras import ops
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from local_tasks import write_tasks
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
]


def instances(kind, all_arguments):
    return [Instance(kind, {}, arguments, 0) for arguments in all_arguments]


def loglikelihoods(model, pairs):
    return model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def assert_alike(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.fixture(
    scope="module",
    params=[
        "keeps spaces",
        pytest.param("merges spaces", marks=pytest.mark.slow_on_tensorflow),
    ],
)
def lm(request):
    lm = random_lm(SHAPE, trained_model(keep_spaces=request.param == "keeps spaces"))
    # No bytes in what it writes: transformers shows broken ones in another way.
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
def ours(lm):
    return get_model("keras_openllama")(lm=lm, batch_size=2)


@pytest.fixture(scope="module")
def theirs(exported):
    return get_model("hf")(
        pretrained=exported, device="cpu", dtype="float32", batch_size=2
    )


@pytest.mark.filterwarnings("ignore:.*merges runs of spaces")
def test_loglikelihoods_of_strings_that_trip_tokenizers(ours, theirs):
    assert_alike(loglikelihoods(ours, PAIRS), loglikelihoods(theirs, PAIRS))


def test_what_the_model_would_say_itself_is_greedy(ours, theirs):
    (text,) = ours.generate_until(
        instances("generate_until", [("The value", {"max_gen_toks": 2, "until": []})])
    )
    pairs = [("The value", " " + text), ("The value", " zebra")]
    found = loglikelihoods(ours, pairs)
    assert_alike(found, loglikelihoods(theirs, pairs))


def test_what_is_longer_than_the_context_is_cut_as_theirs_is_without_its_start(
    lm, theirs
):
    model = get_model("keras_openllama")(lm=lm, keep_bos=False)
    pairs = [(LONG, " of the expression")]
    assert_alike(loglikelihoods(model, pairs), loglikelihoods(theirs, pairs))


def test_what_is_longer_than_the_context_keeps_its_start(ours, theirs):
    pair = LONG, " of the expression"
    context, ids = theirs._encode_pair(*pair)
    kept = [context[0], *(context + ids)[-theirs.max_length :][: -len(ids)]]
    expected = theirs._loglikelihood_tokens([(pair, kept, ids)], disable_tqdm=True)
    assert_alike(loglikelihoods(ours, [pair]), expected)


def test_a_text_begins_with_one_start_and_never_two(ours):
    start = ours.prefix_token_id
    for text in ("", "The value", "<s>The value", "<s>"):
        ids = ours.tok_encode(text)
        assert ids[0] == start
        assert start not in ids[1:]
    assert start not in ours.tok_encode("The value", add_special_tokens=False)
    marked, bare = (
        ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        for text in ("<s>The value", "The value")
    )
    assert marked == bare


def test_whole_texts_cost_what_theirs_do_with_one_start(ours, theirs):
    texts = [("The value of the expression",), ("",), (LONG,), ("\u4e2d\u6587",)]
    asked = instances("loglikelihood_rolling", texts)
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    theirs.add_bos_token = False  # Else theirs come to two.
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    theirs.add_bos_token = None
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow_on_tensorflow
def test_generations_are_theirs(ours, theirs):
    asked = [
        ("The value", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("An expression list", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("A", {"until": ["e", "zz"], "max_gen_toks": 7}),
        (LONG, {"until": [], "max_gen_toks": 5}),
    ]
    # Theirs cuts the start off the long one.
    alike = get_model("keras_openllama")(lm=ours.lm, batch_size=2, keep_bos=False)
    expected = theirs.generate_until(
        instances("generate_until", asked), disable_tqdm=True
    )
    found = alike.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found == expected
    assert ours.generate_until(instances("generate_until", asked[:3])) == expected[:3]


NAMES = ("hellaswag", "arc_easy", "winogrande", "boolq", "record", "truthfulqa_mc2")


@pytest.fixture
def load(tmp_path):
    def load(*names):
        loaded, skipped = tasks.load(names, write_tasks(tmp_path / "tasks", count=8))
        assert not skipped
        return loaded

    return load


def test_tasks_come_to_the_same_values(ours, theirs, load):
    found = tasks.run(ours, load(*NAMES))
    expected = tasks.run(theirs, load(*NAMES))
    assert [row["task"] for row in found] == [row["task"] for row in expected]
    assert {row["task"] for row in found} == set(NAMES)
    for row, other in zip(found, expected, strict=True):
        tolerance = 1e-3 if row["task"] == "truthfulqa_mc2" else 0
        assert row == other | {
            key: pytest.approx(other[key], abs=tolerance) for key in ("value", "stderr")
        }


@pytest.mark.slow_on_tensorflow
def test_examples_in_the_prompt_are_theirs_too(ours, theirs, load):
    options = {"num_fewshot": 2, "limit": 5}
    found = tasks.run(ours, load("arc_easy"), **options)
    assert found == tasks.run(theirs, load("arc_easy"), **options)
    assert (found[0]["samples"], found[0]["num_fewshot"]) == (5, 2)


# --- On our own account ---


@pytest.mark.slow_on_tensorflow
def test_answers_are_kept_and_not_computed_again(lm, tmp_path, monkeypatch):
    path = tmp_path / "answers.sqlite"
    asked = [*PAIRS[:5], (LONG, " of it"), PAIRS[0]]
    prompts = [("The value", {"max_gen_toks": 4, "until": []})]
    first = get_model("keras_openllama")(lm=lm, answers=path)
    expected = loglikelihoods(first, asked)
    texts = first.generate_until(instances("generate_until", prompts))
    again = get_model("keras_openllama")(lm=lm, answers=path)

    def refuse(*args):
        raise AssertionError("This was answered before.")

    monkeypatch.setattr(again.scorer, "run", refuse)
    monkeypatch.setattr(
        "keras_openllama.evaluation.lm_eval_model.continuations", refuse
    )
    assert loglikelihoods(again, asked) == expected
    assert again.generate_until(instances("generate_until", prompts)) == texts


@pytest.mark.slow_on_tensorflow
def test_what_was_interrupted_gives_the_same_bits(lm, tmp_path, monkeypatch):
    pairs = [(f"{i} {LONG[i : 150 + i]}", f" of {i}") for i in range(24)]
    options = {"lm": lm, "batch_size": 1}
    expected = loglikelihoods(get_model("keras_openllama")(**options), pairs)
    path = tmp_path / "answers.sqlite"
    killed = get_model("keras_openllama")(**options, answers=path)
    run, runs = killed.scorer.run, []

    def run_once(*arguments):
        if runs:
            raise KeyboardInterrupt
        runs.append(run(*arguments))
        return runs[0]

    monkeypatch.setattr(killed.scorer, "run", run_once)
    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(killed, pairs)
    resumed = get_model("keras_openllama")(**options, answers=path)
    assert loglikelihoods(resumed, pairs) == expected


@pytest.mark.slow_on_tensorflow
def test_the_harness_keeps_answers_in_its_own_cache_too(lm, tmp_path, monkeypatch):
    model = get_model("keras_openllama")(lm=lm)
    path = str(tmp_path / "cache.db")
    asked = instances("loglikelihood", PAIRS)
    first = CachingLM(model, path).loglikelihood(asked)
    again = get_model("keras_openllama")(lm=lm)
    monkeypatch.setattr(again.scorer, "run", None)
    assert CachingLM(again, path).loglikelihood(asked) == first


@pytest.mark.slow_on_tensorflow
def test_samples_differ_and_leave_the_sampler_as_it_was(lm):
    model = get_model("keras_openllama")(lm=lm)
    sampler = lm.sampler
    options = {"do_sample": True, "max_gen_toks": 12, "until": [], "seed": 1}
    asked = instances("generate_until", [("The value", options)] * 12)
    texts = model.generate_until(asked)  # In two batches.
    assert len(set(texts)) > 9
    again = get_model("keras_openllama")(lm=lm)
    assert again.generate_until(asked) == texts
    assert lm.sampler is sampler


def test_a_continuation_within_a_token_of_the_context_has_that_token_scored(ours):
    (inside,) = loglikelihoods(ours, [("expressio", "n")])
    assert inside[0] < 0


def test_an_empty_continuation_costs_nothing(ours):
    assert loglikelihoods(ours, [("The value", ""), ("", "")]) == [(0.0, True)] * 2


def test_the_first_token_is_predicted_from_the_start_if_nothing_is_before_it(lm):
    bare = get_model("keras_openllama")(lm=lm, add_bos=False)
    model = get_model("keras_openllama")(lm=lm)
    assert loglikelihoods(bare, [(" ", "x")]) == loglikelihoods(model, [("", " x")])
    options = {"max_gen_toks": 4, "until": []}
    assert len(bare.generate_until(instances("generate_until", [("", options)]))) == 1


def test_nothing_asked_is_nothing_answered(ours):
    assert loglikelihoods(ours, []) == []
    assert ours.generate_until([]) == []


def test_answers_tokenized_apart_read_as_in_2023(lm, ours):
    apart = get_model("keras_openllama")(lm=lm, apart=True)
    ids = apart._encode_pair("The value", " of it")[1]
    tokenizer = lm.preprocessor.tokenizer
    assert ids == tokenizer.tokenize(" of it")
    merged = ours._encode_pair("The value", " of it")[1] == ids
    assert merged is not tokenizer.keeps_spaces


def test_importing_the_package_registers_the_model():
    assert keras_openllama.evaluation.MODEL == "keras_openllama"
    model = get_model("keras_openllama").create_from_arg_string(
        "preset=open_llama_nano,dtype=float32,max_length=64",
        {"batch_size": "auto", "device": "cuda:0"},  # As the harness gives them.
    )
    assert (model.batch_size, model.max_length) == (8, 64)
    assert model.get_model_info()["model_num_parameters"] == 4_524_288


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "Name one model"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"max_length": 10**6}, "max_length=1000000"),
    ],
)
def test_arguments_that_make_no_sense_are_named(lm, arguments, told):
    model = {"lm": lm} if arguments else {}
    with pytest.raises(ValueError, match=told):
        get_model("keras_openllama")(**model, **arguments)


def test_requests_that_cannot_be_are_named(ours):
    with pytest.raises(ValueError, match="A continuation has"):
        loglikelihoods(ours, [("The value", LONG)])
    beams = {"num_beams": 4, "until": []}
    with pytest.raises(ValueError, match="num_beams"):
        ours.generate_until(instances("generate_until", [("The value", beams)]))
    endless = {"max_gen_toks": 512, "until": []}
    with pytest.raises(ValueError, match="asks for 512 new tokens"):
        ours.generate_until(instances("generate_until", [("The value", endless)]))
