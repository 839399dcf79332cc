"""`keras-openllama generate`: continues a prompt."""

import argparse
import math
import sys
import warnings

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.process import (
    add_backend,
    choose_backend,
    quiet_tensorflow,
    show_warning,
)

DEFAULT_PRESET = "open_llama_nano"
# Each sampler with the options that mean something to it.
SAMPLERS = {
    "greedy": (),
    "random": ("temperature", "seed"),
    "top_k": ("top_k", "temperature", "seed"),
    "top_p": ("top_p", "top_k", "temperature", "seed"),
}
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.9

DESCRIPTION = """\
Continues PROMPT and prints the text as it is written.

The default model, open_llama_nano, comes with the package. Any other preset is
downloaded from the Hugging Face Hub when it is used for the first time, into the
cache that `presets` reports.
"""

EXAMPLES = """\
examples:
  The same text every time, from the embedded model:
    %(prog)s "The old man looked at the sea, and"

  Other words each time, or the same ones again with --seed:
    %(prog)s "It was a dark night" --top-p 0.9 --temperature 0.8 --seed 1

  A question to a published model, ended by the first new line, without the prompt:
    %(prog)s $'Q: What is the largest animal?\\nA:' \\
        --preset open_llama_3b_v2 --stop $'\\n' --strip-prompt

  A prompt from a file, on PyTorch in half the memory:
    %(prog)s - --preset open_llama_7b_v2 --backend torch \\
        --dtype bfloat16 < prompt.txt

  Your own model, from a directory, a pretraining run, or the Hub:
    %(prog)s "Dear Sir," --preset ./my_finetuned_model
    %(prog)s "Dear Sir," --preset runs/nano
    %(prog)s "Dear Sir," --preset hf://user/repo --revision main
"""


def parse_arguments(arguments, prog):
    """The options of the command line."""
    parser = CommandParser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the text to continue; - reads standard input"
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        help="a name from `presets`, a directory, or hf://user/repo (%(default)s)",
    )
    model.add_argument(
        "--revision", help="the branch, tag or commit to download from the Hub"
    )
    add_backend(model)
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what the weights are held in (float32). bfloat16 halves the memory",
    )
    text = parser.add_argument_group("the text")
    text.add_argument(
        "--max-new-tokens",
        type=_positive_int,
        default=128,
        metavar="N",
        help="write at most N tokens (%(default)s)",
    )
    text.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    text.add_argument(
        "--strip-prompt",
        "--no-prompt",
        action="store_true",
        help="print the new text only, not the prompt before it",
    )
    sampling = parser.add_argument_group(
        "how the next token is chosen",
        "Always the likeliest one (greedy), unless one of these is given.",
    )
    sampling.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="from all tokens (random), the K likeliest (top_k), or the likeliest that "
        "together reach probability P (top_p). The options below imply theirs",
    )
    sampling.add_argument(
        "--temperature",
        type=_positive_float,
        metavar="T",
        help="below 1 the likely tokens become likelier, above 1 less so (1)",
    )
    sampling.add_argument(
        "--top-k",
        type=_positive_int,
        metavar="K",
        help=f"implies top_k ({DEFAULT_TOP_K})",
    )
    sampling.add_argument(
        "--top-p",
        type=_probability,
        metavar="P",
        help=f"implies top_p ({DEFAULT_TOP_P})",
    )
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="makes the same choices again"
    )
    return parser.parse_args(arguments)


@command("generate")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    sampler = sampler_config(options)
    prompt = options.prompt
    if prompt == "-":
        # The new line that ends a file is not meant as the prompt's last token.
        prompt = sys.stdin.read().removesuffix("\n")
    choose_backend(options.backend)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        _write(prompt, sampler, options)


def _write(prompt, sampler, options):
    with quiet_tensorflow():
        from keras_openllama.backend.keras_hub import get_sampler
        from keras_openllama.models.causal_lm import OpenLlamaCausalLM

    lm = OpenLlamaCausalLM.from_preset(
        options.preset, dtype=options.dtype, revision=options.revision
    )
    lm.compile(sampler=get_sampler(sampler))
    pieces = lm.stream(prompt, max_new_tokens=options.max_new_tokens, stop=options.stop)
    if not options.strip_prompt:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def sampler_config(options):
    """Makes the configuration of a KerasHub sampler from the sampling options.

    Args:
        options: a namespace with `sampler`, `temperature`, `top_k`, `top_p` and
            `seed`, each `None` when it was not given.

    Returns:
        dict, as `keras_hub.samplers.get` takes it.

    Raises:
        ValueError: if an option was given that the chosen sampler has no use for.
    """
    name = options.sampler or _implied_sampler(options)
    config = {}
    if name == "top_k":
        config["k"] = DEFAULT_TOP_K
    if name == "top_p":
        config["p"] = DEFAULT_TOP_P
    for option in ("temperature", "top_k", "top_p", "seed"):
        value = getattr(options, option)
        if value is None:
            continue
        if option not in SAMPLERS[name]:
            flag = "--" + option.replace("_", "-")
            raise ValueError(
                f"{flag} {value} means nothing to the sampler {name!r}: leave it out, "
                "or choose another sampler with --sampler."
            )
        config[option.removeprefix("top_")] = value
    return {"class_name": name, "config": config}


def _implied_sampler(options):
    if options.top_p is not None:
        return "top_p"
    if options.top_k is not None:
        return "top_k"
    if options.temperature is not None or options.seed is not None:
        return "random"
    return "greedy"


def _number(kind, admits, what):
    """Makes an argparse type that says what it expects, not which function failed."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not admits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


_positive_int = _number(int, lambda value: value >= 1, "a whole number of 1 or more")
_positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
_probability = _number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
