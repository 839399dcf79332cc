"""A pretraining run, from its first step to its last, across kills and restarts."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama import presets
from keras_openllama.backend import jit
from keras_openllama.backend.keras_hub import without_tensorflow
from keras_openllama.data import mixture as mixtures
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.distribution import (
    OpenLlamaParallel,
    check_hosts,
    check_mesh,
    make_mesh,
)
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.runs import loss_plot, run_directory, train_state
from keras_openllama.runs.checkpoint_manager import Checkpoints
from keras_openllama.runs.interruption import StopRequest, reading_data
from keras_openllama.runs.step_reporter import Records
from keras_openllama.runs.validation import Validation
from keras_openllama.training.train_step_jax import Options, placed
from keras_openllama.utils import files

_PICTURE = "loss.png"
_SAMPLE_TOKENS = 48  # Ours.
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


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run is asked to be.

    Attributes:
        resolved: `recipe.Resolved`.
        data: `prepared_data.PreparedData`.
        output: string, the run's directory; all processes see it.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`; the recipe's if `None`.
        accept_changes: bool, whether a run may go on with other settings.
        profile: pair of ints, first and last step that JAX's profiler records.
        began: float, `time.monotonic()` when the process began.
        report: called with lines of text, on the first process.
    """

    resolved: object
    data: object
    output: str
    mesh: dict | None = None
    accept_changes: bool = False
    profile: tuple | None = None
    began: float | None = None
    report: object = print


def pretrain(request):
    """`begun`, then `train`: see there."""
    with begun(request) as run:
        return run.train()


