"""Chats have the token ids and the targets of `apply_chat_template` of transformers."""

import json

import pytest
import transformers
from tiny_models import SHAPES, TinyShape, in_transformers, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM, OpenLlamaCausalLMPreprocessor
from keras_openllama.text.inputs import normalize_examples

pytestmark = pytest.mark.backend_free

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The sea?"},
    {"role": "assistant", "content": "It was calm."},
    {"role": "user", "content": "And the captain?"},
    {"role": "assistant", "content": "He was at sea."},
]
TAGGED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\n"
    "BOT:{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}BOT:{% endif %}"
)
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ROLES = {"system": "{content}\n", "user": "Q: {content}\n", "assistant": "A: {content}"}


def exported(template, path, keep_spaces=True):
    lm = random_lm(SHAPES[0], trained_model(keep_spaces=keep_spaces))
    lm.preprocessor.chat_template = template
    lm.export_to_transformers(path)
    return lm.preprocessor, transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("keep_spaces", [True, False])
@pytest.mark.parametrize("template", [TAGGED, UNTAGGED])
def test_jinja_chats_have_the_ids_and_targets_of_transformers(
    template, keep_spaces, tmp_path
):
    preprocessor, tokenizer = exported(template, tmp_path / "out", keep_spaces)
    assert tokenizer.chat_template == template
    expected = tokenizer.apply_chat_template(
        CHAT, chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
    )
    data = normalize_examples([{"messages": CHAT}])
    examples = preprocessor.tokenize_examples(data, sequence_length=500)
    assert examples.token_ids[0] == expected["input_ids"]
    assert examples.loss_masks[0] == [bool(m) for m in expected["assistant_masks"]]
    assert examples.num_bytes == len(" It was calm. He was at sea.")
    prompt = tokenizer.apply_chat_template(
        CHAT[:4], add_generation_prompt=True, return_dict=False
    )
    assert preprocessor.chat_ids(CHAT[:4]) == prompt


def test_a_template_by_role_is_exported_as_jinja(tmp_path):
    preprocessor, tokenizer = exported(ROLES, tmp_path / "out")
    data = normalize_examples([{"messages": CHAT}])
    [ids] = preprocessor.tokenize_examples(data, sequence_length=500).token_ids
    found = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(found) == preprocessor.tokenizer.processor.decode(ids) or (
        tokenizer.decode(found, skip_special_tokens=True)
        == tokenizer.decode(ids, skip_special_tokens=True)
    )
    assert found.count(2) == ids.count(2) == 2 and found[0] == ids[0] == 1


def test_a_model_keeps_its_chat_template_through_every_format(tmp_path):
    exported(TAGGED, tmp_path / "out")
    lm = OpenLlamaCausalLM.from_preset(str(tmp_path / "out"))
    assert lm.preprocessor.chat_template == TAGGED
    lm.save_to_preset(tmp_path / "saved")
    (tmp_path / "out" / "chat_template.jinja").unlink()  # As before transformers 4.52.
    for path in ("out", "saved"):
        again = OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path / path))
        assert again.chat_template == TAGGED
    from keras_openllama.convert import convert

    convert(str(tmp_path / "saved"), tmp_path / "converted", "transformers")
    assert (tmp_path / "converted" / "chat_template.jinja").read_text() == TAGGED


def test_from_preset_warns_of_an_invalid_template_and_ignores_it(tmp_path):
    exported(TAGGED, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{% for %}")
    with pytest.warns(UserWarning, match="not valid Jinja.*It is ignored"):
        preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path / "out"))
    assert preprocessor.chat_template is None


def test_the_weight_of_a_reply_is_0_or_1(tmp_path):
    preprocessor, _ = exported(TAGGED, tmp_path / "out")
    chat = [
        *CHAT[:2],
        {**CHAT[2], "weight": 0},
        *CHAT[3:],
        {"role": "user", "content": "?"},
    ]
    for template in (TAGGED, UNTAGGED, ROLES):
        preprocessor.chat_template = template
        _, y, weights = preprocessor({"messages": chat}, sequence_length=500)
        learned = preprocessor.tokenizer.detokenize(y[weights > 0])
        assert learned.strip() == "He was at sea."


def test_a_reply_starts_with_the_tokens_that_generate_produces():
    # The prompt ends with a space, which would be a part of the reply's first token.
    spaced = TAGGED.replace("BOT:{% generation %} ", "BOT: {% generation %}")
    spaced = spaced.replace("BOT:{% endif", "BOT: {% endif")
    preprocessor = random_lm(SHAPES[0], trained_model(keep_spaces=True)).preprocessor
    preprocessor.chat_template = spaced
    prompt = preprocessor.chat_ids(CHAT[:2])
    data = normalize_examples([{"messages": CHAT[:3]}])
    examples = preprocessor.tokenize_examples(data, sequence_length=500)
    assert examples.token_ids[0][: len(prompt)] == prompt
    assert not any(examples.loss_masks[0][: len(prompt)])
    assert examples.loss_masks[0][len(prompt)]
    text = preprocessor.tokenizer.detokenize(examples.token_ids[0][len(prompt) :])
    assert text.strip() == "It was calm."


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_published_template_writes_the_added_tokens_of_its_model(is_file, tmp_path):
    path = tmp_path / "published"
    shape = TinyShape("chatml", 2, 2, 16, vocabulary_size=514, context=64)
    in_transformers(shape).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(trained_model(keep_spaces=True))
    tokens = {"512": "<|im_start|>", "513": "<|im_end|>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            i: {"content": token, "special": True} for i, token in tokens.items()
        },
    }
    if is_file:
        (path / "chat_template.jinja").write_text(CHATML)
    else:
        config["chat_template"] = CHATML
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        CHAT[:2], add_generation_prompt=True, return_dict=False
    )
    assert expected.count(513) == 5
    lm = OpenLlamaCausalLM.from_preset(str(path))
    lm.save_to_preset(tmp_path / "saved")
    lm.export_to_transformers(tmp_path / "exported")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.apply_chat_template(CHAT, return_dict=False) == expected
    for name in ("published", "saved", "exported"):
        preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path / name))
        data = normalize_examples([{"messages": CHAT}])
        examples = preprocessor.tokenize_examples(data, sequence_length=500)
        [ids], [mask] = examples.token_ids, examples.loss_masks
        assert ids == expected
        assert preprocessor.chat_ids(CHAT[:2]) == prompt
        learned = [i for i, is_target in zip(ids, mask, strict=True) if is_target]
        assert learned.count(513) == 2 and 512 not in learned
        text = preprocessor.tokenizer.detokenize(learned)
        assert text.strip() == "It was calm.He was at sea."
