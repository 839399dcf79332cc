"""A pretraining run as a source of models, see `sources`."""

from keras_openllama.checkpoints import training_run
from keras_openllama.loading import sources


class TrainingRun(sources.Streamed):
    """The directory of a run, or of one of its checkpoints.

    Args:
        path: path of the directory.

    Raises:
        OSError: if it is a checkpoint outside of a run.
    """

    def __init__(self, path):
        self._run = training_run.Run(path)

    def arguments(self):
        return self._run.architecture()

    def tokenizer_file(self):
        return self._run.tokenizer_file()

    def read_tensors(self, arguments, head=True):
        checkpoint = self._run.checkpoint()
        tensors = checkpoint.read_tensors(arguments, head)
        name = self._run.path.name
        self.origin = f"the training run {name} at step {checkpoint.step}"
        return tensors
