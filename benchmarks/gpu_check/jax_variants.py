"""Compare variants of the JAX programs on one GPU: decoding, prefill, train step.

    python benchmarks/gpu_check/jax_variants.py
    python benchmarks/gpu_check/jax_variants.py --only train --programs DIRECTORY

Prints a line of JSON per result, as soon as there is one. The models have the sizes of
3B and of the 0.94 billion parameters of `train-jax`, but fewer layers, so that many
programs compile in little time. Each group of variants is a process with its own time
limit, and a variant that fails does not end the others. Without a GPU the sizes are
tiny and the speeds meaningless.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

import paths  # noqa: F401  First: it makes the other imports work.

WITH_WHILE = (
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
)
# Name: seconds, and flags of XLA for the whole process.
GROUPS = {
    "decode": (60, ""),
    "train": (60, ""),
    "decode-graphs": (35, f"--xla_gpu_enable_command_buffer={WITH_WHILE}"),
}
PROMPT, FIRST, LAST = 64, 32, 128  # Tokens of the prompt; steps that are timed.


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--programs", help="write the compiled programs to a folder")
    parser.add_argument("--work", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.programs)
    for group in options.only:
        seconds, flags = GROUPS[group]
        command = [sys.executable, __file__, "--work", group]
        if options.programs:
            command += ["--programs", options.programs]
        all_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        environment = {
            **os.environ,
            "KERAS_BACKEND": "jax",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if has_gpu_flags(flags):
            environment["XLA_FLAGS"] = all_flags
        start = time.monotonic()
        try:
            code = subprocess.run(command, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = "time limit"
        emit(group=group, exit=code, seconds=round(time.monotonic() - start, 1))


def has_gpu_flags(flags):
    """Whether flags are usable: JAX without CUDA ends on unknown ones."""
    return bool(flags) and shutil.which("nvidia-smi") is not None


def emit(**result):
    """Prints a result."""
    print(json.dumps(result), flush=True)


def work(group, programs):
    """Runs a group in its own process."""
    import jax

    emit(
        group=group,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        flags=os.environ.get("XLA_FLAGS", ""),
    )
    if group == "train":
        train(programs)
    else:
        decode(group, programs)


def is_full():
    """Whether to use full sizes."""
    import jax

    return jax.default_backend() == "gpu"


class Programs:
    """Programs that compile in parallel: tracing in order, XLA in threads."""

    def __init__(self, group, folder):
        self.group, self.folder, self.jobs = group, folder, {}
        self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def add(self, name, lower, options=None):
        """Lowers a program and begins to compile it."""
        try:
            lowered = lower()
        except Exception as error:
            self.fail(name, error)
            return
        self.jobs[name] = self.pool.submit(self._compile, lowered, options)

    def _compile(self, lowered, options):
        start = time.perf_counter()
        compiled = lowered.compile(options or {})
        return compiled, time.perf_counter() - start

    def measure(self, run, save=()):
        """Calls `run(name, compiled)` for each program, and emits its milliseconds.

        Waits for the compiler first, which measures kernels on the GPU.
        """
        start = time.perf_counter()
        concurrent.futures.wait(self.jobs.values(), timeout=30)
        emit(group=self.group, waited=round(time.perf_counter() - start, 1))
        for name, job in self.jobs.items():
            try:
                compiled, seconds = job.result()
                if name in save:
                    self.write(name, compiled)
                value = run(name, compiled)
                memory = compiled.memory_analysis()
                emit(
                    group=self.group,
                    name=name,
                    ms=round(1e3 * value, 3),
                    compiled_s=round(seconds, 1),
                    temp_gb=round(memory.temp_size_in_bytes / 1e9, 2),
                )
            except Exception as error:
                self.fail(name, error)

    def fail(self, name, error):
        text = f"{type(error).__name__}: {error}"
        emit(group=self.group, name=name, error=text[:300])

    def write(self, name, compiled):
        """Writes a compiled program, at most 15 MiB, without the ends of long lines."""
        if self.folder is None:
            return
        lines = compiled.as_text().splitlines()
        text = "\n".join(line[:1500] for line in lines)[: 15 << 20]
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        stem = "".join(c if c.isalnum() else "_" for c in f"{self.group}_{name}")
        Path(self.folder, f"{stem}.hlo.txt").write_text(text)


# ----- Decoding and prefill


def decode(group, folder):
    """Times a decoding step and a prefill."""
    import jax
    import models
    import numpy as np

    os.environ["GPU_CHECK_HAS_GPU"] = str(int(is_full()))
    sizes = models.sizes("open_llama_3b_v2") | {"num_layers": 8 if is_full() else 2}
    lm = models.ours(sizes, "bfloat16")
    emit(group=group, layers=sizes["num_layers"], parameters=models.multiplied(sizes))
    loop = lm.make_generate_function()
    programs, states = Programs(group, folder), {}

    def add(name, batch, length, attend=None, options=None, buckets=None, first=None):
        prompts = np.random.default_rng(0).integers(3, 500, (batch, length)).tolist()
        limits = [LAST if first is None else 1] * batch
        state, layout = loop.start(prompts, limits)
        stop_ids = loop._padded_stop_ids([])
        states[name] = lambda: loop.start(prompts, limits)[0]
        body = program_body(loop, layout, stop_ids, attend, buckets, first)
        programs.add(name, lambda: lower(lm, body, state), options)

    batches = (1, 8, 64) if is_full() else (1, 4)
    last = batches[-1]
    for batch in batches:
        add(f"decode {batch}", batch, PROMPT)
    if group == "decode":
        for batch in batches:
            add(f"decode {batch}, multiply and sum", batch, PROMPT, attend=by_sums)
        add(
            f"decode {last}, sums, 128 columns", last, PROMPT, by_sums, None, (128, 256)
        )
        add(f"decode {last}, 128 columns", last, PROMPT, None, None, (128, 256))
        add(f"decode {last}, query first", last, PROMPT, attend=query_first)
        for flags in (
            {"xla_gpu_enable_command_buffer": WITH_WHILE},
            {"xla_gpu_enable_triton_gemm": False},
            {"xla_gpu_dot_merger_threshold_mb": 0},
            {"xla_gpu_graph_min_graph_size": 1},
        ):
            if is_full():
                [(flag, value)] = flags.items()
                add(f"decode 1, {flag}={value}", 1, PROMPT, options=flags)
        length = sizes["max_sequence_length"] - 1
        for first in ("selected", "cache"):
            add(f"prefill {length}, {first}", 1, length, first=first)

    def run(name, compiled):
        weights, seeds = values_of(lm)

        def call(state, until):
            state = compiled(weights, seeds, state, np.int32(until))
            return jax.block_until_ready(state)

        if name.startswith("prefill"):
            call(states[name](), 0)
            return min(timed(lambda s: call(s, 0), states[name]()) for _ in range(3))
        times = []
        for _ in range(3):
            state = call(states[name](), FIRST)
            times.append(timed(lambda s: call(s, LAST), state))
        return min(times) / (LAST - FIRST)

    programs.measure(
        run,
        save=("decode 1", f"decode {last}", f"prefill {length_of(sizes)}, selected"),
    )


def length_of(sizes):
    """Tokens of the longest prompt."""
    return sizes["max_sequence_length"] - 1


def timed(function, argument):
    """Seconds of a call."""
    import jax

    jax.block_until_ready(argument)
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def values_of(lm):
    """Values of the weights and of the random state."""
    from keras_openllama.backend.jit import generation_variables

    weights, seeds = generation_variables(lm)
    return [w.value for w in weights], [s.value for s in seeds]


def lower(lm, body, state):
    """Lowers a function of state and last step, as `backend.jit` does."""
    import jax
    import numpy as np

    from keras_openllama.backend.jit import generation_variables, stateless_scope

    weights, seeds = generation_variables(lm)

    def program(weight_values, seed_values, state, until):
        with stateless_scope(weights, weight_values, seeds, seed_values):
            return body(state, until)

    values = values_of(lm)
    return jax.jit(program, donate_argnums=2).lower(*values, state, np.int32(0))


def program_body(loop, layout, stop_ids, attend, buckets, first):
    """Returns a function of state and last step that decodes, or prefills."""
    from keras_openllama.generation import token_loop
    from keras_openllama.layers import attention

    original = attention.attend_cached
    attend = attend or original

    def decode(state, until):
        """Decoding only, in several loops that read more and more columns."""
        from keras_openllama.generation.token_loop import TokenLoop

        skip = {
            "_prefill": lambda self, state, *_, **__: state,
            "_prefill_first": lambda self, state, *_: state,
        }
        for columns in buckets or (state.tokens.shape[1],):

            def limited(query, key, value, bias, columns=columns):
                used = (key[:, :columns], value[:, :columns], bias[:, :, :columns])
                return attend(query, *used)

            end = min_of(until, columns - 1 - layout.start)
            with (
                mock.patch.multiple(TokenLoop, **skip),
                mock.patch.object(attention, "attend_cached", limited),
            ):
                state = loop._advance(state, layout, stop_ids, end)
        return state

    def prefill(state, until):
        selected = token_loop.prefill_attention
        with mock.patch.object(
            token_loop,
            "prefill_attention",
            selected if first == "selected" else lambda backbone: None,
        ):
            return loop._advance(state, layout, stop_ids, until)

    return decode if first is None else prefill


def min_of(a, b):
    import jax.numpy as jnp

    return jnp.minimum(a, b)


def by_sums(query, key, value, bias):
    """`attend_cached` of one query without matrix products: two fused reductions."""
    import jax
    import jax.numpy as jnp

    from keras_openllama.layers.cached_attention import (
        fold_query_groups,
        unfold_query_groups,
    )

    shape = query.shape
    query = fold_query_groups(query, key)
    if query.shape[1] > 1:
        raise ValueError("One query per head only.")
    scores = jnp.sum(key.astype("float32") * query.astype("float32"), axis=-1)
    scores = scores * shape[3] ** -0.5 + bias[:, 0]
    weights = jax.nn.softmax(scores, axis=-1)
    context = jnp.sum(value.astype("float32") * weights[:, :, None], axis=1)
    return unfold_query_groups(context[:, None].astype(value.dtype), shape)


def query_first(query, key, value, bias):
    """`attend_cached` with the scores as `query @ key.T`."""
    import jax
    import jax.numpy as jnp

    from keras_openllama.layers.cached_attention import (
        fold_query_groups,
        unfold_query_groups,
    )

    shape = query.shape
    query = fold_query_groups(query, key)
    scores = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type="float32")
    weights = jax.nn.softmax(scores * shape[3] ** -0.5 + bias, axis=-1)
    weights = weights.astype(value.dtype)
    context = jnp.einsum("bqk,bkd->bqd", weights, value)
    return unfold_query_groups(context, shape)


# ----- The train step


def train(folder):
    """Times train steps of a model with few layers."""
    import jax
    import keras
    import numpy as np

    import train as benchmark  # benchmarks/train.py
    from keras_openllama.layers import attention_kernels
    from keras_openllama.runs import jax_train_program
    from keras_openllama.training.train_step_jax import (
        TrainStepOptions,
        options_for_devices,
        prepare_batch,
    )

    keras.config.set_dtype_policy("mixed_bfloat16")
    if is_full():
        options = types.SimpleNamespace(
            batch=8, length=2048, width=2048, layers=4, heads=16, intermediate=5504,
            vocabulary=32000,
        )  # fmt: skip
    else:
        options = types.SimpleNamespace(
            batch=2, length=64, width=64, layers=2, heads=4, intermediate=96,
            vocabulary=512,
        )  # fmt: skip
    lm = benchmark.our_lm(options)
    lm.optimizer.build(lm.trainable_variables)
    x, y = benchmark.batches(options)
    batch = prepare_batch(
        {"token_ids": x, "padding_mask": np.ones(x.shape, "int32")}, y
    )
    initial = jax_train_program.initial_state(lm)
    flops = benchmark.flops_per_token(options) * options.batch * options.length
    emit(group="train", layers=options.layers, tflop=flops / 1e12)
    plain = options_for_devices(TrainStepOptions())
    programs = Programs("train", folder)

    def add(name, step=plain, flags=None):
        programs.add(name, lambda: Lowered(lm, initial, batch, step), flags)

    add("selected")
    if is_full():
        kernel, sides = attention_kernels._cudnn_kernel, attention_kernels
        add(
            "always masked",
            plain._replace(attention_fn=one_kernel(kernel, sides, True)),
        )
        add(
            "never masked",
            plain._replace(attention_fn=one_kernel(kernel, sides, False)),
        )
        add("XLA attention", plain._replace(attention_fn=None))
    for chunks in (4, 8) if is_full() else (2,):
        add(
            f"selected, {chunks} chunks of the loss", plain._replace(loss_chunks=chunks)
        )
    if is_full():
        for flags in (
            {"xla_gpu_enable_latency_hiding_scheduler": True},
            {"xla_gpu_enable_triton_gemm": False},
            {"xla_gpu_enable_command_buffer": ""},
        ):
            [(flag, value)] = flags.items()
            add(f"selected, {flag}={value}", plain, flags)

    def run(name, compiled):
        state = jax.tree.map(jax.numpy.copy, initial)  # The program donates it.
        for steps in (2, 5):
            start = time.perf_counter()
            for _ in range(steps):
                _, state = compiled(state, batch)
            jax.block_until_ready(state)
            seconds = (time.perf_counter() - start) / steps
        return seconds

    programs.measure(run, save=("selected", "never masked"))


def one_kernel(kernel, sides, is_masked):
    """Attention with one kernel of cuDNN, whatever the batch."""

    def attend(query, key, value, mask, documents):
        heads = sides._to_cudnn(query, key, value)
        scale = query.shape[-1] ** -0.5
        context = kernel(*heads, scale, mask if is_masked else None)
        return sides._from_cudnn(context, query)

    return attend


class Lowered:
    """The lowered train step of `pretrain`; `compile` accepts options."""

    def __init__(self, lm, state, batch, options):
        from keras_openllama.runs import jax_train_program

        with mock.patch.object(
            jax_train_program.tpu_compiler_options,
            "compile_lowered",
            lambda lowered, device: lowered,
        ):
            self._lowered = jax_train_program.compile_step(lm, state, batch, options)

    def compile(self, options):
        return self._lowered.compile(options)


if __name__ == "__main__":
    threading.stack_size(64 << 20)
    sys.exit(main())
