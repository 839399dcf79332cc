"""`--apply_chat_template` renders the prompts of tasks as the harness's `hf` does."""

import lm_eval
import pytest
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from local_tasks import write_own_task, write_tasks
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.backend_free]

SHAPE = TinyShape("one_layer", 2, 2, 16, num_layers=1, context=1024)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The sea?"},
    {"role": "assistant", "content": "It was calm."},
    {"role": "user", "content": "And the captain?"},
]
TO_CONTINUE = [*CHAT, {"role": "assistant", "content": "He was "}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TRIMMING = TEMPLATE.replace("m.content", "m.content | trim")
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TEMPLATE
)
BY_ROLE = {"user": "Q: {content}\n", "assistant": "A: {content}", "system": "{content}"}


@pytest.fixture(scope="module")
def model():
    return OpenLlamaLM(lm=random_lm(SHAPE, trained_model(True)))


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    """The model `hf`, with the chat template that `model` had when it was exported."""
    path = tmp_path_factory.mktemp("export") / "model"
    model.lm.preprocessor.chat_template = BY_ROLE
    model.lm.export_to_transformers(path)
    return get_model("hf")(pretrained=str(path), device="cpu", dtype="float32")


def assert_renders_like(hf, model):
    assert model.apply_chat_template(CHAT) == hf.apply_chat_template(CHAT)
    assert model.apply_chat_template(
        TO_CONTINUE, add_generation_prompt=False
    ) == hf.apply_chat_template(TO_CONTINUE, add_generation_prompt=False)
    assert model.chat_template(True) == hf.chat_template(True)
    text = model.apply_chat_template(CHAT)
    assert model.tok_encode(text) == hf.tok_encode(text)


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING, WITHOUT_SYSTEM])
def test_apply_chat_template_renders_like_hf(model, hf, template, monkeypatch):
    monkeypatch.setattr(hf.tokenizer, "chat_template", template)
    model.lm.preprocessor.chat_template = template
    assert_renders_like(hf, model)


def test_apply_chat_template_renders_a_template_by_role_like_its_export(model, hf):
    model.lm.preprocessor.chat_template = BY_ROLE
    assert_renders_like(hf, model)


def test_apply_chat_template_warns_if_it_drops_system_messages(model, caplog):
    model.lm.preprocessor.chat_template = WITHOUT_SYSTEM
    assert "brief" not in model.apply_chat_template(CHAT)
    assert "has no system messages" in caplog.text


@pytest.mark.parametrize("multiturn", [True, False])
def test_simple_evaluate_with_a_chat_template_matches_hf(
    model, hf, multiturn, tmp_path
):
    model.lm.preprocessor.chat_template = BY_ROLE
    write_own_task(tmp_path, write_tasks(tmp_path / "data", count=4) / "boolq.jsonl")
    found, expected = (
        lm_eval.simple_evaluate(
            evaluated,
            tasks=["mine"],
            task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
            limit=2,
            num_fewshot=1,
            apply_chat_template=True,
            system_instruction="Answer by yes or no.",
            fewshot_as_multiturn=multiturn,
            bootstrap_iters=0,
        )["samples"]["mine"]
        for evaluated in (model, hf)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["arguments"] == theirs["arguments"]
        assert "Answer by yes or no." in str(ours["arguments"])
        for (log_prob, _), (other, _) in zip(
            ours["filtered_resps"], theirs["filtered_resps"], strict=True
        ):
            assert log_prob == pytest.approx(other, abs=1e-3)


def test_tokenizer_name_tells_chat_templates_apart(model):
    names = set()
    for template in (TEMPLATE, TRIMMING, BY_ROLE):
        model.lm.preprocessor.chat_template = template
        names.add(model.tokenizer_name)
    assert len(names) == 3 and not any("/" in name for name in names)


def test_apply_chat_template_needs_the_models_chat_template(model):
    model.lm.preprocessor.chat_template = None
    assert model.chat_template(False) is None
    for call in (
        lambda: model.apply_chat_template(CHAT),
        lambda: model.chat_template(True),
        lambda: model.tokenizer_name,
    ):
        with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
            call()


def test_chat_template_names_templates_that_are_not_kept(model):
    model.lm.preprocessor.chat_template = TEMPLATE
    assert model.chat_template("default") == TEMPLATE
    with pytest.raises(ValueError, match=r"keeps the default.*='tool_use'"):
        model.chat_template("tool_use")


def test_apply_chat_template_rejects_a_message_that_is_not_rendered(model):
    model.lm.preprocessor.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="does not render the last message"):
        model.apply_chat_template(CHAT, add_generation_prompt=False)
