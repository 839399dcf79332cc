"""Speed of tokenization and of loading batches.

    python benchmarks/data.py [tokenize load seek memory] [--rounds 5]

tokenize  MB/s on one core, for a vocabulary of 32,000 (mistral-common's) and text of
          stand_in_mixture.py: tokenization into shards and to ids, from the first word
          of a new process on; SentencePiece alone; and the fast tokenizers with the
          same vocabulary, of the library tokenizers and of transformers.
load      Tokens per second from prepared data, in one process and with Grain workers.
seek      Seconds to open an index of 100 million synthetic documents and find the
          sequences of step 200,000.
memory    Resident memory while batches are read.

The figures are medians. The contenders of a comparison alternate within one run.
"""

import argparse
import importlib.resources
import json
import logging
import os
import statistics
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import stand_in_mixture
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tqdm import tqdm

from keras_openllama.data import document_reader, shuffling, text_sources, tokenizing
from keras_openllama.data.document_encoder import DocumentEncoder
from keras_openllama.data.mixture import Interleaving, load_mixture
from keras_openllama.data.sequence_index import BestFitIndex, ConcatenatedIndex
from keras_openllama.data.token_stream import TokenStream

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One core, as for the others.

logging.getLogger("keras_openllama").setLevel(
    logging.ERROR
)  # Hides messages about the end of epochs.
LENGTH, BATCH, STEP = 2048, 2048, 200_000  # Sequences of the 7B recipe, near its end.
DOCUMENTS = 100_000_000
TEXT_BYTES = 4 << 20  # Text of each source that a round tokenizes.


def specs():
    """Paths of the stand-in mixture, by source."""
    built = stand_in_mixture.build(stand_in_mixture.DEFAULT_CACHE)
    return {
        name: [str(p) for p in (paths if isinstance(paths, list) else [paths])]
        for name, paths in built.items()
    }


def large_model():
    """Bytes of a real SentencePiece model with 32,000 pieces that preserves spaces."""
    data = importlib.resources.files("mistral_common") / "data"
    return (data / "tokenizer.model.v1").read_bytes()


def alternate(candidates, rounds):
    """Median seconds of each function of a dict; rounds alternate between them."""
    seconds = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), disable=None, leave=False):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def sample():
    """Documents with the first megabytes of each source of the stand-in mixture."""
    texts = []
    for name, paths in specs().items():
        taken = 0
        for unit in text_sources.find_units(name, paths):
            for text in document_reader.read_documents(unit):
                if taken < TEXT_BYTES and not isinstance(text, document_reader.Skipped):
                    texts.append(text)
                    taken += len(text)
    return texts


def tokenize(rounds):
    """Prints MB/s of tokenization."""
    texts = sample()
    proto = large_model()
    compare_tokenizers("a model that keeps spaces", proto, texts, rounds)
    model = ModelProto.FromString(proto)
    model.normalizer_spec.remove_extra_whitespaces = True
    proto = model.SerializeToString()
    compare_tokenizers("the same merging spaces", proto, texts, rounds)


def compare_tokenizers(title, proto, texts, rounds):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from keras_openllama.checkpoints import tokenizer_json

    processor = tokenizing.cached_processor(proto)
    rust = Tokenizer.from_str(
        tokenizer_json.build_tokenizer_json(proto, add_start_token=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=rust)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        [unit] = text_sources.find_units("text", [str(path)])
        settings = tokenizing.TokenizationSettings(proto)

        def shards():
            tokenizing.cached_encoder.cache_clear()  # As in a new process.
            tokenizing.tokenize_unit(unit, settings, folder)

        def ids():
            encoder = DocumentEncoder(proto)
            for text in texts:
                encoder.encode(text)

        def in_batches(encode):
            # One call for all texts would hold all results.
            for start in range(0, len(texts), 64):
                encode(texts[start : start + 64], add_special_tokens=False)

        seconds = alternate(
            {
                "ours, shards written": shards,
                "ours, ids": ids,
                "SentencePiece": lambda: processor.encode(texts, num_threads=1),
                "tokenizers": lambda: in_batches(rust.encode_batch_fast),
                "transformers, fast": lambda: in_batches(fast),
            },
            rounds,
        )
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"tokenizing {size:.1f} MB on one core, {title}")
    print("                             MB/s   shards are   ids are")
    of_shards, of_ids = seconds["ours, shards written"], seconds["ours, ids"]
    for name, value in seconds.items():
        ratios = f"{value / of_shards:>10.2f} x {value / of_ids:>8.2f} x"
        print(f"    {name:<21}{size / value:>8.2f} {ratios}")


