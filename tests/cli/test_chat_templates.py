import json

import pytest

from keras_openllama.cli.chat_templates import read_chat_template

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize("key", ["chat_template", None])
def test_read_chat_template_takes_a_template_from_a_file_of_transformers(key, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    named = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "{{ 1 }}"},
    ]
    path.write_text(json.dumps({key: named}) if key else "{{ 1 }}")
    assert read_chat_template(str(path)) == "{{ 1 }}"
