"""Speed of greedy decoding with batches of 1, 8 and 64, and of a long prefill."""

import statistics
import time

import models
import numpy as np
import results
from timing import median_seconds, seconds

PROMPT, NEW = 64, 128
SHORT = 32  # New tokens of the call whose time is subtracted.
ROUNDS = 3


def ours(model):
    """Measures `OpenLlamaCausalLM.generate`.

    Args:
        model: string, the preset whose sizes the random model has.
    """
    sizes = models.sizes(model)
    generate = our_generate(sizes)
    for batch in batches():
        ids = prompts(sizes, batch, PROMPT)
        first = seconds(lambda ids=ids: generate(ids, SHORT))
        results.measure(f"batch {batch}: first call", first, "s", "with compilation")
        times = []
        for _ in range(ROUNDS):
            long = seconds(lambda ids=ids: generate(ids, NEW))
            times.append(long - seconds(lambda ids=ids: generate(ids, SHORT)))
        report(sizes, batch, statistics.median(times))
        if batch == 1:
            report_prompt(sizes, generate)


def prompt(model):
    """Measures the longest prompt only, see `ours`."""
    sizes = models.sizes(model)
    report_prompt(sizes, our_generate(sizes))


def our_generate(sizes):
    """Returns a function of token ids and the number of new tokens."""
    start = time.perf_counter()
    lm = models.ours(sizes, "bfloat16")
    results.measure("random model", time.perf_counter() - start, "s")

    def generate(ids, new):
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)

    return generate


def transformers(model):
    """Measures transformers with a static cache, compiled on a GPU.

    Source: https://huggingface.co/docs/transformers/llm_optims (static KV cache).
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    sizes = models.sizes(model)
    lm = models.transformers(sizes, torch.bfloat16).eval()
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0

    def generate(ids, new, **options):
        ids = torch.tensor(ids, dtype=torch.long, device=lm.device)
        return lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            **options,
        ).cpu()

    report_prompt(sizes, generate)
    for batch in batches():
        ids = prompts(sizes, batch, PROMPT)
        # Another number of new tokens would change the size of the cache, and compile
        # again. So the short call is the first part of the long one.
        times = []
        for number in range(ROUNDS + 2):
            watch = Stopwatch(PROMPT + SHORT)
            start = time.perf_counter()
            generate(
                ids,
                NEW,
                cache_implementation="static",
                stopping_criteria=transformers.StoppingCriteriaList([watch]),
            )
            end = time.perf_counter()
            if number == 0:
                note = "with compilation"
                results.measure(f"batch {batch}: first call", end - start, "s", note)
            elif number > 1:  # The second one still records CUDA graphs.
                times.append(end - watch.seen)
        report(sizes, batch, statistics.median(times))


class Stopwatch:
    """Stopping criterion that records when `length` is reached, and never stops."""

    def __init__(self, length):
        self.length, self.seen = length, None

    def __call__(self, input_ids, scores, **options):
        import torch

        if input_ids.shape[1] == self.length:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.seen = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def batches():
    """The batch sizes."""
    return (1, 8, 64) if results.has_gpu() else (1, 4)


def prompts(sizes, batch, length):
    """Random token ids, int32 `(batch, length)`."""
    random = np.random.default_rng(0)
    return random.integers(3, sizes["vocabulary_size"], (batch, length), "int32")


def report_prompt(sizes, generate):
    """Reports the seconds to the first token after the longest prompt."""
    length = sizes["max_sequence_length"] - 1
    ids = prompts(sizes, 1, length)
    duration = median_seconds(lambda: generate(ids, 1), ROUNDS)
    results.measure(f"prompt of {length:,} tokens, one new", duration, "s")


def cache_bytes(sizes):
    """Bytes of a sequence's KV cache that an average step has to read."""
    tokens = PROMPT + (SHORT + NEW) / 2
    heads = sizes["num_key_value_heads"] * sizes["head_dim"]
    return tokens * sizes["num_layers"] * 2 * heads * 2


def report(sizes, batch, duration):
    """Reports tokens/s; `duration` is in seconds, for `NEW - SHORT` steps."""
    rate = batch * (NEW - SHORT) / duration
    note = f"{1e3 * duration / (NEW - SHORT):.2f} ms per step"
    read = results.limit_of("read")
    if read:
        limit = batch * read / (2 * models.multiplied(sizes))
        note += f", {rate / limit:.0%} of {limit:.0f}, all weights read once per step"
        both = 2 * models.multiplied(sizes) + batch * cache_bytes(sizes)
        note += f"; with the KV cache, {rate * both / (batch * read):.0%}"
    results.measure(f"batch {batch}: decoding", rate, "tokens/s", note)
