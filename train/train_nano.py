"""Train `open_llama_nano`, the embedded model, from scratch on a CPU.

    python train/fetch_corpus.py                     # once
    python train/train_nano.py                       # into runs/open_llama_nano
    python train/train_nano.py --evaluate            # score presets/open_llama_nano

Makes the tokenizer, trains `OpenLlamaCausalLM` with plain `fit` on arrays of tokens,
and writes a directory in transformers format (weights in float16), with the curve of
the loss, `metrics.jsonl` and `evaluation.json` beside it. It takes about an hour on
two cores. All settings are in `nano.json` beside this file. PyTorch is the backend,
because it has the faster bfloat16 matrix products on CPUs.

How the held-out text is scored: see `bits_per_byte.py`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import sentencepiece
from keras import ops
from matplotlib.figure import Figure
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from bits_per_byte import cross_entropy, evaluate, mean, table  # noqa: E402
from fetch_corpus import DEFAULT_CACHE, DOCUMENT_SEPARATOR, SOURCES  # noqa: E402

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM  # noqa: E402
from keras_openllama.convert import weight_table  # noqa: E402
from keras_openllama.training.tokenizer_training import (  # noqa: E402
    train_sentencepiece,
)

SETTINGS = HERE / "nano.json"
PRESET = HERE.parent / "presets" / "open_llama_nano"
BOS, EOS = 1, 2
PROMPTS = (
    "It was a fine morning, and",
    "The captain looked at the sea and said,",
    "My fellow Americans, the state of our Union",
    "In those days there was a man who",
)


def read_corpus(cache, part):
    """Source name -> text of one part of the corpus, "train" or "heldout"."""
    texts = {}
    for source in SOURCES:
        path = Path(cache) / part / f"{source.name}.txt"
        if not path.is_file():
            sys.exit(f"{path} is missing; run first: python train/fetch_corpus.py")
        texts[source.name] = path.read_bytes().decode()
    return texts


def train_tokenizer(texts, vocabulary_size):
    """SentencePiece BPE with byte fallback that keeps every space.

    Returns:
        The bytes of the model file.
    """
    joined = DOCUMENT_SEPARATOR.join(texts.values())
    return train_sentencepiece(
        joined.replace(DOCUMENT_SEPARATOR, "\n").split("\n"),
        vocabulary_size,
        "v2",
        # As the published tokenizer was trained: its bytes hold these options.
        allow_whitespace_only_pieces=None,
        character_coverage=0.9999,
        max_sentence_length=1 << 20,
    )


def training_windows(texts, tokenizer, repeats, length, count, seed):
    """The whole run's training windows, in the order they are trained on.

    Each pass over the corpus shuffles the documents anew and cuts them, between BOS
    and EOS each, into windows of `length` tokens. Every window begins with a BOS of
    its own, so the model is used to any context that does.

    Args:
        texts: source name -> documents separated by form feeds.
        tokenizer: `SentencePieceProcessor`.
        repeats: source name -> how often a pass goes over it.
        length: int, tokens a window predicts.
        count: int, number of windows.
        seed: int.

    Returns:
        int32 array `(count, length + 1)`.
    """
    random = np.random.default_rng(seed)
    documents = {
        name: [
            np.array([BOS, *ids, EOS], "int32")
            for ids in tokenizer.encode(text.split(DOCUMENT_SEPARATOR))
        ]
        for name, text in texts.items()
    }
    windows = np.zeros((0, length), "int32")
    while len(windows) < count:
        one_pass = []
        for name, times in repeats.items():
            for _ in range(times):
                order = random.permutation(len(documents[name]))
                stream = np.concatenate([documents[name][i] for i in order])
                stream = stream[random.integers(length) :]
                whole = len(stream) // length * length
                one_pass.append(stream[:whole].reshape(-1, length))
        one_pass = random.permutation(np.concatenate(one_pass))
        windows = np.concatenate([windows, one_pass])
    return np.pad(windows[:count], ((0, 0), (1, 0)), constant_values=BOS)


class Trapezoid(keras.optimizers.schedules.LearningRateSchedule):
    """Up to `peak`, level, then from `decay_start` in a straight line to zero."""

    def __init__(self, peak, warmup, decay_start, steps):
        self.peak, self.warmup = peak, warmup
        self.decay_start, self.steps = decay_start, steps

    def __call__(self, step):
        step = ops.cast(step, "float32") + 1
        up = step / self.warmup
        down = (self.steps + 1 - step) / (self.steps + 1 - self.decay_start)
        return self.peak * ops.clip(ops.minimum(up, down), 0.0, 1.0)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup": self.warmup,
            "decay_start": self.decay_start,
            "steps": self.steps,
        }


class Muon(keras.optimizers.Muon):
    """Muon whose orthogonalisation runs in bfloat16, as its authors' does."""

    def zeropower_via_newtonschulz5(self, x, steps):
        y = super().zeropower_via_newtonschulz5(ops.cast(x, "bfloat16"), steps)
        return ops.cast(y, x.dtype)


def make_optimizer(settings):
    """Muon for the matrices inside, AdamW for embeddings, head and norms."""
    return Muon(
        learning_rate=Trapezoid(
            settings["learning_rate"],
            settings["warmup_steps"],
            settings["decay_start"],
            settings["steps"],
        ),
        adam_lr_ratio=settings["adam_learning_rate_ratio"],
        adam_beta_2=settings["adam_beta_2"],
        weight_decay=settings["weight_decay"],
        adam_weight_decay=settings["adam_weight_decay"],
        exclude_layers=["lm_head"],
        global_clipnorm=settings["clip_norm"],
    )


