import pytest
from running_server import running_server

from keras_openllama import OpenLlamaCausalLM

# What the page and the clients send to a model that has no template of its own.
TEMPLATE = {
    "system": "{content}\n",
    "user": "Q: {content}\n",
    "assistant": "A: {content}\n",
}


@pytest.fixture(scope="session")
def nano():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.preprocessor.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="session")
def server(nano):
    with running_server(nano, max_queue=32) as running:
        yield running
