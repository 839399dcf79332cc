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
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

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
    kind, backend = contender.split("/")
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    model = globals()[kind](options)
    seed = 0

    def run():
        nonlocal seed
        seed += 1  # Else they would be answered from memory.
        asked = requests(options.questions, seed)
        start = time.perf_counter()
        answers = model.loglikelihood(asked, disable_tqdm=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "first": answers[0][0]}

    run()  # Compiles, and warms up.
    print("ready", file=answer, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answer, flush=True)


def compare(options):
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as directory:
        options.model = str(Path(directory, "model"))
        make_model(options, options.model)
        flags = ("--model", options.model)
        workers = [
            train.Worker(name, *flags, script=__file__)
            for name in tqdm(options.contender, "start")
        ]
        rates = {worker.name: [] for worker in workers}
        for number in tqdm(range(options.rounds), "rounds"):
            found = {}
            # In another order each time: whoever is first has the coolest machine.
            for i in range(len(workers)):
                worker = workers[(i + number) % len(workers)]
                found[worker.name] = worker.measure()
            for name, result in found.items():
                rates[name].append(4 * options.questions / result["seconds"])
            check_agreement(found, options.dtype)
        for worker in workers:
            worker.close()
    print(f"{'':14}{'requests/s':>12}{'ratio':>8}")
    for name, values in rates.items():
        ratio = ""
        if REFERENCE in rates:
            pairs = zip(values, rates[REFERENCE], strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
        print(f"{name:14}{statistics.median(values):>12.1f}{ratio:>8}")


def check_agreement(found, dtype):
    """Refuses a comparison of contenders that do not compute the same."""
    first = [result["first"] for result in found.values()]
    allowed = 1e-3 if dtype == "float32" else 1e-2 * abs(first[0])
    if max(first) - min(first) > allowed:
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
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hf-batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work(options.work, options) if options.work else compare(options)


if __name__ == "__main__":
    main()
