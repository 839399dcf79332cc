"""A fine-tuning run, from its examples to its exports; what `train/finetune.py` runs.

The run's directory holds what `run_log` writes, `run.json` (what the run is),
`state.npz` (the newest checkpoint), `loss.png`, and in the end `adapters/` (in PEFT's
format) and `model/` (in transformers').
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import time

import keras
import numpy as np
from tqdm import tqdm

from keras_openllama.data import instructions
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.optimizers import AdamW, WarmupCosine
from keras_openllama.runs import loss_plot, state_file
from keras_openllama.runs.interruption import Skipped, StopRequest
from keras_openllama.runs.metrics_log import RunLog
from keras_openllama.runs.run_directory import locked
from keras_openllama.training.fit import ADAPTERS_RATE, RATE
from keras_openllama.utils import files

RUN, STATE, LOSS = "run.json", "state.npz", "loss.png"
ADAPTERS, MODEL = "adapters", "model"
# Ours: steps in a row that may be left out, and questions that are asked.
_MOST_SKIPPED, _QUESTIONS = 10, 4
_ADVICE = "Take a lower --learning-rate, and another --output."


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the course of a run; the fields are the flags of `finetune.py`."""

    preset: str
    data: tuple
    prompt: str | None = None
    response: str | None = None
    chat_template: dict | None = None
    validation: str | None = None
    validation_share: float = 0.05
    sequence_length: int = 512
    pack: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple | None = None
    int8: bool = False
    dtype: str = "float32"
    epochs: float = 3.0
    batch_size: int = 8
    learning_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    micro_batches: int = 1
    rematerialize: str = "none"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """A run that is asked for.

    Attributes:
        settings: `Settings`.
        output: string, the run's directory.
        distribution: `OpenLlamaParallel`, or `None`.
        save_every, validate_every: ints, steps; `None` validates ten times.
        questions: list of strings to ask before and after; `None` takes some of the
            examples that were set apart.
        max_new_tokens: int, of answers.
        export: tuple of strings, some of `ADAPTERS` and `MODEL`.
    """

    settings: Settings
    output: str
    distribution: object = None
    save_every: int = 100
    validate_every: int | None = None
    questions: list | None = None
    max_new_tokens: int = 48
    export: tuple = (ADAPTERS, MODEL)


def run(request):
    """Trains, or goes on where the run in the directory stopped.

    Args:
        request: `Request`.

    Returns:
        String, the signal that stopped the run; `None` if it is complete.

    Raises:
        ValueError: if settings, examples or what is in the directory do not fit.
        stopping.Diverged: if too many steps in a row had a loss that is not finite.
        OSError: if something cannot be read or written.
    """
    data = _data(request.settings)
    with locked(request.output):
        _check_run(request, data)
        with StopRequest() as stop:
            return _Run(request, data).train(stop)


# ----- Examples


@dataclasses.dataclass(frozen=True)
class _Data:
    train: list
    apart: list
    fingerprint: str


def _data(settings):
    templates = None
    if settings.prompt is not None or settings.response is not None:
        templates = (settings.prompt or "{prompt}", settings.response or "{response}")
    examples = instructions.read(settings.data, templates)
    if settings.validation is None:
        train, apart = instructions.divide(
            examples, settings.validation_share, settings.seed
        )
    else:
        train, apart = examples, instructions.read([settings.validation], templates)
    text = json.dumps([train, apart], ensure_ascii=False).encode("utf-8", "replace")
    return _Data(train, apart, hashlib.sha256(text).hexdigest()[:16])


def _check_run(request, data):
    """Writes what the run is, or compares it with what is there."""
    now = {**dataclasses.asdict(request.settings), "examples": data.fingerprint}
    now.pop("data"), now.pop("validation")  # Files may move; examples may not change.
    now = json.loads(json.dumps(now))
    path = files.join(request.output, RUN)
    if not files.exists(path):
        files.write_bytes(path, json.dumps(now, indent=1).encode())
        return
    before = json.loads(files.read_bytes(path))
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"The run in {request.output} is another one: {'; '.join(changed)}. Give "
            "the same settings to go on with it, or name another directory."
        )


# ----- The run


