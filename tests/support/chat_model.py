"""`open_llama_nano` with a chat template, which it does not have of its own."""

from keras_openllama import OpenLlamaCausalLM

TEMPLATE = {
    "system": "{content}\n",
    "user": "Q: {content}\n",
    "assistant": "A: {content}\n",
}


def nano_with_template():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.preprocessor.chat_template = TEMPLATE
    return lm
