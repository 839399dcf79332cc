"""How many requests a second lm-evaluation-harness gets answered on a CPU.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --contender ours/torch hf/torch --dtype bfloat16

The requests are shaped like HellaSwag's: a text of 15 to 90 words, and four endings of
8 to 30 words, here of random words. Every contender is the same random LLaMA with the
same real tokenizer (that of mistral-common), in a process of its own, and answers
`loglikelihood` of all requests, tokenization included: ours through the adapter
`keras_openllama`, its export through the harness's own `hf`. They go by turns:

    requests/s  median of the rounds
    ratio       to hf on PyTorch, the median of the rounds' ratios

The batch is of rows of 512 tokens here, which requests share, and of requests for hf;
--hf-batch gives hf another one. The default size has 58 million parameters: width 512,
8 layers, 32,000 pieces.
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
    """Instances of the harness: `count` texts with four endings each."""
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
    from lm_eval.api.registry import get_model

    import keras_openllama.evaluation  # noqa: F401

    return get_model("keras_openllama")(
        preset=options.model, dtype=options.dtype, batch_size=options.batch
    )


def hf(options):
    from lm_eval.api.registry import get_model

    batch_size = options.hf_batch or options.batch
    return get_model("hf")(
        pretrained=options.model,
        device="cpu",
        dtype=options.dtype,
        batch_size=batch_size,
    )


def work(contender, options):
    """A worker: answers new requests as often as its standard input says."""
    kind, answers = workers.begin(contender)
    model = globals()[kind](options)
    seed = 0

    def run():
        nonlocal seed
        seed += 1  # Else they would be answered from memory.
        asked = requests(options.questions, seed)
        start = time.perf_counter()
        found = model.loglikelihood(asked, disable_tqdm=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "total": sum(log_prob for log_prob, _ in found)}

    run()  # Compiles, and warms up.
    workers.serve(answers, run)


def compare(options):
    rates = {name: [] for name in options.contender}
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory, "model"))
        make_model(options, model)
        flags = ("--model", model)
        rounds = workers.by_turns(
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
    """Refuses a comparison of contenders that do not compute the same."""
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
    parser.add_argument("--questions", type=int, default=32, help="of a round")
    workers.add_sizes(parser)
    parser.add_argument("--hf-batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work(options.work, options) if options.work else compare(options)


if __name__ == "__main__":
    main()
