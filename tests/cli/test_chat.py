import io
import json

import pytest
from chat_model import TEMPLATE, nano_with_template

from keras_openllama import SamplingConfig
from keras_openllama.cli.chat import Chat, main, run_chat
from keras_openllama.generation.continuous_batching.engine import Engine

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def lm():
    return nano_with_template()


@pytest.fixture(scope="module")
def engine(lm):
    with Engine(lm, num_slots=1, context=128) as engine:
        yield engine


@pytest.fixture
def chat(lm, engine):
    return Chat(lm, engine, SamplingConfig(temperature=0), 6, system="Be brief.")


def test_replies_are_what_generate_returns_for_all_messages(chat, lm):
    first = "".join(chat.reply("Who is Ahab?"))
    second = "".join(chat.reply("And the whale?"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is Ahab?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And the whale?"},
    ]
    assert chat.messages == [*messages, {"role": "assistant", "content": second}]
    expected = [
        lm.generate({"messages": messages[:n]}, max_new_tokens=6) for n in (2, 4)
    ]
    assert [first, second] == expected


def test_a_reply_that_is_interrupted_is_kept_as_far_as_it_came(chat):
    reply = chat.reply("Who is Ahab?")
    piece = next(reply)
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}


def test_stop_strings_end_a_reply(lm, engine):
    sampling = SamplingConfig(temperature=0)
    text = "".join(Chat(lm, engine, sampling, 6).reply("The sea"))
    stop = text[3:5]
    stopped = Chat(lm, engine, sampling, 6, stops=(stop,))
    assert "".join(stopped.reply("The sea")) == text[: text.index(stop)]


def test_a_message_that_is_too_long_is_not_added(chat):
    with pytest.raises(ValueError, match="Begin a new one with /reset"):
        list(chat.reply("sea " * 200))
    assert [message["role"] for message in chat.messages] == ["system"]


def test_commands_undo_and_reset_the_chat(chat, capsys):
    lines = iter(["Hi", "Ho", "/undo", "/help", "/what", " ", "/exit", "never"])
    run_chat(chat, lambda: next(lines))
    assert [message["content"] for message in chat.messages[:2]] == ["Be brief.", "Hi"]
    assert len(chat.messages) == 3
    output, errors = capsys.readouterr()
    assert chat.messages[2]["content"] in output
    assert "Unknown command: /what" in errors and "begin a new chat" in errors
    lines = iter(["/reset", None])
    run_chat(chat, lambda: next(lines))
    assert len(chat.messages) == 1


def test_chat_reads_the_messages_from_a_pipe(tmp_path, monkeypatch, capsys):
    template = tmp_path / "template.json"
    template.write_text(json.dumps(TEMPLATE))
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is Ahab?\n"))
    options = ["--max-new-tokens", "4", "--temperature", "0"]
    assert main(["--chat-template", str(template), *options]) == 0
    assert capsys.readouterr().out.strip()


def test_chat_needs_a_chat_template(capsys):
    assert main([]) == 2
    assert "add --chat-template FILE" in capsys.readouterr().err
