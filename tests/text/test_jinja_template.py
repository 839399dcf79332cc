"""Chat templates in Jinja, compared with `apply_chat_template` of transformers."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from keras_openllama.text.jinja_template import ChatTemplateError, JinjaTemplate

pytestmark = pytest.mark.backend_free

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello\n"},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Hello"},
]
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') "
    "+ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
TAGGED = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "ASSISTANT: {% generation %}{{ message.content | trim }}{{ eos_token }}"
    "{% endgeneration %}\n"
    "{%- else -%}{{ message.role | upper }}: {{ message.content }}\n{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}ASSISTANT: {% endif -%}"
)
# The last reply begins with reasoning, earlier ones do not; the prompt begins it, too.
REASONING = (
    "{% set last = namespace(index=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.index0 > last.index %}<think></think>"
    "{% endif %}{{ m.content.strip() }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    "{% if m.name is defined %}{{ m.name }}{% endif %}{% endfor %}"
    "{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}"
)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("source", [CHATML, LLAMA_2, TAGGED, REASONING, TOOLS])
def test_jinja_template_renders_as_transformers_does(source, add_generation_prompt):
    messages = [CHAT[0], CHAT[1], {**CHAT[2], "tool_calls": None, "name": "bot"}]
    called = [{"type": "function", "function": {"name": "look", "arguments": {"é": 1}}}]
    messages += [CHAT[3], {**CHAT[4], "tool_calls": called}]
    [expected], _ = render_jinja_template(
        conversations=[
            [{k: v for k, v in m.items() if v is not None} for m in messages]
        ],
        tools=called,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **TOKENS,
    )
    template = JinjaTemplate(source, TOKENS)
    assert template.render(messages, add_generation_prompt, tools=called) == expected


@pytest.mark.parametrize(
    ("source", "replies"),
    [
        (CHATML, [" Hello\n<|im_end|>", "Hello<|im_end|>"]),
        (LLAMA_2, [" Hello </s>", " Hello </s>"]),
        (TAGGED, ["Hello</s>", "Hello</s>"]),
        (REASONING, ["Hello<end>", "</think>Hello<end>"]),
    ],
)
def test_render_replies_finds_each_reply_with_its_end(source, replies):
    template = JinjaTemplate(source, TOKENS)
    text, spans = template.render_replies(CHAT)
    assert text == template.render(CHAT)
    assert [text[start:end] for start, end in spans] == replies
    starts = [text.index("Hello"), text.rindex("Hello")]
    assert all(
        start <= at < end for (start, end), at in zip(spans, starts, strict=True)
    )


def test_render_replies_finds_the_blocks_that_transformers_finds():
    _, [expected] = render_jinja_template(
        [CHAT], chat_template=TAGGED, return_assistant_tokens_mask=True, **TOKENS
    )
    _, spans = JinjaTemplate(TAGGED, TOKENS).render_replies(CHAT)
    assert spans == expected


def test_render_replies_asks_for_tags_where_a_reply_cannot_be_found():
    source = "{% for m in messages %}{{ m.content | upper | length }}{% endfor %}"
    template = JinjaTemplate("{{ messages | length }}" + source)
    with pytest.raises(ChatTemplateError, match="generation"):
        template.render_replies(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% set n = namespace(_a=1) %}", "underscore"),
    ],
)
def test_jinja_template_explains_what_it_cannot_render(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        JinjaTemplate(source).render(CHAT)
