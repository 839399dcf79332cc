"""Prepared documents as a data set of TensorFlow Datasets."""

import json

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from keras_openllama.data import beam_pipeline, token_records, tokenizing
from keras_openllama.data.prepared_data import lengths_file
from keras_openllama.data.text_sources import hash_of
from keras_openllama.utils import files

UNFINISHED = "unfinished"
# What a source's directory holds beside the files of TensorFlow Datasets.
SUMMARY_FILE = "source.json"


class Tokens(FileReaderBuilder):
    """Token ids of the documents of one source, the builder's config.

    `download_and_prepare` runs a Beam pipeline over the units that are not finished
    yet, and then puts the shards in their place. The result can be read by any user of
    TensorFlow Datasets: `tfds.builder_from_directory(...).as_data_source("train")`.

    Args:
        units: list of `text_sources.Unit`.
        settings: `tokenizing.Settings`.
        data_dir: string, directory of the whole data set.
        workers: int or `None`, see `beam_pipeline.run`.
        beam_flags: list of strings or `None`, see `beam_pipeline.run`.
    """

    name = "tokens"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, units, settings, data_dir, workers=None, beam_flags=None):
        self._units, self._settings = units, settings
        self._workers, self._beam_flags = workers, beam_flags
        self._source = units[0].source
        self._work = files.join(
            data_dir, UNFINISHED, f"{self._source}-{settings.fingerprint}"
        )
        super().__init__(
            data_dir=data_dir,
            config=tfds.core.BuilderConfig(
                name=self._source,
                version=self.VERSION,
                description=f"Tokenized documents of {self._source}",
            ),
            file_format="array_record",
        )

    def prepare(self):
        """Does what is not done yet."""
        self.download_and_prepare(download_dir=files.join(self._work, "downloads"))

    def _log_download_bytes(self):
        """Says nothing: there is no download."""

    _log_download_done = _log_download_bytes

    def _info(self):
        size = tokenizing.processor_of(self._settings.proto).vocab_size()
        dtype = np.dtype(token_records.token_dtype(size).name)
        features = {
            "tokens": tfds.features.Tensor(
                shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES
            ),
            "num_bytes": tfds.features.Scalar(dtype=np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents as token ids, each between <s> and </s>.",
            features=tfds.features.FeaturesDict(features),
        )

    def _download_and_prepare(self, dl_manager, download_config):
        files.make_directory(self._work)
        missing = [
            unit
            for unit in self._units
            if tokenizing.read_receipt(unit, self._work) is None
        ]
        if missing:
            beam_pipeline.run(
                missing, self._settings, self._work, self._workers, self._beam_flags
            )
        receipts = [tokenizing.read_receipt(unit, self._work) for unit in self._units]
        if None in receipts:
            unit = self._units[receipts.index(None)]
            raise RuntimeError(
                f"{unit.label} is not finished, though the pipeline has ended. Did the "
                "file change, or another process remove what was written? Run the same "
                "command again."
            )
        self._check_skipped(receipts)
        self._publish(receipts)

    def _check_skipped(self, receipts):
        skipped = total_skipped(receipts)
        documents = sum(
            receipt["splits"][split]["documents"]
            for receipt in receipts
            for split in tokenizing.SPLITS
        )
        tokenizing.check_skipped(
            f"Source {self._source!r}",
            documents + sum(skipped.values()),
            skipped,
            self._settings.max_skipped,
        )

    def _publish(self, receipts):
        """Puts the shards where TensorFlow Datasets expects them.

        The originals stay until all is done, so that nothing is lost if this is cut
        short.
        """
        splits, sums = [], {}
        for split in tokenizing.SPLITS:
            template = self._get_filename_template(split_name=split)
            paths = template.sharded_filepaths(len(receipts))
            shards = []
            for unit, receipt, path in zip(self._units, receipts, paths, strict=True):
                name = tokenizing.shard_name(unit, split)
                files.copy_file(files.join(self._work, name), str(path))
                shards.append({"file": path.name, **receipt["splits"][split]})
            sums[split] = _sums(shards, self._publish_lengths(split))
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard["documents"] for shard in shards],
                    num_bytes=sum(shard["size"] for shard in shards),
                    filename_template=template,
                )
            )
        self.info.set_splits(tfds.core.SplitDict(splits))
        summary = {
            "fingerprint": fingerprint(self._units, self._settings),
            "inputs": [receipt["input"] for receipt in receipts],
            "skipped": total_skipped(receipts),
            "splits": sums,
        }
        path = files.join(self.data_dir, SUMMARY_FILE)
        files.write_bytes(path, json.dumps(summary, indent=1).encode())

    def _publish_lengths(self, split):
        """The tokens of every document of a split, in one file; returns its SHA-256."""
        target = files.join(self.data_dir, lengths_file(split))
        with files.atomic_write(target) as unfinished, open(unfinished, "wb") as file:
            for unit in self._units:
                name = tokenizing.lengths_name(unit, split)
                file.write(files.read_bytes(files.join(self._work, name)))
        return files.sha256(target)

    def _post_download_and_prepare_hook(self):
        files.remove_directory(self._work)


def source_directory(data_dir, source):
    """Where a source's shards, lengths and summary are."""
    return files.join(data_dir, Tokens.name, source, str(Tokens.VERSION))


def fingerprint(units, settings):
    """String that changes when the prepared source would."""
    parts = [settings.fingerprint, *(unit.identity for unit in units)]
    return hash_of(parts)


def total_skipped(receipts):
    """Numbers of skipped documents by reason, over all units."""
    total = {}
    for receipt in receipts:
        for reason, count in receipt["skipped"].items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items()))


def _sums(shards, lengths_sha256):
    sums = {
        name: sum(shard[name] for shard in shards)
        for name in ("documents", "tokens", "bytes")
    }
    return {**sums, "lengths_sha256": lengths_sha256, "shards": shards}
