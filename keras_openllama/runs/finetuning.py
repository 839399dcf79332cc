"""Fine-tuning: a preset and examples, for `trainer.Trainer`; and what it exports.

Beside what every run writes, the directory holds in the end `adapters/` (in PEFT's
format) and `model/` (merged, in transformers').
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random

import jax
import keras

from keras_openllama.backend import jit
from keras_openllama.config import validate_architecture
from keras_openllama.data import instructions
from keras_openllama.distribution import check_mesh
from keras_openllama.loading.load import find_source, load_task_from, origin
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.runs import run_directory
from keras_openllama.runs.instruction_data import InstructionData
from keras_openllama.runs.jax_train_state import (
    JaxTrainState,
    distribution_for,
    scope_of,
)
from keras_openllama.runs.keras_train_state import KerasTrainState
from keras_openllama.runs.optimizer import compile_model
from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.runs.trainer import Sampling, Trainer, exclusive
from keras_openllama.text.inputs import normalize_examples
from keras_openllama.training.fit import ADAPTER_LEARNING_RATE, LEARNING_RATE

ADAPTERS, MODEL = "adapters", "model"
_QUESTIONS = 4  # Heuristic: prompts of examples that the model answers.
_FINAL_RATE = 0.1  # The last learning rate, as a share of the peak, as in LLaMA.
# Files may move; what is in them is compared.
_FILES = ("data", "validation")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What is trained on what; the fields are flags of `finetune`.

    `train_config` is the `TrainConfig` of the steps that it takes.
    """

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
    save_every: int = 100
    validate_every: int | None = None

    def train_config(self, steps):
        """`TrainConfig` of a run of so many steps."""
        rate = self.learning_rate
        if rate is None:
            rate = ADAPTER_LEARNING_RATE if self.lora_rank else LEARNING_RATE
        return TrainConfig(
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            steps=steps,
            learning_rate=rate,
            final_learning_rate=_FINAL_RATE * rate,
            warmup_steps=min(round(self.warmup * steps), steps - 1),
            beta_1=0.9,
            beta_2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
            weight_decay=self.weight_decay,
            micro_batches=self.micro_batches,
            rematerialize=self.rematerialize,
            seed=self.seed,
            save_every=self.save_every,
            milestone_every=0,
            # Ten times, unless said.
            validate_every=self.validate_every or max(1, steps // 10),
        )

    def to_json(self):
        """The settings in the form of a recipe in `run.json`."""
        values = dataclasses.asdict(self)
        settings = {
            name: {"value": value, "source": "command line"}
            for name, value in values.items()
            if name not in ("preset", *_FILES)
        }
        return json.loads(json.dumps({"preset": self.preset, "recipe": settings}))


@contextlib.contextmanager
def open_run(
    config, options, questions=None, max_new_tokens=48, check_size=lambda sizes: None
):
    """Starts a fine-tuning run, or resumes the one in the directory.

    Args:
        config: `FinetuneConfig`.
        options: `trainer.RunOptions`.
        questions: list of strings that the model answers before and after; `None`
            takes some of the examples that were set aside.
        max_new_tokens: int, of answers.
        check_size: called with the arguments of the backbone, before weights are read
            or made; raises a `ValueError` for a model that is too large.

    Yields:
        `trainer.Trainer`.

    Raises:
        ValueError: if settings, examples or the run in the directory do not fit.
        run_directory.Busy: if another process has the run.
        checkpoint_manager.CheckpointError: if no checkpoint can be read.
        OSError: if a file cannot be read.
    """
    on_jax = keras.config.backend() == "jax"
    with _reading_preset(config):
        source = find_source(config.preset)
        architecture = validate_architecture(source.arguments())
    check_size(architecture)
    examples, validation = read_examples(config)
    distribution = None
    if on_jax:
        jit.use_compilation_cache()
        mesh = options.mesh or {"data": 1, "fsdp": jax.device_count(), "model": 1}
        check_mesh(mesh, architecture, config.batch_size, config.micro_batches)
        distribution = distribution_for(mesh)
    elif options.mesh:
        raise ValueError("A mesh needs the JAX backend. Leave --mesh out.")
    with exclusive(options.output):
        now = {
            **config.to_json(),
            "kind": run_directory.FINETUNING,
            "architecture": json.loads(json.dumps(architecture)),
            "weights": "adapters" if config.lora_rank else "all",
            "data": {"examples": _fingerprint(examples, validation)},
        }
        before = run_directory.read(options.output)
        changes = []
        if before is not None:
            changes = run_directory.check_unchanged(before, now, options.accept_changes)
            for line in changes:
                options.say(f"Changed: {line}.")
        # Keras draws the seeds of initializers from it. (Its own function for all
        # seeds imports TensorFlow.)
        random.seed(config.seed)
        with scope_of(distribution):
            lm = _build(config, source)
        data = _data(lm, config, examples, validation)
        train = config.train_config(data.steps(config.epochs))
        with scope_of(distribution):
            compile_model(lm, train)
        proto = lm.preprocessor.tokenizer.proto
        changed = before is None or bool(changes)
        run_directory.write_once(options.output, now, proto, changed)
        whole = not config.lora_rank
        if on_jax:
            state = JaxTrainState(lm, train, distribution, save_frozen=whole)
        else:
            state = KerasTrainState(lm, save_frozen=whole)
        if questions is None:
            questions = _prompts(lm, config, [e for _, e in validation])
        prompts = {f"question {i}": text for i, text in enumerate(questions, 1)}
        sampling = Sampling(prompts, max_new_tokens, lm.backbone.context_length, True)
        yield Trainer(train, state, data, options, {"run": config.to_json()}, sampling)


def export(trainer, config, names, again):
    """Writes the trained model, on the first process.

    Args:
        trainer: `trainer.Trainer` whose run is complete.
        config: `FinetuneConfig`.
        names: tuple of strings, some of `ADAPTERS` and `MODEL`.
        again: bool, whether what is there is replaced.
    """
    if names and jax.process_count() > 1:
        trainer.options.say(
            "The weights are spread over several hosts, so nothing is exported. Run "
            "the same command on one host: it exports the complete run."
        )
        return
    trainer.state.update_model()
    lm = trainer.state.lm
    # Adapters cannot be merged into int8.
    write = {
        ADAPTERS: config.lora_rank and lm.save_adapters,
        MODEL: not config.int8 and lm.export_to_transformers,
    }
    for name in names:
        path = os.path.join(trainer.options.output, name)
        if write[name] and (again or not os.path.isdir(path)):
            write[name](path, force=True)


# ----- Model


@contextlib.contextmanager
def _reading_preset(config):
    """Tells errors of reading the preset from those of writing a run."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{config.preset} is unavailable: {error}") from error


def _build(config, source):
    """The model of a run, with adapters if the config has them."""
    with _reading_preset(config):
        lm = load_task_from(
            OpenLlamaCausalLM, source, origin(config.preset), dtype=config.dtype
        )
    if config.sequence_length > lm.backbone.context_length:
        raise ValueError(
            f"The context of {config.preset} is {lm.backbone.context_length} tokens. "
            f"Received: sequences of {config.sequence_length} tokens (--length)"
        )
    lm.preprocessor.sequence_length = config.sequence_length
    if config.chat_template is not None:
        lm.preprocessor.chat_template = config.chat_template
    if config.int8:
        lm.backbone.quantize("int8")
    if config.lora_rank:
        targets = config.lora_targets and list(config.lora_targets)
        lm.backbone.enable_lora(config.lora_rank, targets, config.lora_alpha)
    return lm


# ----- Examples


def read_examples(config):
    """Examples to train on and to validate on: two lists of `(source, example)`."""
    templates = None
    if config.prompt is not None or config.response is not None:
        templates = (config.prompt or "{prompt}", config.response or "{response}")
    examples = instructions.read_sources(config.data, templates)
    if config.validation is None:
        return instructions.divide(examples, config.validation_share, config.seed)
    return examples, instructions.read_sources([config.validation], templates)


def _fingerprint(*parts):
    text = json.dumps([[e for _, e in part] for part in parts], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _data(lm, config, examples, validation):
    def arrays(examples, pack):
        rows = lm.preprocessor.tokenize_examples(normalize_examples(examples))
        rows.warn()
        return rows.packed() if pack else rows.filled(), rows.bytes

    by_source = {}
    for source, example in validation:
        by_source.setdefault(source, []).append(example)
    hosts = jax.process_count(), jax.process_index()
    train, _ = arrays([e for _, e in examples], config.pack)
    apart = {source: arrays(some, False) for source, some in by_source.items()}
    return InstructionData(*(train, config.batch_size, config.seed, apart), *hosts)


def _prompts(lm, config, examples):
    """Prompts of examples that leave room for an answer."""
    prompts = []
    for example in examples:
        prompt = prompt_of(example)
        try:
            if isinstance(prompt, str):
                (ids,) = lm.preprocessor.prompt_ids([prompt])
            else:
                ids = lm.preprocessor.chat_ids(prompt["messages"])
        except ValueError:
            continue  # It has no prompt, as a chat that the assistant begins.
        if len(ids) < config.sequence_length:
            prompts.append(prompt)
        if len(prompts) == _QUESTIONS:
            break
    return prompts


def prompt_of(example):
    """The prompt of an example: a string, or a chat without its last replies."""
    if isinstance(example, str):
        return example[:60]
    if "prompt" in example:
        return example["prompt"]
    messages = list(example["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {"messages": messages}
