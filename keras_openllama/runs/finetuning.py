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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import keras

from keras_openllama.backend import jit
from keras_openllama.checkpoints.training_run import TOKENIZER_SETTINGS
from keras_openllama.config import context_length, validate_architecture
from keras_openllama.data import instructions
from keras_openllama.distribution import check_mesh
from keras_openllama.loading.load import (
    describe_origin,
    find_source,
    load_task,
)
from keras_openllama.loading.weight_types import WeightTypes
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.runs import run_directory
from keras_openllama.runs.finetune_config import FinetuneConfig
from keras_openllama.runs.instruction_data import InstructionData
from keras_openllama.runs.jax_train_state import (
    JaxTrainState,
    distribution_for,
    distribution_scope,
)
from keras_openllama.runs.keras_train_state import KerasTrainState
from keras_openllama.runs.optimizer import compile_model
from keras_openllama.runs.trainer import RunOptions, SamplePrompts, Trainer, lock_run
from keras_openllama.text.chat_rendering import RenderedExample, render_example
from keras_openllama.text.input_kinds import ChatExample
from keras_openllama.text.inputs import as_example
from keras_openllama.text.messages import ASSISTANT, is_reply
from keras_openllama.text.records import Example
from keras_openllama.text.sentencepiece_model import check_vocabulary
from keras_openllama.training.target_weights import no_targets_error

if TYPE_CHECKING:
    from keras_openllama.loading.sources import ModelSource
    from keras_openllama.quantization.policies import MatrixFormat

ADAPTERS, MODEL = "adapters", "model"
_NUM_SAMPLE_PROMPTS = 4  # Heuristic: held-out prompts that are sampled from.


@contextlib.contextmanager
def open_run(
    config: FinetuneConfig,
    options: RunOptions,
    sample_prompts: list[str] | None = None,
    max_new_tokens: int = 48,
    check_size: Callable[..., None] = lambda sizes, formats: None,
    max_skipped: float = instructions.MAX_SKIPPED,
) -> Iterator[Trainer]:
    """Starts a fine-tuning run, or resumes the one in the directory.

    Args:
        config: The settings of the run.
        options: Where and how the run is executed.
        sample_prompts: Prompts to complete before and after training; by default, some
            of the held-out examples.
        max_new_tokens: Limit of generated tokens per sample.
        check_size: Called before weights are loaded with the arguments of the backbone
            and with what `quantized_formats` returns; raises a `ValueError` if the
            model is too large.
        max_skipped: Largest fraction of the examples that may be skipped because there
            is nothing to learn from them.

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
    check_size(architecture, quantized_formats(config, source, architecture))
    # What the examples and prompts need is checked before the weights are loaded.
    preprocessor = _load_preprocessor(config, source, architecture)
    config = dataclasses.replace(config, chat_template=preprocessor.chat_template)
    examples, validation = read_examples(config, preprocessor, max_skipped, options.log)
    distribution = _distribution(config, architecture, options)
    with lock_run(options.output):
        run = _describe(config, architecture, examples, validation)
        before, changes = run_directory.read_and_check_run(
            options.output, run, options.accept_changes
        )
        data = _instruction_data(config, preprocessor, examples, validation)
        if sample_prompts is None:
            sample_prompts = _prompts(config, preprocessor, validation)
        sampling = _sampling(preprocessor, architecture, sample_prompts, max_new_tokens)
        train = config.train_config(data.steps(config.epochs))
        lm = _build(config, source, preprocessor, train, distribution)
        run["end_token_ids"] = lm.end_token_ids
        tokenizer = preprocessor.tokenizer
        run[TOKENIZER_SETTINGS] = tokenizer.settings()
        run_directory.write_run_once(
            options.output, run, tokenizer.proto, before, changes, options.log
        )
        state = _train_state(config, lm, train, distribution)
        yield Trainer(train, state, data, options, {"run": config.to_json()}, sampling)


def export_model(
    trainer: Trainer, config: FinetuneConfig, names: Iterable[str], replace: bool
) -> None:
    """Exports the trained model into the run's directory.

    Several processes export nothing, and log it. Without adapters, `ADAPTERS` is
    ignored. The merged model of quantized weights has the dequantized ones.

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


def quantized_formats(
    config: FinetuneConfig, source: ModelSource, architecture: dict[str, Any]
) -> dict[str, MatrixFormat]:
    """Returns how each layer that is quantized will be, by path.

    Args:
        config: The settings of the run.
        source: The model.
        architecture: The arguments of its backbone.

    Raises:
        ValueError: If weights are quantized that the run would have to train.
    """
    with _reading_preset(config.preset):
        stored = source.formats(architecture)
    types = WeightTypes(config.dtype, config.quantization or "auto")
    formats = types.formats(architecture, stored)
    if formats and not config.lora_rank:
        raise ValueError(
            "Quantized weights cannot be trained: train adapters with `lora_rank` "
            "(--lora-rank). To train all weights, load floating-point ones; "
            "`keras-openllama convert … --to transformers` makes them of a quantized "
            f"model. Received: preset={config.preset!r}, "
            f"quantization={config.quantization!r}, lora_rank={config.lora_rank}"
        )
    return formats


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
            lm = load_task(
                OpenLlamaCausalLM,
                source,
                describe_origin(config.preset),
                dtype=config.dtype,
                preprocessor=preprocessor,
                quantization=config.quantization or "auto",
            )
        if config.lora_rank:
            targets = config.lora_targets and list(config.lora_targets)
            lm.backbone.enable_lora(config.lora_rank, targets, config.lora_alpha)
        compile_model(lm, train)
    lm.add_trained_end_token()
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