class _Run:
    def __init__(self, request, data):
        self._request, self._settings = request, request.settings
        # Keras draws the seeds of initializers from it. (Its own function for all seeds
        # imports TensorFlow.)
        random.seed(self._settings.seed)
        if request.distribution is None:
            self._lm = build(self._settings)
        else:
            with request.distribution.scope():
                self._lm = build(self._settings)
        self._batches = instructions.Batches(
            self._arrays(data.train), self._settings.batch_size, self._settings.seed
        )
        self._apart = data.apart
        self.steps = self._batches.steps(self._settings.epochs)
        self._compile()
        self._questions = request.questions
        if self._questions is None:
            self._questions = self._some_prompts(data.apart)

    def _some_prompts(self, examples):
        """Questions from examples: those that leave room for an answer."""
        prompts = []
        for example in examples:
            prompt = prompt_of(example)
            try:
                if isinstance(prompt, str):
                    (ids,) = self._lm.preprocessor.prompt_ids([prompt])
                else:
                    ids = self._lm.preprocessor.chat_ids(prompt["messages"])
            except ValueError:
                continue  # It has no prompt, as a chat that the assistant begins.
            if len(ids) < self._settings.sequence_length:
                prompts.append(prompt)
            if len(prompts) == _QUESTIONS:
                break
        return prompts

    def train(self, stop):
        """See `run`."""
        done = self._restore()
        with RunLog(self._request.output, from_step=done) as log:
            self._log, self._stop = log, stop
            if done == 0:
                self._validate(0)
                self._ask(0, "before")
                self._save(0)
            if done < self.steps and self._train(done):
                return stop.signal
        self._draw()
        self._export(again=done < self.steps)
        return None

    def _train(self, done):
        """Steps after `done`; returns whether a signal ended them."""
        skipped = Skipped(_MOST_SKIPPED, _ADVICE)
        every = self._request.validate_every or max(1, self.steps // 10)
        bar = tqdm(
            initial=done,
            total=self.steps,
            unit="step",
            desc="Fine-tuning",
            mininterval=1,
        )
        with bar:
            for step in range(done + 1, self.steps + 1):
                record = self._step(step)
                self._log.write(record)
                finite = not record["skipped"]
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                bar.update()
                skipped.note(step, finite, record["loss"], math.nan)
                last = step == self.steps
                if last or step % every == 0:
                    self._validate(step)
                if last:
                    self._ask(step, "after")
                stopped = self._stop.at(step)
                if last or stopped or step % self._request.save_every == 0:
                    self._save(step)
                    self._draw()
                if stopped and not last:
                    return True
        return False

    def _step(self, step):
        start = time.monotonic()
        x, y, weights = self._batches.at(step)
        loaded = time.monotonic()
        rate = float(keras.ops.convert_to_numpy(self._lm.optimizer.learning_rate))
        before = int(self._lm.optimizer.iterations)
        self._lm.reset_metrics()
        logs = self._lm.train_on_batch(x, y, sample_weight=weights, return_dict=True)
        seconds = time.monotonic() - loaded
        tokens = int(np.count_nonzero(x["padding_mask"]))
        self._tokens += tokens
        return {
            "step": step,
            "loss": float(logs["loss"]),
            "accuracy": float(logs.get("sparse_categorical_accuracy", math.nan)),
            "targets": float(weights.sum()),
            "learning_rate": rate,
            "tokens": self._tokens,
            "tokens_per_second": tokens / seconds,
            "data_seconds": loaded - start,
            "compute_seconds": seconds,
            "checkpoint_seconds": self._saving,
            "skipped": int(self._lm.optimizer.iterations) == before,
        }

    def _validate(self, step):
        if not self._apart:
            return
        x = self._apart
        found = self._lm.evaluate(
            x, batch_size=self._settings.batch_size, verbose=0, return_dict=True
        )
        # There are no bits per byte where nothing of the responses was left.
        names = [n for n in ("loss", "perplexity", "bits_per_byte") if n in found]
        record = {name: float(found[name]) for name in names}
        self._log.write(
            {"kind": "validation", "step": step, "tokens": self._tokens, **record}
        )
        shown = (f"{n.replace('_', ' ')} {record[n]:.4f}" for n in names)
        tqdm.write(f"step {step}, held out: {', '.join(shown)}")

    def _ask(self, step, when):
        """Answers to the questions, on the screen and in samples.txt."""
        for number, question in enumerate(self._questions, 1):
            answer = self._lm.generate(
                question,
                max_new_tokens=self._request.max_new_tokens,
                max_length=self._lm.backbone.context_length,
            )
            # A chat's answer comes without what was asked.
            asked = "" if isinstance(question, str) else f"{question['messages']}\n"
            text = asked + answer
            self._log.text(f"question {number}, {when}", step, text)
            tqdm.write(f"--- {when}, question {number}\n{text}")

    def _arrays(self, examples):
        rows, _ = self._lm.preprocessor.training_rows(examples)
        rows.warn()
        return rows.packed() if self._settings.pack else rows.filled()

    def _compile(self):
        settings = self._settings
        rate = settings.learning_rate
        if rate is None:
            rate = ADAPTERS_RATE if settings.lora_rank else RATE
        schedule = WarmupCosine.over_epochs(
            rate, self.steps, batch_size=1, warmup=settings.warmup
        )
        options = {}
        if keras.config.backend() == "jax":
            options = dict(
                micro_batches=settings.micro_batches,
                rematerialize=settings.rematerialize,
            )
        self._lm.compile(
            optimizer=AdamW(schedule, weight_decay=settings.weight_decay), **options
        )
        self._lm.optimizer.build(self._lm.trainable_variables)

    # --- Checkpoints

    def _variables(self):
        """What training changes, by name."""
        named = {f"model/{v.path}": v for v in self._lm.trainable_variables}
        for number, variable in enumerate(self._lm.optimizer.variables):
            named[f"optimizer/{number}"] = variable
        return named

    def _save(self, step):
        start = time.monotonic()
        self._log.sync()
        state_file.save(self._state, self._variables(), (step, self._tokens))
        self._saving = time.monotonic() - start

    def _restore(self):
        """Takes the checkpoint, if there is one; returns its step."""
        self._state = files.join(self._request.output, STATE)
        self._tokens, self._saving = 0, 0.0
        if not files.exists(self._state):
            return 0
        step, self._tokens = state_file.restore(self._state, self._variables())
        if 0 < step < self.steps:
            print(f"Going on from step {step} of {self.steps}.", flush=True)
        return step

    # --- What is left in the end

    def _draw(self):
        runs = loss_plot.read_runs([self._request.output])
        path = os.path.join(self._request.output, LOSS)
        loss_plot.draw(runs, path, x="step", smooth=max(1, self.steps // 20))

    def _export(self, again):
        """Writes what is asked for; what is there is replaced if `again`."""
        settings, lm = self._settings, self._lm
        # Adapters cannot be merged into int8.
        write = {
            ADAPTERS: settings.lora_rank and lm.save_adapters,
            MODEL: not settings.int8 and lm.export_to_transformers,
        }
        for name in self._request.export:
            path = os.path.join(self._request.output, name)
            if write[name] and (again or not os.path.isdir(path)):
                write[name](path, force=True)


def build(settings):
    """The model of a run, with adapters where they are asked for.

    Args:
        settings: `Settings`.

    Returns:
        `OpenLlamaCausalLM`.
    """
    try:
        lm = OpenLlamaCausalLM.from_preset(settings.preset, dtype=settings.dtype)
    except OSError as error:
        raise ValueError(f"{settings.preset} cannot be had: {error}") from error
    if settings.sequence_length > lm.backbone.context_length:
        raise ValueError(
            f"The context of {settings.preset} is {lm.backbone.context_length} tokens. "
            f"Received: rows of {settings.sequence_length} tokens (--length)"
        )
    lm.preprocessor.sequence_length = settings.sequence_length
    if settings.chat_template is not None:
        lm.preprocessor.chat_template = settings.chat_template
    if settings.int8:
        lm.backbone.quantize("int8")
    if settings.lora_rank:
        targets = settings.lora_targets and list(settings.lora_targets)
        lm.backbone.enable_lora(settings.lora_rank, targets, settings.lora_alpha)
    return lm


def prompt_of(example):
    """What to ask about an example: a string, or a chat without its last replies."""
    if isinstance(example, str):
        return example[:60]
    if "prompt" in example:
        return example["prompt"]
    messages = list(example["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {"messages": messages}
