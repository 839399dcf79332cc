"""How evaluation chooses tokens, without touching how a model is compiled."""

import contextlib

from keras_openllama.backend.keras_hub import GreedySampler, get_sampler


@contextlib.contextmanager
def sampling(lm, temperature=0.0, top_p=None, top_k=None, seed=None):
    """Lets a model choose tokens another way for a while.

    Args:
        lm: `OpenLlamaCausalLM`.
        temperature: float; 0 always takes the likeliest token.
        top_p: float, the likeliest tokens that together reach this probability.
        top_k: int, so many of the likeliest tokens.
        seed: int, for the same choices again.

    Raises:
        ValueError: for a temperature below 0.
    """
    if temperature < 0:
        raise ValueError(
            f"`temperature` is 0 or above. Received: temperature={temperature}"
        )
    if temperature == 0 and type(lm.sampler) is GreedySampler:
        yield  # With the programs that are compiled already.
        return
    before = lm.sampler, lm.generate_function
    lm.sampler = _sampler(temperature, top_p, top_k, seed)
    lm.generate_function = None  # It is made for a sampler.
    try:
        yield
    finally:
        lm.sampler, lm.generate_function = before


def _sampler(temperature, top_p, top_k, seed):
    if temperature == 0:
        return get_sampler("greedy")
    config = {"temperature": temperature, "seed": seed}
    if top_p is not None:
        name, config = "top_p", {**config, "p": top_p, "k": top_k}
    elif top_k is not None:
        name, config = "top_k", {**config, "k": top_k}
    else:
        name = "random"
    return get_sampler({"class_name": name, "config": config})
