"""Requests per second of lm-evaluation-harness on a CPU.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --contender ours/torch hf/torch --dtype bfloat16

The requests are shaped like HellaSwag's: a text of 15 to 90 random words, and four
endings of 8 to 30 words. Every contender is the same random LLaMA with the same real
tokenizer (mistral-common's) in its own process. It computes `loglikelihood` for all
requests, including tokenization: this package through its harness model
`keras_openllama`, and its export through the harness's own `hf`. Rounds alternate
between the contenders:

    requests/s  median of the rounds
    ratio       to hf on PyTorch, the median of the rounds' ratios

A batch is 8 sequences of 512 tokens for this package, which several requests share,
and 8 requests for hf; --hf-batch sets another batch for hf. The default model has 58
million parameters: width 512, 8 layers, vocabulary 32,000.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import workers  # benchmarks/workers.py

import train  # benchmarks/train.py

CONTENDERS = ("ours/jax", "ours/torch", "hf/torch")
REFERENCE = "hf/torch"


def requests(count, seed):
    """Requests of the harness: `count` texts with four endings each."""
    from pydoc_data.topics import topics

    from lm_eval.api.instance import Instance

    generator = random.Random(seed)
    words = sorted({word for text in topics.values() for word in text.split()})

    def sentence(least, most):
        return " ".join(generator.choices(words, k=generator.randint(least, most)))

    pairs = []
    for _ in range(count):
        context = sentence(15, 90)
        pairs += [(context, " " + sentence(8, 30)) for _ in range(4)]
    return [
        Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)
    ]


def make_model(options, directory):
    """Writes the random model in transformers' format."""
    import importlib.resources

    from keras_openllama import (
        OpenLlamaBackbone,
        OpenLlamaCausalLM,
        OpenLlamaCausalLMPreprocessor,
        OpenLlamaTokenizer,
    )

    data = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    preprocessor = OpenLlamaCausalLMPreprocessor(OpenLlamaTokenizer(data.read_bytes()))
    backbone = OpenLlamaBackbone(**train.keras_sizes(options))
    OpenLlamaCausalLM(backbone, preprocessor).export_to_transformers(directory)


def ours(options):
    """The harness model of this package."""
    from lm_eval.api.registry import get_model

    import keras_openllama.evaluation  # noqa: F401

    return get_model("keras_openllama")(
        preset=options.model, dtype=options.dtype, batch_size=options.batch
    )


def hf(options):
    """The harness's own model for transformers."""
    from lm_eval.api.registry import get_model

    batch_size = options.hf_batch or options.batch
    return get_model("hf")(
        pretrained=options.model,
        device="cpu",
        dtype=options.dtype,
        batch_size=batch_size,
    )


def work(contender, options):
    """Runs a worker: answers new requests for each line of standard input."""
    kind, answers = workers.start_worker(contender)
    model = globals()[kind](options)
    seed = 0

    def run():
        nonlocal seed
        seed += 1  # The same requests would be answered from a cache.
        asked = requests(options.questions, seed)
        start = time.perf_counter()
        found = model.loglikelihood(asked, disable_tqdm=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "total": sum(log_prob for log_prob, _ in found)}

    run()  # Compiles, and warms up.
    workers.serve(answers, run)


def compare(options):
    """Measures all contenders and prints the table."""
    rates = {name: [] for name in options.contender}
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory, "model"))
        make_model(options, model)
        flags = ("--model", model)
        rounds = workers.alternate(
            options.contender, options.rounds, *flags, script=__file__
        )
        for found in rounds:
            check_agreement(found, options.dtype)
            for name, result in found.items():
                rates[name].append(4 * options.questions / result["seconds"])
    print(f"{'':14}{'requests/s':>12}{'ratio':>8}")
    for name, values in rates.items():
        ratio = workers.ratio(rates, name, REFERENCE)
        print(f"{name:14}{statistics.median(values):>12.1f}{ratio:>8}")


def check_agreement(found, dtype):
    """Exits if the contenders compute different log-likelihoods."""
    totals = [result["total"] for result in found.values()]
    allowed = (1e-6 if dtype == "float32" else 1e-2) * abs(totals[0])
    if max(totals) - min(totals) > allowed:
        raise SystemExit(f"The contenders do not agree: {found}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=32, help="questions per round")
    workers.add_sizes(parser)
    parser.add_argument("--hf-batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work(options.work, options) if options.work else compare(options)


if __name__ == "__main__":
    main()
