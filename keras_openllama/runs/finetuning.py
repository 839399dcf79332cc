"""Fine-tuning: sets up `trainer.Trainer` with a preset and examples; exports.

Besides the files of every run, the directory of a complete run holds `adapters/` (in
the format of PEFT) and `model/` (merged, in the format of transformers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import keras

from keras_openllama.backend import jit
from keras_openllama.config import context_length, validate_architecture
from keras_openllama.data import instructions
from keras_openllama.distribution import check_mesh
from keras_openllama.loading.load import (
    describe_origin,
    find_source,
    load_task_from_source,
)
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.runs import run_directory
from keras_openllama.runs.instruction_data import InstructionData
from keras_openllama.runs.jax_train_state import (
    JaxTrainState,
    distribution_for,
    distribution_scope,
)
from keras_openllama.runs.keras_train_state import KerasTrainState
from keras_openllama.runs.optimizer import compile_model
from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.runs.trainer import RunOptions, SamplePrompts, Trainer, lock_run
from keras_openllama.text.inputs import normalize_examples
from keras_openllama.text.sentencepiece_model import check_vocabulary
from keras_openllama.training.fit import ADAPTER_LEARNING_RATE, LEARNING_RATE

if TYPE_CHECKING:
    from keras_openllama.loading.sources import ModelSource

ADAPTERS, MODEL = "adapters", "model"
_NUM_SAMPLE_PROMPTS = 4  # Heuristic: held-out prompts that are sampled from.
_FINAL_RATE = 0.1  # The final learning rate as a fraction of the peak, as in LLaMA.
# Paths may change between starts of a run; their contents are compared instead.
_FILES = ("data", "validation")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning run; each is a flag of `keras-openllama finetune`.

    Attributes:
        preset: Preset, directory or `hf://` handle of the model.
        data: Paths of the examples.
        prompt: Template of prompts, `"{prompt}"` by default.
        response: Template of responses, `"{response}"` by default.
        chat_template: Template of chats, see `OpenLlamaCausalLMPreprocessor`.
        validation: Path of held-out examples; by default, a fraction of `data`.
        validation_fraction: Fraction of the examples to hold out, 0 to 1.
        sequence_length: Tokens per sequence.
        pack: Whether sequences hold several examples (packing).
        lora_rank: Rank of LoRA adapters; `None` (`--lora-rank 0`) trains all weights.
        lora_alpha: LoRA alpha; updates are scaled by `lora_alpha / lora_rank`. Defaults
            to the rank, a scale of 1.
        lora_targets: Names of the layers with adapters.
        int8: Whether to quantize the base weights to int8; requires `lora_rank`, and
            no merged model is exported.
        dtype: Dtype policy of the model; the command line chooses by device.
        epochs: Passes over the examples.
        batch_size: Sequences per step, over all devices.
        learning_rate: Peak learning rate; the default depends on `lora_rank`.
        warmup: Warmup steps as a fraction of all steps, below 1.
        weight_decay: See `TrainConfig`.
        micro_batches: See `TrainConfig`.
        rematerialize: See `TrainConfig`.
        seed: Seed of the adapters' initial values, of the order of the examples, and of
            the choice of held-out examples.
        save_every: See `TrainConfig`.
        validate_every: Steps between validations; by default a tenth of all steps.

    Raises:
        ValueError: if a setting is invalid.
    """

    preset: str
    data: tuple[str, ...]
    prompt: str | None = None
    response: str | None = None
    chat_template: dict | None = None
    validation: str | None = None
    validation_fraction: float = 0.05
    sequence_length: int = 512
    pack: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
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

    def __post_init__(self):
        if not 0 <= self.warmup < 1:
            raise ValueError(
                "`warmup` must be in [0, 1), a fraction of all steps. Received: "
                f"warmup={self.warmup}"
            )
        self.train_config(steps=1)  # Checks the other settings of the steps.

    def train_config(self, steps: int) -> TrainConfig:
        """Returns the settings of the training steps.

        Args:
            steps: Steps of the run.

        Returns:
            The settings.

        Raises:
            ValueError: if a setting is invalid.

        Example:
            >>> config = FinetuneConfig("nano", ("examples.jsonl",), lora_rank=4)
            >>> config.train_config(steps=100).warmup_steps
            3
        """
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
            milestone_every=0,  # Checkpoints are for resuming only.
            # Ten validations by default.
            validate_every=self.validate_every or max(1, steps // 10),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings in the form of a recipe in `run.json`."""
        values = dataclasses.asdict(self)
        settings = {
            name: {"value": value}
            for name, value in values.items()
            if name not in ("preset", *_FILES)
        }
        return json.loads(json.dumps({"preset": self.preset, "recipe": settings}))


@contextlib.contextmanager
def open_run(
    config: FinetuneConfig,
    options: RunOptions,
    sample_prompts: list[str] | None = None,
    max_new_tokens: int = 48,
    check_size: Callable[[Mapping[str, Any]], None] = lambda sizes: None,
) -> Iterator[Trainer]:
    """Starts a fine-tuning run, or resumes the one in the directory.

    Args:
        config: The settings of the run.
        options: Where and how the run is executed.
        sample_prompts: Prompts to complete before and after training; by default, some
            of the held-out examples.
        max_new_tokens: Limit of generated tokens per sample.
        check_size: Called with the arguments of the backbone before weights are loaded;
            raises a `ValueError` if the model is too large.

    Yields:
        The trainer, to be used inside the `with` block.

    Raises:
        ValueError: if settings, examples or the run in the directory conflict.
        run_directory.RunBusyError: if another process trains in the directory.
        checkpoint_manager.CheckpointError: if checkpoints exist, but none is intact.
        OSError: if a file cannot be read.

    Example:
        ```python
        config = FinetuneConfig("nano", ("examples.jsonl",), lora_rank=4)
        with open_run(config, RunOptions("runs/answers")) as trainer:
            trainer.train()
            export_model(trainer, config, (ADAPTERS, MODEL), replace=False)
        ```
    """
    source, architecture = find_model(config.preset, config.sequence_length)
    check_size(architecture)
    examples, validation = read_examples(config)
    distribution = _distribution(config, architecture, options)
    with lock_run(options.output):
        run = _describe(config, architecture, examples, validation)
        before, changes = run_directory.read_and_check_run(
            options.output, run, options.accept_changes
        )
        # What the examples and prompts need is checked before the weights are loaded.
        preprocessor = _load_preprocessor(config, source, architecture)
        data = _instruction_data(config, preprocessor, examples, validation)
        if sample_prompts is None:
            sample_prompts = _prompts(config, preprocessor, [e for _, e in validation])
        sampling = _sampling(preprocessor, architecture, sample_prompts, max_new_tokens)
        train = config.train_config(data.steps(config.epochs))
        lm = _build(config, source, preprocessor, train, distribution)
        proto = preprocessor.tokenizer.proto
        run_directory.write_run_once(
            options.output, run, proto, before, changes, options.log
        )
        state = _train_state(config, lm, train, distribution)
        yield Trainer(train, state, data, options, {"run": config.to_json()}, sampling)


def export_model(
    trainer: Trainer, config: FinetuneConfig, names: Iterable[str], replace: bool
) -> None:
    """Exports the trained model into the run's directory.

    What cannot be exported is logged: anything by several processes, and the merged
    model of int8 weights. Without adapters, `ADAPTERS` is ignored.

    Args:
        trainer: The trainer of a complete run.
        config: The settings of the run.
        names: What to export: `ADAPTERS`, `MODEL` or both.
        replace: Whether existing exports are replaced.
    """
    names = tuple(names)
    if names and jax.process_count() > 1:
        trainer.options.log(
            "The weights are sharded over several hosts, so nothing is exported. Run "
            "the command again on a single host to export the complete run."
        )
        return
    trainer.state.update_model()
    lm = trainer.state.lm
    write = {MODEL: lm.export_to_transformers}
    if config.lora_rank:
        write[ADAPTERS] = lm.save_adapters
    if config.int8 and MODEL in names:
        del write[MODEL]
        trainer.options.log(
            "The merged model is not exported, because adapters cannot be merged into "
            "int8 weights. The adapters fit the model in any dtype."
        )
    for name in filter(write.get, names):
        path = os.path.join(trainer.options.output, name)
        if replace or not os.path.isdir(path):
            write[name](path, force=True)


# ----- Model


def find_model(
    preset: str, sequence_length: int = 1
) -> tuple[ModelSource, dict[str, Any]]:
    """Finds the model to fine-tune, without reading its weights.

    Args:
        preset: See `FinetuneConfig`.
        sequence_length: See `FinetuneConfig`.

    Returns:
        Its source, and the arguments of its backbone.

    Raises:
        ValueError: if the model is unknown or unavailable, or its context is shorter
            than `sequence_length`.

    Example:
        >>> _, architecture = find_model("nano", sequence_length=256)
        >>> architecture["num_layers"]
        4
    """
    with _reading_preset(preset):
        source = find_source(preset)
        architecture = validate_architecture(source.arguments())
    context = context_length(architecture)
    if sequence_length > context:
        raise ValueError(
            "`sequence_length` (--sequence-length) must not exceed the context length "
            f"of {preset}, {context} tokens. Received: "
            f"sequence_length={sequence_length}"
        )
    return source, architecture


@contextlib.contextmanager
def _reading_preset(preset):
    """Converts errors of reading the preset, which are not errors of writing a run."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The preset (--preset) {preset!r} is unavailable: {error}"
        ) from error


def _distribution(config, architecture, options):
    """Returns the `keras.distribution` of a run; `None` on other backends than JAX."""
    backend = keras.config.backend()
    if backend != "jax":
        for name in ("mesh", "profile"):
            if getattr(options, name):
                raise ValueError(
                    f"`{name}` (--{name}) needs the JAX backend. Omit it, or use JAX. "
                    f"Received: {name}={getattr(options, name)}, backend={backend!r}"
                )
        return None
    jit.use_compilation_cache()
    mesh = options.mesh or {"data": 1, "fsdp": jax.device_count(), "model": 1}
    check_mesh(mesh, architecture, config.batch_size, config.micro_batches)
    return distribution_for(mesh)


def _load_preprocessor(config, source, architecture):
    """Loads the tokenizer, with the sequence length and chat template of the run."""
    with _reading_preset(config.preset):
        preprocessor = source.preprocessor(OpenLlamaCausalLMPreprocessor, {})
    check_vocabulary(
        preprocessor.tokenizer.vocabulary_size(), architecture["vocabulary_size"]
    )
    preprocessor.sequence_length = config.sequence_length
    if config.chat_template is not None:
        preprocessor.chat_template = config.chat_template
    return preprocessor


def _build(config, source, preprocessor, train, distribution):
    """Loads the weights, adds adapters if the config has them, and compiles."""
    # Keras draws the seeds of initializers from `random`. (`set_random_seed` would
    # import TensorFlow.)
    random.seed(config.seed)
    with distribution_scope(distribution):
        with _reading_preset(config.preset):
            lm = load_task_from_source(
                OpenLlamaCausalLM,
                source,
                describe_origin(config.preset),
                dtype=config.dtype,
                preprocessor=preprocessor,
            )
        if config.int8:
            lm.backbone.quantize("int8")
        if config.lora_rank:
            targets = config.lora_targets and list(config.lora_targets)
            lm.backbone.enable_lora(config.lora_rank, targets, config.lora_alpha)
        compile_model(lm, train)
    return lm


def _train_state(config, lm, train, distribution):
    save_frozen = not config.lora_rank
    if keras.config.backend() == "jax":
        return JaxTrainState(lm, train, distribution, save_frozen=save_frozen)
    return KerasTrainState(lm, save_frozen=save_frozen)


def _describe(config, architecture, examples, validation):
    """Returns the contents of `run.json`."""
    return {
        **config.to_json(),
        "kind": run_directory.FINETUNING,
        "architecture": json.loads(json.dumps(architecture)),
        "weights": "adapters" if config.lora_rank else "all",
        "data": {"examples": _fingerprint(examples, validation)},
    }


# ----- Examples


def read_examples(
    config: FinetuneConfig,
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Reads the training and the held-out examples.

    Args:
        config: The settings of the run.

    Returns:
        Two lists of `(source, example)`: for training, and held out.

    Raises:
        ValueError: if a file holds an invalid example.
        OSError: if a file cannot be read.
    """
    templates = None
    if config.prompt is not None or config.response is not None:
        templates = (config.prompt or "{prompt}", config.response or "{response}")
    examples = instructions.read_examples_with_sources(config.data, templates)
    if config.validation is None:
        return instructions.split_examples(
            examples, config.validation_fraction, config.seed
        )
    return examples, instructions.read_examples_with_sources(
        [config.validation], templates
    )


def _fingerprint(*parts):
    text = json.dumps([[e for _, e in part] for part in parts], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _instruction_data(config, preprocessor, examples, validation):
    def tokenize(examples, pack):
        tokenized = preprocessor.tokenize_examples(normalize_examples(examples))
        tokenized.warn()
        arrays = tokenized.packed() if pack else tokenized.padded()
        return arrays, tokenized.num_bytes

    by_source = {}
    for source, example in validation:
        by_source.setdefault(source, []).append(example)
    train, _ = tokenize([e for _, e in examples], config.pack)
    held_out = {source: tokenize(some, False) for source, some in by_source.items()}
    return InstructionData(
        train,
        config.batch_size,
        config.seed,
        validation=held_out,
        process_count=jax.process_count(),
        process_index=jax.process_index(),
    )


def _sampling(preprocessor, architecture, prompts, max_new_tokens):
    """Checks the prompts to complete; returns `SamplePrompts`."""
    if max_new_tokens < 1:
        raise ValueError(
            "`max_new_tokens` (--max-new-tokens) must be a positive integer. Received: "
            f"max_new_tokens={max_new_tokens}"
        )
    context = context_length(architecture)
    for prompt in prompts:
        length = len(_prompt_ids(preprocessor, prompt))
        if length > context:
            raise ValueError(
                f"`sample_prompts` (--sample-prompt) has a prompt of {length} tokens, "
                f"but the context of this model is {context} tokens. Shorten it. "
                f"Received: {prompt!r:.80}"
            )
    labeled = {f"sample {i}": prompt for i, prompt in enumerate(prompts, 1)}
    return SamplePrompts(
        labeled,
        max_new_tokens=max_new_tokens,
        max_length=context,
        before_and_after=True,
    )


def _prompt_ids(preprocessor, prompt):
    if isinstance(prompt, str):
        return preprocessor.prompt_ids([prompt])[0]
    return preprocessor.chat_ids(prompt["messages"])


def _prompts(config, preprocessor, examples):
    """Returns prompts of examples that leave room for a response."""
    prompts = []
    for example in examples:
        prompt = prompt_from_example(example)
        try:
            ids = _prompt_ids(preprocessor, prompt)
        except ValueError:
            continue  # It has no prompt, like a chat that starts with the assistant.
        if len(ids) < config.sequence_length:
            prompts.append(prompt)
        if len(prompts) == _NUM_SAMPLE_PROMPTS:
            break
    return prompts


def prompt_from_example(example: str | Mapping[str, Any]) -> Any:
    """Returns the prompt of an example.

    Args:
        example: Text, prompt and response, or chat.

    Returns:
        The start of a text, the prompt, or the chat without the assistant's last
        messages.

    Example:
        >>> prompt_from_example({"prompt": "2 + 2 =", "response": "4"})
        '2 + 2 ='
    """
    if isinstance(example, str):
        return example[:60]
    if "prompt" in example:
        return example["prompt"]
    messages = list(example["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {"messages": messages}
