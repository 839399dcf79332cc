"""Speed of training on a CPU, compared with KerasHub, transformers and the CPU's peak.

    python benchmarks/train.py
    python benchmarks/train.py --contender ours/jax keras_hub/jax --rounds 7
    python benchmarks/train.py --contender ours/torch transformers/torch \\
        --dtype bfloat16

Every contender trains the same random LLaMA on the same random batches with AdamW in
float32, in its own process; they alternate, a few steps each. This package runs `fit`
with the default settings of `compile`, and the train step that `pretrain` compiles.
KerasHub's `LlamaCausalLM` runs `fit`. transformers runs a plain PyTorch loop. With
`--dtype bfloat16`, weights stay in float32: Keras has the policy "mixed_bfloat16", and
PyTorch's loop runs under `torch.autocast`.

    tokens/s   median of the rounds
    ratio      to transformers, the median of the rounds' ratios
    of peak    FLOP/s (6 per parameter and token without the embeddings, plus causal
               attention) divided by the fastest float32 matrix product of JAX, measured
               between the rounds

The default model has 58 million parameters: width 512, 8 layers, vocabulary 32,000.
"""

import argparse
import functools
import statistics
import time

import numpy as np
import workers  # benchmarks/workers.py

CONTENDERS = (
    "ours/jax",
    "ours/torch",
    "pretrain/jax",
    "keras_hub/jax",
    "keras_hub/tensorflow",
    "keras_hub/torch",
    "transformers/torch",
)
REFERENCE = "transformers/torch"


def batches(options):
    """A random batch: token ids and targets, int32 `(batch, length)`."""
    random = np.random.default_rng(0)
    shape = options.batch, options.length + 1
    ids = random.integers(3, options.vocabulary, shape, "int32")
    return ids[:, :-1], ids[:, 1:]


# ----- The contenders. Each returns a function that trains a number of steps.


def keras_sizes(options):
    """Arguments of the backbones of this package and KerasHub."""
    return dict(
        vocabulary_size=options.vocabulary,
        num_layers=options.layers,
        num_query_heads=options.heads,
        num_key_value_heads=options.heads,
        hidden_dim=options.width,
        intermediate_dim=options.intermediate,
    )


def fit_steps(fit, x, y):
    """Trains with a method `fit`."""
    weights = np.ones(y.shape, "float32")
    mask = np.ones(x.shape, "int32")

    def endless():
        while True:
            yield {"token_ids": x, "padding_mask": mask}, y, weights

    def run(steps):
        fit(endless(), steps_per_epoch=steps, verbose=0)

    return run


def our_lm(options, rank=0, types=None, **compiled):
    """A model of this package, with LoRA adapters unless `rank` is 0.

    Args:
        options: the flags.
        rank: int, rank of the adapters.
        types: `WeightTypes` of the weights. `None` is float32. Quantized weights are 0.
        **compiled: arguments of `compile`.
    """
    from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
    from keras_openllama.optimizers import AdamW

    sizes = keras_sizes(options)
    policy = types and types.policy(sizes)
    lm = OpenLlamaCausalLM(OpenLlamaBackbone(**sizes, dtype=policy))
    if rank:
        lm.backbone.enable_lora(rank)
    lm.compile(optimizer=AdamW(1e-4), weighted_metrics=[], **compiled)
    return lm


def ours(options):
    """`fit` of this package."""
    return fit_steps(our_lm(options).fit, *batches(options))


def pretrain(options):
    """The train step of `pretrain`."""
    return compiled_steps(our_lm(options), options)


def compiled_steps(lm, options):
    """Trains with the program that `pretrain` and `finetune` compile."""
    import jax

    from keras_openllama.runs import jax_train_program
    from keras_openllama.training.train_step_jax import (
        TrainStepOptions,
        options_for_devices,
        prepare_batch,
    )

    lm.optimizer.build(lm.trainable_variables)
    x, y = batches(options)
    batch = prepare_batch(
        {"token_ids": x, "padding_mask": np.ones(x.shape, "int32")}, y
    )
    state = jax_train_program.initial_state(lm)
    program = jax_train_program.compile_step(
        lm, state, batch, options_for_devices(TrainStepOptions())
    )

    def run(steps):
        nonlocal state
        for _ in range(steps):
            _, state = program(state, batch)
        jax.block_until_ready(state)

    return run