def prepared(folder):
    """Prepares the stand-in mixture with the tokenizer of nano."""
    from keras_openllama.data.preparation import prepare_dataset

    return prepare_dataset(
        specs(), "open_llama_nano", folder, "v2", report=lambda line: None
    )


def load_batches(rounds):
    """Prints tokens/s of reading batches."""
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(folder)
        print(f"loading, batches of 32 sequences of {LENGTH} tokens")
        for packing in ("concatenate", "best_fit"):
            stream = TokenStream(data, LENGTH, 32, packing=packing)
            seconds = []
            for step in range(0, 50 * rounds, 50):
                start = time.perf_counter()
                for k in range(step, step + 50):
                    stream.batch(k)
                seconds.append(time.perf_counter() - start)
            rate = 50 * 32 * LENGTH / statistics.median(seconds)
            print(f"    {packing:<14}{rate / 1e6:>8.1f}M tokens/s, one process")
            workers = os.cpu_count()
            reading_ = iter(stream.dataset(workers=workers, prefetch=8))
            for _ in range(50):  # Processes start.
                next(reading_)
            start = time.perf_counter()
            for _ in range(400):
                next(reading_)
            rate = 400 * 32 * LENGTH / (time.perf_counter() - start)
            print(f"    {packing:<14}{rate / 1e6:>8.1f}M tokens/s, {workers} workers")


def seek(rounds):
    """Prints seconds from opening an index to the sequences of a late step."""
    del rounds  # Only the first time counts.
    names = load_mixture("v2").names
    weights = load_mixture("v2").weights_at(0)
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        paths = {}
        for name in names:  # The documents of a source in proportion to its weight.
            count = int(DOCUMENTS * weights[name])
            lengths = random.lognormal(6.2, 1.1, count).clip(3, 200_000)
            paths[name] = Path(folder, name)
            lengths.astype("<u4").tofile(paths[name])
        size = sum(path.stat().st_size for path in paths.values())
        print(
            f"seeking step {STEP:,} of {BATCH} sequences over {DOCUMENTS:,} documents; "
            f"index {size / 1e6:.0f} MB, {size / DOCUMENTS:.1f} bytes per document"
        )
        for packing in (ConcatenatedIndex, BestFitIndex):
            for attempt in (
                ("first", "again") if packing is BestFitIndex else ("first",)
            ):
                start = time.perf_counter()
                rows = []
                for name in names:
                    documents = types.SimpleNamespace(
                        lengths=np.memmap(paths[name], "<u4", "r")
                    )
                    key = shuffling.make_key(0, name, "train")
                    cache = f"{paths[name]}.rows"
                    extra = {} if packing is ConcatenatedIndex else {"cache": cache}
                    rows.append(packing(documents, LENGTH, key, **extra))
                interleaving = Interleaving([(0, weights)], names)
                numbers = zip(
                    *interleaving.sequences(STEP * BATCH, (STEP + 1) * BATCH),
                    strict=True,
                )
                for source, number in numbers:
                    rows[source].spans(int(number))
                seconds = time.perf_counter() - start
                print(f"    {packing.__name__:<14}{attempt:<7}{seconds:>8.2f} s")


def memory(rounds):
    """Prints resident memory after every 1,000 batches."""
    with tempfile.TemporaryDirectory() as folder:
        stream = TokenStream(prepared(folder), LENGTH, 32, packing="best_fit")
        print("resident memory while reading, 1,000 batches of 32 sequences each")
        for step in range(0, 1000 * rounds + 1, 1000):
            status = Path("/proc/self/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
            print(f"    after {step:>6,} batches{resident:>9.1f} MB")
            for k in range(step, step + 1000):
                stream.batch(k)


BENCHMARKS = {
    "tokenize": tokenize,
    "load": load_batches,
    "seek": seek,
    "memory": memory,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", metavar="|".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in options.which or BENCHMARKS:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is none of {', '.join(BENCHMARKS)}")
        BENCHMARKS[name](options.rounds)


if __name__ == "__main__":
    main()