@contextlib.contextmanager
def begun(request):
    """A run, begun or gone on with, that `train` takes to its end.

    It trains until the recipe's last step, or until a signal asks to stop.

    A run that is there already goes on from its newest whole checkpoint: on the same
    devices to the same bits as if it had never stopped.

    Args:
        request: `Request`.

    Yields:
        An object whose `train()` returns `None` if the run is complete, or the name of
        the signal that stopped it.

    Raises:
        ValueError: if the settings do not fit the devices, the data, or the run that
            is there.
        RuntimeError: if the backend is not JAX, or another process has the run.
        checkpoints.CheckpointError: if a checkpoint cannot be written, or none read.
        stopping.Diverged: by `train`, if too many steps in a row had to be skipped.
        stopping.DataNotRead: by `train`, if a file of the data is damaged or gone.
        OSError: if the log cannot be written.

    Example:

    ```python
    with begun(Request(resolve("nano"), PreparedData("data"), "runs/nano")) as run:
        run.train()
    ```
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            "Pretraining needs the JAX backend (KERAS_BACKEND=jax). Received: "
            f"backend={keras.config.backend()!r}"
        )
    if files.is_remote(request.output):
        raise ValueError(
            "`output` is a directory on this machine, or on a file system that all "
            "hosts have mounted (NFS, gcsfuse): logs are appended to. Received: "
            f"output={request.output!r}"
        )
    jit.use_compilation_cache()
    resolved = request.resolved.on(jax.device_count(), request.mesh)
    request = dataclasses.replace(request, resolved=resolved)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = request.mesh or recipe.mesh_for(jax.device_count())
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    _check_tokenizer(request.data, preset)
    alone = contextlib.nullcontext()
    if jax.process_index() == 0:
        alone = run_directory.locked(request.output)
    with alone:
        yield _Run(request, preset, mesh)


class _Run:
    """The parts of a run, put together."""

    def __init__(self, request, preset, mesh):
        self.request, self.recipe = request, request.resolved.recipe
        self.say = request.report if jax.process_index() == 0 else lambda *_: None
        self.mesh, self.distribution, self.profiling = mesh, None, False
        # One device of many is refused, as any mesh that leaves out some.
        if max(math.prod(mesh.values()), jax.device_count()) > 1:
            device_mesh = make_mesh(**mesh)
            check_hosts(device_mesh.backend_mesh)
            self.distribution = OpenLlamaParallel(device_mesh)
        self._say_devices()
        self.checkpoints = Checkpoints(
            request.output, self.recipe.keep_last, self.recipe.milestone_every
        )
        self.mixture = self._agree_on_run(preset)
        self.lm = self._build(preset)
        self.state = train_state.state_of(self.lm, self._sharding(0))
        self.step = self._restore()

    # ----- Setting up

    def _say_devices(self):
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        source = "command line"
        if self.request.mesh is None:
            source = self.request.resolved.mesh_source(jax.device_count())
        self.say(
            f"{jax.device_count()} x {jax.devices()[0].device_kind} in "
            f"{jax.process_count()} process(es): {sizes} ({source})"
        )

    def _agree_on_run(self, preset):
        """Compares with the run that is there, or begins one; returns the mixture."""
        request = self.request
        before = run_directory.read(request.output)
        name = self.recipe.mixture
        mixture = mixtures.load(name) if name else request.data.mixture
        now = {
            **request.resolved.to_json(),
            "architecture": dict(preset.config),
            "data": _identity(request.data),
        }
        if before is not None:
            changes = run_directory.check_unchanged(before, now, request.accept_changes)
            steps = self.checkpoints.steps() or [0]
            mixture, changed = run_directory.mixture_from(
                before, mixture, steps[-1], request.accept_changes
            )
            for line in (*changes, *changed):
                self.say(f"Changed: {line}.")
        now["mixture"] = mixture.to_json()
        if jax.process_index() == 0 and (before is None or changes or changed):
            run_directory.write(request.output, now, request.data.proto())
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("run")
        return mixture

    def _build(self, preset):
        recipe = self.recipe
        with without_tensorflow():  # Whose seed Keras would set, too.
            keras.utils.set_random_seed(recipe.seed)
        with self._scope():
            lm = OpenLlamaCausalLM(
                OpenLlamaBackbone(**preset.config, dtype=recipe.precision),
                OpenLlamaCausalLMPreprocessor(
                    OpenLlamaTokenizer(self.request.data.proto()),
                    sequence_length=recipe.sequence_length,
                ),
                compile=False,
            )
            optimizer = train_state.make_optimizer(recipe)
            lm.compile(optimizer=optimizer, weighted_metrics=[])
            optimizer.build(lm.trainable_variables)
        return lm

    def _restore(self):
        """Takes the state of the newest checkpoint; returns its step."""
        like = train_state.abstract(train_state.named(self.lm, self.state))

        def make_room(marker):
            jax.tree.map(lambda array: array.delete(), self.state)
            return like

        found = self.checkpoints.restore_latest(make_room)
        if found is None:
            return 0
        marker, arrays = found
        self.state = train_state.unnamed(self.lm, arrays)
        self.say(f"Going on from the checkpoint of step {marker['step']}.")
        return marker["step"]

    # ----- Devices

    def _scope(self):
        alone = contextlib.nullcontext()
        return self.distribution.scope() if self.distribution else alone

    def _sharding(self, rank):
        """Of an array whose first axis is the batch; with rank 0, a copy everywhere."""
        if self.distribution is None:
            return None
        if rank:
            return self.distribution.batch_sharding(rank)
        mesh = self.distribution.device_mesh.backend_mesh
        return NamedSharding(mesh, PartitionSpec())

    def _put(self, batch):
        """This process's rows as a part of the global batch."""
        if self.distribution is None:
            return jax.device_put(batch)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(
                self._sharding(a.ndim),
                np.ascontiguousarray(a),
                (len(a) * jax.process_count(), *a.shape[1:]),
            ),
            batch,
        )

    def _options(self):
        recipe = self.recipe
        options = Options(recipe.micro_batches, recipe.rematerialize, recipe.z_loss)
        return placed(options, self.distribution)

    # ----- Training

    def train(self):
        if self.step >= self.recipe.steps:
            self.say(f"The run in {self.request.output} is complete.")
            return None
        stream = self._stream()
        self.batches = iter(stream.dataset(from_step=self.step))
        batch = self._next_batch()
        self.validation = Validation(
            self.request.data, self.recipe, self.mixture, self._put
        )
        if not self.validation.sources and self.recipe.validate_every:
            self.say("The data set no documents aside: there is no validation.")
            self.recipe = self.recipe.replace(validate_every=0)
        self._compile(self._put(batch))
        self.records = Records(
            self.lm,
            self.recipe,
            stream if jax.process_count() == 1 else self._stream(hosts=1, host=0),
            self.request.output,
            self.step,
            self.request.began,
        )
        try:
            with self.records, StopRequest() as stop:
                while not self._take_step(batch, stop):
                    with self.records.clock.measure("data"):
                        batch = self._next_batch()
                self.checkpoints.wait()
        finally:
            self._end_profile()
            self.checkpoints.close()
        self._draw()
        return stop.signal if self.step < self.recipe.steps else None

    def _next_batch(self):
        with reading_data():
            return next(self.batches)

    def _take_step(self, batch, stop):
        """One step and what is due after it; returns whether it was the last."""
        recipe, records = self.recipe, self.records
        self._begin_profile()
        batch = self._put(batch)
        with records.clock.measure("compute"):
            measures, self.state = self.program(self.state, batch)
        self.step += 1
        records.add(self.step, measures)
        if self.request.profile and self.step == self.request.profile[1]:
            jax.block_until_ready(self.state)
            self._end_profile()
        stopped, complete = stop.at(self.step), self.step == recipe.steps
        if stopped:  # There may be seconds left before a kill.
            self._save()
            self.checkpoints.wait()
        due = complete and recipe.validate_every > 0
        if due or _due(recipe.validate_every, self.step):
            records.settle()
            self._validate()
        if _due(recipe.sample_every, self.step):
            records.settle()
            self._sample()
        intervals = recipe.save_every, recipe.milestone_every
        due = complete or any(_due(every, self.step) for every in intervals)
        if due and not stopped:
            self._save()
        self.checkpoints.check()
        return stopped or complete

    def _stream(self, **hosts):
        recipe = self.recipe
        return TokenStream(
            self.request.data,
            recipe.sequence_length,
            recipe.batch_size,
            seed=recipe.seed,
            mixture=self.mixture,
            packing=recipe.packing,
            mask_documents=recipe.mask_documents,
            **hosts,
        )

    def _compile(self, batch):
        self.say("Compiling the training step …")
        start, everywhere = time.monotonic(), self._sharding(0)
        self.program = train_state.compile_step(
            *(self.lm, self.state, batch, self._options()),
            self.recipe.spike_threshold,
            everywhere,
        )
        if self.recipe.validate_every:  # What does not fit is to fail now.
            self.evaluate = train_state.compile_evaluation(
                self.lm, self.state, batch, self._options(), everywhere
            )
        self.say(f"Compiled in {time.monotonic() - start:.1f} s.")

    def _validate(self):
        found = self.validation.measure(lambda batch: self.evaluate(self.state, batch))
        self.records.validation(found)
        self._draw()

    def _sample(self):
        train_state.put_back(self.lm, self.state)
        with self._scope():
            texts = self.lm.generate(list(PROMPTS), max_new_tokens=_SAMPLE_TOKENS)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            self.records.text(prompt.splitlines()[0], text)

    def _save(self):
        self.records.settle()
        info = {
            "tokens": self.step * self.recipe.tokens_per_step,
            "data": {"next_step": self.step, "mixture": self.mixture.to_json()},
            "run": self.request.resolved.to_json(),
            "mesh": self.mesh,
            "versions": run_directory.versions(),
        }
        with self.records.clock.measure("checkpoint"):
            self.checkpoints.save(
                self.step, train_state.named(self.lm, self.state), info
            )

    def _begin_profile(self):
        """Starts JAX's profiler before the next step, if that is to be recorded."""
        first, last = self.request.profile or (0, 0)
        if not self.profiling and first <= self.step + 1 <= last:
            jax.profiler.start_trace(files.join(self.request.output, "profile"))
            self.profiling = True

    def _end_profile(self):
        if self.profiling:
            self.profiling = False
            jax.profiler.stop_trace()

    def _draw(self):
        if jax.process_index() == 0:
            output = self.request.output
            loss_plot.draw(loss_plot.read_runs([output]), files.join(output, _PICTURE))


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


def _due(every, step):
    return every > 0 and step % every == 0
