"""Pretraining: sets up `trainer.Trainer` with a new model and prepared data."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator

import jax
import keras

from keras_openllama import presets
from keras_openllama.backend import jit
from keras_openllama.backend.keras_hub import without_tensorflow
from keras_openllama.data import mixture as mixtures
from keras_openllama.data.prepared_data import PreparedData
from keras_openllama.distribution import check_mesh
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.runs import run_directory
from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.runs.jax_train_state import (
    JaxTrainState,
    distribution_for,
    distribution_scope,
)
from keras_openllama.runs.optimizer import compile_model
from keras_openllama.runs.recipe import ResolvedRecipe
from keras_openllama.runs.token_data import TokenData
from keras_openllama.runs.trainer import RunOptions, SamplePrompts, Trainer, lock_run

# Properties of the tokenizer that data and preset must share.
_TOKENIZER_PROPERTIES = (
    *("vocabulary_size", "start_token_id", "end_token_id"),
    "keeps_spaces",
)
PROMPTS = (
    "The captain looked at the sea and said,",
    "Q: What is the largest animal?\nA:",
    "def fibonacci(n):",
)


def pretrain(
    resolved: ResolvedRecipe, data: PreparedData, options: RunOptions
) -> str | None:
    """Starts or resumes a pretraining run and trains, see `open_run`.

    Args:
        resolved: The recipe.
        data: The prepared data.
        options: Where and how the run is executed.

    Returns:
        `None` if the run is complete, or the name of the signal that stopped it.
    """
    with open_run(resolved, data, options) as trainer:
        return trainer.train()


@contextlib.contextmanager
def open_run(
    resolved: ResolvedRecipe, data: PreparedData, options: RunOptions
) -> Iterator[Trainer]:
    """Starts a pretraining run, or resumes the one in the directory.

    A run resumes from its newest intact checkpoint; on the same devices, the results
    are bit-exactly those of an uninterrupted run.

    Args:
        resolved: The recipe.
        data: The prepared data.
        options: Where and how the run is executed.

    Yields:
        The trainer, to be used inside the `with` block.

    Raises:
        ValueError: if the settings conflict with the devices, the data, or the run in
            the directory.
        RuntimeError: if the backend is not JAX, or another process trains in the
            directory.
        checkpoint_manager.CheckpointError: if checkpoints exist, but none is intact.

    Example:
        ```python
        resolved, data = resolve_recipe("nano"), PreparedData.open("data")
        with open_run(resolved, data, RunOptions("runs/nano")) as trainer:
            trainer.train()
        ```
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            "Pretraining needs the JAX backend (KERAS_BACKEND=jax). Received: "
            f"backend={keras.config.backend()!r}"
        )
    jit.use_compilation_cache()
    resolved = resolved.for_devices(jax.device_count(), options.mesh)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = options.mesh or recipe.mesh_for(jax.device_count())
    with lock_run(options.output):
        check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
        _check_tokenizer(data, preset)
        distribution = distribution_for(mesh)
        _report_devices(resolved, mesh, options)
        mixture = _check_and_write_run(resolved, preset, data, options)
        lm = _build(preset, recipe, data, distribution)
        yield Trainer(
            recipe,
            JaxTrainState(lm, recipe, distribution),
            TokenData(data, recipe, mixture),
            options,
            {
                "data": {"mixture": mixture.to_json()},
                "run": resolved.to_json(),
                "mesh": mesh,
            },
            SamplePrompts({prompt.splitlines()[0]: prompt for prompt in PROMPTS}),
        )


def _report_devices(resolved, mesh, options):
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    source = "command line"
    if options.mesh is None:
        source = resolved.mesh_source(jax.device_count())
    options.log(
        f"{jax.device_count()} x {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} process(es): {sizes} ({source})"
    )


def _check_and_write_run(resolved, preset, data, options):
    """Checks against the run in the directory, or writes it; returns the mixture."""
    name = resolved.recipe.mixture
    mixture = mixtures.load_mixture(name) if name else data.mixture
    now = {
        **resolved.to_json(),
        "architecture": dict(preset.config),
        "data": _fingerprint(data),
    }
    before, changes = run_directory.read_and_check_run(
        options.output, now, options.accept_changes
    )
    if before is not None:
        steps = CheckpointManager(options.output).steps() or [0]
        mixture, mixture_changes = run_directory.resumed_mixture(
            before, mixture, steps[-1], options.accept_changes
        )
        changes += mixture_changes
    now["mixture"] = mixture.to_json()
    proto = data.tokenizer_proto()
    run_directory.write_run_once(
        options.output, now, proto, before, changes, options.log
    )
    return mixture


def _build(preset, recipe, data, distribution):
    with without_tensorflow():  # Keras would import it to set its seed.
        keras.utils.set_random_seed(recipe.seed)
    with distribution_scope(distribution):
        lm = OpenLlamaCausalLM(
            OpenLlamaBackbone(**preset.config, dtype=recipe.precision),
            OpenLlamaCausalLMPreprocessor(
                OpenLlamaTokenizer(data.tokenizer_proto()),
                sequence_length=recipe.sequence_length,
            ),
            compile=False,
        )
        compile_model(lm, recipe)
    return lm


def _check_tokenizer(data, preset):
    """Raises if the data were prepared with another kind of tokenizer."""
    expected = {"vocabulary_size": preset.config["vocabulary_size"], **preset.tokenizer}
    differences = [
        f"{name} is {found!r}, but that of {preset.name} is {expected[name]!r}"
        for name, found in data.manifest["tokenizer"].items()
        if name in _TOKENIZER_PROPERTIES and found != expected[name]
    ]
    if differences:
        raise ValueError(
            f"The data in {data.directory} were prepared with another kind of "
            f"tokenizer: {'; '.join(differences)}. Prepare them with the preset's."
        )


def _fingerprint(data):
    """Identifies the data of a run."""
    manifest = json.dumps(data.manifest, sort_keys=True).encode()
    return {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}