class Progress(keras.callbacks.Callback):
    """Writes `metrics.jsonl`, prints it, and exports the weights now and then."""

    def __init__(self, output, every, save_every, tokens_per_step, save):
        super().__init__()
        self.log = open(output / "metrics.jsonl", "w")
        self.every, self.save_every = every, save_every
        self.tokens_per_step, self.save = tokens_per_step, save
        self.total, self.start = 0.0, time.time()

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if step % self.every == 0:
            # `fit` reports the mean since the beginning.
            total = logs["loss"] * step
            record = {
                "step": step,
                "loss": (total - self.total) / self.every,
                "tokens": step * self.tokens_per_step,
                "seconds": round(time.time() - self.start, 1),
            }
            self.total = total
            rate = record["tokens"] / record["seconds"]
            print(json.dumps(record), f"{rate:.0f} tokens/s", flush=True)
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()
        if step % self.save_every == 0:
            self.save()


def export(lm, settings, tokenizer_proto, folder):
    """Writes a transformers directory with float16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {v.path: v for v in lm.weights}
    tensors = {}
    for row in weight_table.weights(lm.backbone.num_layers):
        value = ops.convert_to_numpy(variables.pop(row.path)).astype("float16")
        value = value.T if row.transposed else value
        tensors[row.transformers] = np.ascontiguousarray(value)
    if variables:
        raise ValueError(f"The weight table lacks {sorted(variables)}")
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    sizes = settings["architecture"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocabulary_size"],
        "hidden_size": sizes["hidden_dim"],
        "intermediate_size": sizes["intermediate_dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_query_heads"],
        "num_key_value_heads": sizes["num_key_value_heads"],
        "head_dim": sizes["head_dim"],
        "max_position_embeddings": sizes["max_sequence_length"],
        "rope_theta": sizes["rope_max_wavelength"],
        "rms_norm_eps": sizes["layer_norm_epsilon"],
        "initializer_range": sizes["initializer_std"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer_proto)


def plot(output):
    """Draws `metrics.jsonl` into `loss.png`."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] / 1e6 for r in records], [r["loss"] for r in records])
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(output / "loss.png", dpi=110)


def train(settings, cache, output):
    """Trains, and exports to `output`."""
    keras.utils.set_random_seed(settings["seed"])
    texts = read_corpus(cache, "train")
    sizes = settings["architecture"]
    proto = train_tokenizer(texts, sizes["vocabulary_size"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    context = sizes["max_sequence_length"]
    steps, batch_size = settings["steps"], settings["batch_size"]
    windows = training_windows(
        texts,
        tokenizer,
        settings["repeats"],
        context,
        steps * batch_size,
        settings["seed"],
    )
    backbone = OpenLlamaBackbone(**sizes, dtype=settings["precision"])
    lm = OpenLlamaCausalLM(backbone)
    print(
        f"{lm.count_params()} parameters, {steps} steps, "
        f"{windows[:, 1:].size / 1e6:.2f}M tokens",
        flush=True,
    )
    lm.compile(
        optimizer=make_optimizer(settings),
        loss=cross_entropy,
        weighted_metrics=[],  # Accuracy would cost another pass over all logits.
        jit_compile=False,
    )
    lm.fit(
        x={
            "token_ids": windows[:, :-1],
            "padding_mask": np.ones(windows[:, 1:].shape, "bool"),
        },
        y=windows[:, 1:],
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[
            Progress(
                output,
                every=settings["log_every"],
                save_every=settings["save_every"],
                tokens_per_step=batch_size * context,
                save=lambda: export(lm, settings, proto, output),
            )
        ],
    )
    export(lm, settings, proto, output)


def score(folder, cache):
    """Prints the held-out table and some continuations; returns the table's rows."""
    lm = OpenLlamaCausalLM.from_preset(str(folder), dtype="float32")
    texts = read_corpus(cache, "heldout")
    rows = evaluate(lm, lm.preprocessor.tokenizer, texts)
    print(table(rows), flush=True)
    for text in lm.generate(list(PROMPTS), max_new_tokens=60):
        print("\n" + text, flush=True)
    return rows


def keep_freed_memory():
    """Starts this process again with an allocator that keeps what is freed.

    glibc gives large blocks back to the system and asks for them again, page by page,
    at every operation: a third of a training step. It reads its settings only once,
    at the start of a process.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
        "MALLOC_ARENA_MAX": "2",
    }
    if not settings.keys() <= os.environ.keys():
        environment = {**settings, **os.environ}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help="folder that fetch_corpus.py wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        default=SETTINGS,
        help="JSON file of the settings (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/open_llama_nano"),
        help="directory to write (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate",
        nargs="?",
        type=Path,
        const=PRESET,
        metavar="DIRECTORY",
        help="train nothing, score a directory (default: %(const)s)",
    )
    options = parser.parse_args(arguments)
    if options.evaluate:
        score(options.evaluate, options.cache)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    train(json.loads(options.settings.read_text()), options.cache, options.output)
    plot(options.output)
    rows = score(options.output, options.cache)
    result = {"bits_per_byte": mean(rows), "held_out": rows}
    (options.output / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    keep_freed_memory()
    main()