def lm_of_keras_hub(options, rank=0):
    """A model of KerasHub, with LoRA adapters unless `rank` is 0."""
    import keras
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(**keras_sizes(options))
    lm = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    if rank:
        backbone.enable_lora(rank)
    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.1, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    lm.compile(optimizer=optimizer, loss=loss, weighted_metrics=[])
    return lm


def keras_hub(options):
    """`fit` of KerasHub."""
    return fit_steps(keras_fit(lm_of_keras_hub(options)), *batches(options))


def keras_fit(lm):
    """`fit` of Keras: KerasHub's own makes a `tf.data.Dataset` of generators."""
    import keras

    return functools.partial(keras.Model.fit, lm)


def model_of_transformers(options):
    """The same model in transformers."""
    from random_llama import transformers_config  # benchmarks/random_llama.py
    from transformers import LlamaForCausalLM

    sizes = {**keras_sizes(options), "max_sequence_length": options.length}
    return LlamaForCausalLM(transformers_config(sizes, use_cache=False))


def transformers(options):
    """A plain PyTorch loop on transformers."""
    is_mixed = options.dtype == "bfloat16"
    return steps_of_torch(model_of_transformers(options), options, is_mixed)


def steps_of_torch(model, options, is_mixed=False):
    """Trains the parameters that require gradients with a plain PyTorch loop."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.1)
    x, y = (torch.from_numpy(a).long() for a in batches(options))

    def run(steps):
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                logits = model(input_ids=x).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def peak(options):
    """FLOP/s of the best matrix product with the sizes of the feed-forward network."""
    import jax
    import jax.numpy as jnp

    rows = options.batch * options.length
    a = jnp.ones((rows, options.width))
    b = jnp.ones((options.width, options.intermediate))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds = time.perf_counter() - start
        flops = 2 * rows * options.width * options.intermediate
        best = max(best, flops / seconds)
    return best


def work(contender, options):
    """Runs a worker: trains for each line of standard input."""
    kind, answers = workers.start_worker(contender)
    if kind == "peak":
        workers.serve(answers, lambda: peak(options))
        return
    if options.dtype == "bfloat16" and kind != "transformers":
        import keras

        keras.config.set_dtype_policy("mixed_bfloat16")
    run = globals()[kind](options)
    run(2)  # Compiles, and warms up.

    def seconds():
        start = time.perf_counter()
        run(options.steps)
        return time.perf_counter() - start

    workers.serve(answers, seconds)


def flops_per_token(options):
    """FLOPs per token of matrix products and causal attention, forward and backward."""
    layer = 4 * options.width**2 + 3 * options.width * options.intermediate
    matrices = options.layers * layer + options.width * options.vocabulary
    return 6 * matrices + 6 * options.layers * options.width * options.length


def compare(options):
    """Measures all contenders and prints the table."""
    probe = workers.Worker("peak/jax", script=__file__)
    rates, peaks = {name: [] for name in options.contender}, []
    tokens = options.steps * options.batch * options.length
    rounds = workers.alternate(options.contender, options.rounds, script=__file__)
    for found in rounds:
        peaks.append(probe.measure())
        for name, seconds in found.items():
            rates[name].append(tokens / seconds)
    probe.close()
    report(options, rates, max(peaks))


def report(options, rates, best):
    """Prints the table."""
    print(f"fastest matrix product: {best / 1e9:.0f} GFLOP/s")
    print(f"{'':22}{'tokens/s':>10}{'ratio':>8}{'of peak':>9}")
    for name, values in rates.items():
        rate = statistics.median(values)
        ratio = workers.ratio(rates, name, REFERENCE)
        share = rate * flops_per_token(options) / best
        print(f"{name:22}{rate:>10.0f}{ratio:>8}{share:>9.0%}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    workers.add_sizes(parser)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work(options.work, options) if options.work else compare(options)


if __name__ == "__main__":
    main()
