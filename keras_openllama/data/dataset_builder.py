"""Tokenized documents as a dataset of TensorFlow Datasets."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from keras_openllama.data import beam_pipeline, token_records, tokenizing
from keras_openllama.data.prepared_data import lengths_file_name
from keras_openllama.data.text_sources import Unit, hash_of
from keras_openllama.utils import files

UNFINISHED = "unfinished"
# Summary of a source, in addition to the files of TensorFlow Datasets.
SUMMARY_FILE = "source.json"


class TokenDatasetBuilder(FileReaderBuilder):
    """TFDS builder of the token ids of one source. The source is the builder's config.

    `download_and_prepare` tokenizes the unfinished units with a Beam pipeline, and then
    publishes the shards. TensorFlow Datasets alone can read the result:
    `tfds.builder_from_directory(...).as_data_source("train")`.

    Args:
        units: all units of the source.
        settings: tokenizer and filters.
        data_dir: directory of the whole dataset.
        workers: see `beam_pipeline.tokenize_units`.
        beam_flags: see `beam_pipeline.tokenize_units`.
    """

    name = "tokens"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        units: Sequence[Unit],
        settings: tokenizing.TokenizationSettings,
        data_dir: str,
        workers: int | None = None,
        beam_flags: list[str] | None = None,
    ):
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

    def prepare(self) -> None:
        """Prepares all unfinished units and publishes the source."""
        self.download_and_prepare(download_dir=files.join(self._work, "downloads"))

    def _log_download_bytes(self):
        """Logs nothing: there is no download."""

    _log_download_done = _log_download_bytes

    def _info(self):
        size = tokenizing.cached_processor(self._settings.proto).vocab_size()
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
            if tokenizing.read_unit_summary(unit, self._work) is None
        ]
        if missing:
            beam_pipeline.tokenize_units(
                missing, self._settings, self._work, self._workers, self._beam_flags
            )
        summaries = [
            tokenizing.read_unit_summary(unit, self._work) for unit in self._units
        ]
        if None in summaries:
            unit = self._units[summaries.index(None)]
            raise RuntimeError(
                f"{unit.label} is not finished although the pipeline has ended. The "
                "input may have changed, or another process may have removed files. "
                "Run the same command again."
            )
        self._check_skipped(summaries)
        self._publish(summaries)

    def _check_skipped(self, summaries):
        skipped = total_skipped(summaries)
        documents = sum(
            summary["splits"][split]["documents"]
            for summary in summaries
            for split in tokenizing.SPLITS
        )
        tokenizing.check_skipped(
            f"Source {self._source!r}",
            documents + sum(skipped.values()),
            skipped,
            self._settings.max_skipped,
        )

    def _publish(self, summaries):
        """Copies the shards to the paths of TensorFlow Datasets.

        The originals stay until everything is copied, so an interruption loses nothing.
        """
        splits, sums = [], {}
        for split in tokenizing.SPLITS:
            template = self._get_filename_template(split_name=split)
            paths = template.sharded_filepaths(len(summaries))
            shards = []
            for unit, summary, path in zip(self._units, summaries, paths, strict=True):
                name = tokenizing.shard_name(unit, split)
                files.copy_file(files.join(self._work, name), str(path))
                shards.append({"file": path.name, **summary["splits"][split]})
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
            "fingerprint": source_fingerprint(self._units, self._settings),
            "inputs": [summary["input"] for summary in summaries],
            "skipped": total_skipped(summaries),
            "splits": sums,
        }
        path = files.join(self.data_dir, SUMMARY_FILE)
        files.write_bytes(path, json.dumps(summary, indent=1).encode())

    def _publish_lengths(self, split):
        """Writes the token counts of a split to one file; returns its SHA-256."""
        target = files.join(self.data_dir, lengths_file_name(split))
        with files.atomic_write(target) as unfinished, open(unfinished, "wb") as file:
            for unit in self._units:
                name = tokenizing.lengths_name(unit, split)
                file.write(files.read_bytes(files.join(self._work, name)))
        return files.sha256(target)

    def _post_download_and_prepare_hook(self):
        files.remove_directory(self._work)


def source_directory(data_dir: str, source: str) -> str:
    """Directory of a source's shards, lengths and summary."""
    builder = TokenDatasetBuilder
    return files.join(data_dir, builder.name, source, str(builder.VERSION))


def source_fingerprint(
    units: Sequence[Unit], settings: tokenizing.TokenizationSettings
) -> str:
    """Hash that changes if the prepared source would change."""
    parts = [settings.fingerprint, *(unit.identity for unit in units)]
    return hash_of(parts)


def total_skipped(summaries: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Sums the numbers of skipped documents by reason over all units.

    Example:
        >>> total_skipped([{"skipped": {"empty": 1}}, {"skipped": {"empty": 2}}])
        {'empty': 3}
    """
    total = {}
    for summary in summaries:
        for reason, count in summary["skipped"].items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items()))


def _sums(shards, lengths_sha256):
    sums = {
        name: sum(shard[name] for shard in shards)
        for name in ("documents", "tokens", "bytes")
    }
    return {**sums, "lengths_sha256": lengths_sha256, "shards": shards}