@dataclasses.dataclass(frozen=True)
class TrainingExample:
    """A fine-tuning example that was read and rendered.

    Attributes:
        source: Name of its file without the suffix.
        example: The example, see `text.records`.
        rendered: The same as text, see `text.chat_rendering`.
    """

    source: str
    example: Example
    rendered: RenderedExample


def read_examples(
    config: FinetuneConfig,
    preprocessor: OpenLlamaCausalLMPreprocessor,
    max_skipped: float = instructions.MAX_SKIPPED,
    log: Callable[[str], object] = print,
) -> tuple[list[TrainingExample], list[TrainingExample]]:
    """Reads the training and the held-out examples.

    Args:
        config: The settings of the run.
        preprocessor: Has the chat template.
        max_skipped: Largest fraction of the examples that may be skipped because there
            is nothing to learn from them.
        log: Called with a line of text for each reason to skip examples.

    Returns:
        Two lists: for training, and held out.

    Raises:
        ValueError: if examples are invalid, or too many are skipped. The message names
            the files and lines.
        OSError: if a file cannot be read.
    """
    templates = None
    if config.prompt is not None or config.response is not None:
        templates = (
            "{prompt}" if config.prompt is None else config.prompt,
            "{response}" if config.response is None else config.response,
        )
    files = [config.data]
    if config.validation is not None:
        files.append([config.validation])
    read = [
        _read_files(paths, templates, preprocessor, max_skipped, log) for paths in files
    ]
    if config.validation is not None:
        return tuple(read)
    return instructions.split_examples(read[0], config.validation_fraction, config.seed)


def _read_files(paths, templates, preprocessor, max_skipped, log):
    """Reads examples and renders them as text."""
    errors = instructions.ExampleErrors(max_skipped)
    found, total = instructions.read_located_examples(paths, templates, errors)
    template = preprocessor.compiled_chat_template()
    examples, num_cut = [], 0
    for located in found:
        example = as_example(located.example, "messages")
        try:
            rendered = render_example(example, template)
        except ValueError as error:
            errors.add(located.place, error)
            continue
        examples.append(TrainingExample(located.source, located.example, rendered))
        is_chat = isinstance(example, ChatExample)
        num_cut += is_chat and not is_reply(example.messages[-1])
    errors.check(total)
    for line in errors.summary():
        log(line)
    if num_cut:
        log(
            f"{num_cut} of {total} chats do not end with a reply of the assistant: "
            "their last messages are not learned from."
        )
    return examples


def _fingerprint(*parts):
    text = json.dumps([[x.example for x in part] for part in parts], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _instruction_data(config, preprocessor, examples, validation):
    def tokenize(examples, pack):
        tokenized = preprocessor.tokenize_rendered([x.rendered for x in examples])
        tokenized.warn()
        arrays = tokenized.packed() if pack else tokenized.padded()
        return arrays, tokenized.num_bytes

    by_source = {}
    for example in validation:
        by_source.setdefault(example.source, []).append(example)
    train, _ = tokenize(examples, config.pack)
    held_out = {source: tokenize(some, False) for source, some in by_source.items()}
    if not train[2].any():
        raise no_targets_error("The examples (--data) have")
    has_targets = any(arrays[2].any() for arrays, _ in held_out.values())
    if config.validation is not None and not has_targets:
        raise no_targets_error("The held-out examples (--validation) have")
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
    return preprocessor.chat_ids(prompt["messages"], prompt.get("tools"))


def _prompts(config, preprocessor, examples):
    """Returns prompts of examples that leave room for a response."""
    prompts = []
    for example in examples:
        prompt = prompt_from_example(
            example.example, preprocessor.chat_template is not None
        )
        try:
            ids = _prompt_ids(preprocessor, prompt)
        except ValueError:
            continue  # It has no prompt, like a chat that starts with the assistant.
        if len(ids) < config.sequence_length:
            prompts.append(prompt)
        if len(prompts) == _NUM_SAMPLE_PROMPTS:
            break
    return prompts


def prompt_from_example(example: Example, as_chat: bool = False) -> Any:
    """Returns the prompt of an example.

    Args:
        example: Text, prompt and response, or chat, see `text.records`.
        as_chat: Whether there is a chat template for an example that is both a pair and
            a chat.

    Returns:
        The start of a text, the prompt, or the chat without the last reply and what
        follows it.

    Example:
        >>> prompt_from_example({"prompt": "2 + 2 =", "response": "4"})
        '2 + 2 ='
    """
    if isinstance(example, str):
        return example[:60]
    if "prompt" in example and not (as_chat and "messages" in example):
        return example["prompt"]
    messages = list(example["messages"])
    while messages and not is_reply(messages[-1]):
        messages.pop()
    while messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    tools = {"tools": example["tools"]} if "tools" in example else {}
    return {"messages": messages, **tools}
