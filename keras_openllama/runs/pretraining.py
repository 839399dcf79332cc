"""Pretraining: a new model and a stream of prepared tokens, for `trainer.Trainer`."""

import contextlib
import hashlib
import json

import jax
import keras

from keras_openllama import presets
from keras_openllama.backend import jit
from keras_openllama.backend.keras_hub import without_tensorflow
from keras_openllama.data import mixture as mixtures
from keras_openllama.distribution import check_mesh
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.runs import run_directory
from keras_openllama.runs.checkpoint_manager import Checkpoints
from keras_openllama.runs.jax_train_state import (
    JaxTrainState,
    distribution_for,
    scope_of,
)
from keras_openllama.runs.optimizer import compile_model
from keras_openllama.runs.token_data import TokenData
from keras_openllama.runs.trainer import Sampling, Trainer, exclusive

# What data and model must have in common.
_OF_TOKENIZER = (
    *("vocabulary_size", "start_token_id", "end_token_id"),
    "keeps_spaces",
)
PROMPTS = (
    "The captain looked at the sea and said,",
    "Q: What is the largest animal?\nA:",
    "def fibonacci(n):",
)


def pretrain(resolved, data, options):
    """Trains as `open_run(...)` yields it; see there."""
    with open_run(resolved, data, options) as trainer:
        return trainer.train()


@contextlib.contextmanager
def open_run(resolved, data, options):
    """Starts a pretraining run, or resumes the one in the directory.

    A run is resumed from its newest whole checkpoint: on the same devices bit-exactly
    as if it had never stopped.

    Args:
        resolved: `recipe.Resolved`.
        data: `prepared_data.PreparedData`.
        options: `trainer.RunOptions`.

    Yields:
        `trainer.Trainer`.

    Raises:
        ValueError: if the settings do not fit the devices, the data, or the run in
            the directory.
        RuntimeError: if the backend is not JAX, or another process has the run.
        checkpoint_manager.CheckpointError: if no checkpoint can be read.

    Example:

    ```python
    options = RunOptions("runs/nano")
    with open_run(resolve("nano"), PreparedData.open("data"), options) as trainer:
        trainer.train()
    ```
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            "Pretraining needs the JAX backend (KERAS_BACKEND=jax). Received: "
            f"backend={keras.config.backend()!r}"
        )
    jit.use_compilation_cache()
    resolved = resolved.on(jax.device_count(), options.mesh)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = options.mesh or recipe.mesh_for(jax.device_count())
    with exclusive(options.output):
        check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
        _check_tokenizer(data, preset)
        distribution = distribution_for(mesh)
        _report_devices(resolved, mesh, options)
        mixture = _agree_on_run(resolved, preset, data, options)
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
            Sampling({prompt.splitlines()[0]: prompt for prompt in PROMPTS}),
        )


def _report_devices(resolved, mesh, options):
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    source = "command line"
    if options.mesh is None:
        source = resolved.mesh_source(jax.device_count())
    options.say(
        f"{jax.device_count()} x {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} process(es): {sizes} ({source})"
    )


def _agree_on_run(resolved, preset, data, options):
    """Compares with the run in the directory, or starts one; returns the mixture."""
    before = run_directory.read(options.output)
    name = resolved.recipe.mixture
    mixture = mixtures.load(name) if name else data.mixture
    now = {
        **resolved.to_json(),
        "architecture": dict(preset.config),
        "data": _identity(data),
    }
    changes = []
    if before is not None:
        changes = run_directory.check_unchanged(before, now, options.accept_changes)
        steps = Checkpoints(options.output).steps() or [0]
        mixture, of_mixture = run_directory.mixture_from(
            before, mixture, steps[-1], options.accept_changes
        )
        changes += of_mixture
        for line in changes:
            options.say(f"Changed: {line}.")
    now["mixture"] = mixture.to_json()
    changed = before is None or bool(changes)
    run_directory.write_once(options.output, now, data.proto(), changed)
    return mixture


def _build(preset, recipe, data, distribution):
    with without_tensorflow():  # Whose seed Keras would set, too.
        keras.utils.set_random_seed(recipe.seed)
    with scope_of(distribution):
        lm = OpenLlamaCausalLM(
            OpenLlamaBackbone(**preset.config, dtype=recipe.precision),
            OpenLlamaCausalLMPreprocessor(
                OpenLlamaTokenizer(data.proto()),
                sequence_length=recipe.sequence_length,
            ),
            compile=False,
        )
        compile_model(lm, recipe)
    return lm


def _check_tokenizer(data, preset):
    """Whether data were made for a model such as this: another text would be learnt."""
    expected = {"vocabulary_size": preset.config["vocabulary_size"], **preset.tokenizer}
    differences = [
        f"{name} is {found!r}, and that of {preset.name} {expected[name]!r}"
        for name, found in data.manifest["tokenizer"].items()
        if name in _OF_TOKENIZER and found != expected[name]
    ]
    if differences:
        raise ValueError(
            f"The data in {data.directory} were prepared with another kind of "
            f"tokenizer: {'; '.join(differences)}. Prepare them with the preset's."
        )


def _identity(data):
    """What must not change about the data of a run."""
    manifest = json.dumps(data.manifest, sort_keys=True).encode()
    return {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}
