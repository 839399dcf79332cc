"""`keras-openllama finetune` on data as people have it, with chat templates."""

import json

import keras
import pytest

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.cli.finetune import main
from keras_openllama.runs import metrics_log

pytestmark = pytest.mark.backend_free

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [{"from": "human", "value": "Not hot but?"}, {"from": "gpt", "value": "Cold."}]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Restores the variable that `--backend` sets."""
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())


@pytest.fixture
def finetune(small, tmp_path):
    def finetune(records, *more, code=0, name="data.json"):
        path = tmp_path / name
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        output = tmp_path / "run"
        arguments = ["--preset", small, "--data", path, "--output", output]
        arguments += ["--sequence-length", 64, "--batch-size", 2, "--epochs", 1]
        arguments += ["--max-new-tokens", 2, "--validation-fraction", 0.2, *more]
        assert main(list(map(str, arguments))) == code
        return output

    return finetune


def test_finetune_on_chats_of_sharegpt_with_a_template_in_jinja(
    finetune, tmp_path, capsys
):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    chats = [{"id": i, "conversations": TALK} for i in range(8)]
    chats += [{"conversations": [*TALK, TALK[0]]}, {"conversations": TALK[:1]}]
    more = ("--chat-template", template, "--export", "model")
    output = finetune(chats, *more)
    printed = capsys.readouterr()
    log = printed.out + printed.err
    assert "1 example skipped: no reply of the assistant" in log
    assert f"{tmp_path}/data.json, line 1" in log
    assert "1 of 10 chats do not end with a reply" in log
    assert len(metrics_log.read_metrics(output)) == 4
    recipe = json.loads((output / "run.json").read_text())["recipe"]
    assert recipe["chat_template"]["value"] == TEMPLATE
    samples = (output / "samples.txt").read_text()
    assert "Not hot but?" in samples and "Cold." not in samples.split("before")[0]
    # The exported model and the run have the template, which is the default then.
    for preset in (output / "model", output):
        lm = OpenLlamaCausalLM.from_preset(str(preset))
        assert lm.preprocessor.chat_template == TEMPLATE
        lm.generate({"conversations": TALK[:1]}, max_new_tokens=2)
    again = ("--preset", output / "model", "--output", tmp_path / "again")
    finetune([{"instruction": "Q", "output": "A"}] * 9, *again, "--export", "none")
    recipe = json.loads((tmp_path / "again" / "run.json").read_text())["recipe"]
    assert recipe["chat_template"]["value"] == TEMPLATE


def test_finetune_reports_all_invalid_examples_with_their_lines(
    finetune, tmp_path, capsys
):
    lines = ['{"prompt": "a", "response": "b"}'] * 5
    lines[1], lines[3] = '{"prompt": "a"', '{"prompt": "a", "answer": "b"}'
    finetune("\n".join(lines), code=2, name="data.jsonl")
    error = capsys.readouterr().err
    assert "2 errors of 5 examples" in error
    assert "data.jsonl, line 2: not valid JSON" in error
    assert "data.jsonl, line 4: it must have the keys" in error


def test_finetune_stops_if_too_many_examples_are_skipped(finetune, capsys):
    pairs = [{"prompt": "a", "response": "b" * (i > 1)} for i in range(6)]
    finetune(pairs, code=2)
    error = capsys.readouterr().err
    assert "2 of 6 examples would be skipped, more than the fraction 0.1" in error
    assert "2 examples skipped: empty response" in error
    output = finetune(pairs, "--max-skipped", 0.5, "--export", "none")
    assert len(metrics_log.read_metrics(output)) == 2


def test_finetune_names_the_chats_that_a_template_refuses(finetune, tmp_path, capsys):
    template = tmp_path / "roles.json"
    template.write_text('{"user": "Q: {content}", "assistant": " A: {content}"}')
    chats = [{"messages": [{"role": "system", "content": "S"}]}] * 3
    for chat in chats:
        chat["messages"] = [*chat["messages"], *TALK]
    finetune(chats, "--chat-template", template, code=2)
    assert "role 'system' is not in the chat template" in capsys.readouterr().err
    finetune(chats, code=2)
    assert "Chats need a chat template" in capsys.readouterr().err
