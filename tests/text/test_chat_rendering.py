"""Chats as text: what is learned, and what a chat template cannot render."""

import pytest

from keras_openllama.text.chat_rendering import (
    Exchange,
    RenderedChat,
    chat_exchanges,
    render_examples,
    render_prompt,
)
from keras_openllama.text.chat_template import check_template
from keras_openllama.text.input_kinds import ChatExample, Examples, Pair
from keras_openllama.text.jinja_template import JinjaTemplate
from keras_openllama.text.messages import UnusableExampleError

pytestmark = pytest.mark.backend_free

ROLES = {"user": "Q: {content}\n", "assistant": "A: {content}"}
JINJA = JinjaTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
)
USER, REPLY = (
    {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"))
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}


def render(messages, template, **options):
    example = ChatExample(messages, "x", **options)
    [rendered] = render_examples(Examples([example], True), template)
    return rendered


@pytest.mark.parametrize("template", ["", "Hi", '{"assistant": "A: {content}"}'])
def test_check_template_refuses_a_string_without_a_tag_of_jinja(template):
    with pytest.raises(ValueError, match=r"with `\{\{` or `\{%`"):
        check_template(template)
    check_template("{{ messages }}")


def test_messages_after_the_last_reply_are_dropped():
    expected = [Exchange("Q: q\nA: ", "a")]
    for more in ([], [USER], [USER, {**REPLY, "content": ""}]):
        assert render([USER, REPLY, *more], ROLES) == expected
        assert render([USER, REPLY, *more], JINJA).text == "<user>q;<assistant>a;"


def test_a_reply_with_weight_0_and_an_empty_one_are_not_learned():
    for reply in ({**REPLY, "weight": 0}, {**REPLY, "content": ""}):
        first, second = render([USER, reply, USER, REPLY], ROLES)
        assert second.is_learned and not (first.is_learned and first.response)
        rendered = render([USER, reply, USER, REPLY], JINJA)
        [(start, end)] = rendered.replies
        assert rendered.text[start:end] == "<assistant>a;"
        assert start > rendered.text.index("<user>", 1)


def test_an_example_that_is_a_pair_and_a_chat_is_a_chat_if_there_is_a_template():
    pair = Pair("Q", "A")
    assert render([USER, REPLY], None, pair=pair) == [Exchange("Q", "A")]
    assert isinstance(render([USER, REPLY], JINJA, pair=pair), RenderedChat)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([USER], ROLES, "`x` has no reply of the assistant"),
        ([USER, {**REPLY, "weight": 0}], ROLES, "`x` has no reply"),
        ([{**USER, "role": "judge"}, REPLY], ROLES, r"`x\[0\]` must have a role of"),
        ([{**USER, "content": ""}, REPLY], ROLES, r"`x\[0\]` must have non-empty"),
        ([USER, CALL, REPLY], ROLES, r"`x\[1\]` calls tools"),
        ([USER, CALL, REPLY], JINJA, "`x` has calls of tools"),
        ([USER, REPLY], JinjaTemplate("{{ raise_exception('no') }}"), "`x`: .*: no"),
        ([USER, REPLY], None, "Chats need a chat template"),
    ],
)
def test_render_examples_explains_chats_that_cannot_be_learned(
    messages, template, message
):
    with pytest.raises(ValueError, match=message):
        render(messages, template)


def test_roles_have_the_names_that_a_template_knows():
    developer = {"role": "developer", "content": "d"}
    system = {**ROLES, "system": "{content}\n"}
    assert chat_exchanges([developer], system)[0].prompt == "d\nA: "
    human = {"human": "H: {content}\n", "assistant": "A: {content}"}
    assert chat_exchanges([USER], human)[0].prompt == "H: q\nA: "
    assert render_prompt([developer, USER], JINJA) == "<system>d;<user>q;"
    known = JinjaTemplate("{% if m == 'developer' %}{% endif %}{{ messages[0].role }}")
    assert render_prompt([developer, USER], known) == "developer"
    with pytest.raises(UnusableExampleError, match="'judge'"):
        chat_exchanges([{"role": "judge", "content": "j"}], ROLES)


def test_calls_of_tools_are_rendered_by_a_template_that_knows_them():
    template = JinjaTemplate(
        "{{ tools | length }}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %};{% endfor %}"
    )
    rendered = render([USER, CALL], template, tools=[{}])
    [(start, end)] = rendered.replies
    assert rendered.text == "1<user>q;<assistant>f;"
    assert rendered.text[start:end] == "<assistant>f;"
