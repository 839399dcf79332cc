"""The command line: `keras-openllama`, or `python -m keras_openllama`.

Keras and its backend take seconds to import, so nothing here imports them before a
command needs them: `--help` and `presets` answer at once, and `--backend` can still
choose.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import warnings

from keras_openllama import __version__

PROGRAM = "keras-openllama"
DEFAULT_PRESET = "open_llama_nano"
# The module that each backend's package is imported as.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
# Each sampler with the options that mean something to it.
SAMPLERS = {
    "greedy": (),
    "random": ("temperature", "seed"),
    "top_k": ("top_k", "temperature", "seed"),
    "top_p": ("top_p", "top_k", "temperature", "seed"),
}
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.9
_TENSORFLOW_REPORT = re.compile(rb"WARNING: All log messages before absl|I\d{4} ")

DESCRIPTION = """\
OpenLLaMA in Keras 3: let a model write, or see which models there are.
"""

EXAMPLES = f"""\
examples:
  {PROGRAM} generate "Once upon a time"
  {PROGRAM} generate "Q: What is the largest animal?" --preset open_llama_3b_v2
  {PROGRAM} presets

`{PROGRAM} COMMAND --help` explains a command.
"""

GENERATE_DESCRIPTION = """\
Continues PROMPT and prints the text as it is written.

The default model, open_llama_nano, comes with the package. Any other preset is
downloaded from the Hugging Face Hub when it is used for the first time, into the
cache that `presets` reports.
"""

GENERATE_EXAMPLES = f"""\
examples:
  The same text every time, from the embedded model:
    {PROGRAM} generate "The old man looked at the sea, and"

  Other words each time, or the same ones again with --seed:
    {PROGRAM} generate "It was a dark night" --top-p 0.9 --temperature 0.8 --seed 1

  A question to a published model, ended by the first new line, without the prompt:
    {PROGRAM} generate $'Q: What is the largest animal?\\nA:' \\
        --preset open_llama_3b_v2 --stop $'\\n' --strip-prompt

  A prompt from a file, on PyTorch in half the memory:
    {PROGRAM} generate - --preset open_llama_7b_v2 --backend torch \\
        --dtype bfloat16 < prompt.txt

  Your own model, from a directory or from the Hub:
    {PROGRAM} generate "Dear Sir," --preset ./my_finetuned_model
    {PROGRAM} generate "Dear Sir," --preset hf://user/repo --revision main
"""

PRESETS_DESCRIPTION = """\
Lists the models that have a name, with the size of their weights in float16 and what
of them is in the local cache of the Hugging Face Hub (HF_HOME or HF_HUB_CACHE move it).
"""


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: list of strings, the words after the program's name; those of the
            process when left out.

    Returns:
        int, the exit code: 0 when all went well, 2 for an error that the user can
        put right, which is then one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain about the
        # same pipe once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser():
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from, for a bug report",
    )
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES, **raw
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description=GENERATE_DESCRIPTION,
        epilog=GENERATE_EXAMPLES,
        parents=[common],
        **raw,
    )
    generate.set_defaults(command=_generate)
    _add_generate_arguments(generate)

    presets = commands.add_parser(
        "presets",
        help="list the models and what is in the local cache",
        description=PRESETS_DESCRIPTION,
        parents=[common],
        **raw,
    )
    presets.set_defaults(command=_presets)
    presets.add_argument("--json", action="store_true", help="print JSON, not a table")
    return parser


def _add_generate_arguments(parser):
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
    model.add_argument(
        "--backend",
        choices=BACKENDS,
        help="what Keras computes with (KERAS_BACKEND, or else jax)",
    )
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


def _generate(options):
    sampler = sampler_config(options)
    prompt = options.prompt
    if prompt == "-":
        # The new line that ends a file is not meant as the prompt's last token.
        prompt = sys.stdin.read().removesuffix("\n")
    _choose_backend(options.backend)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _write(prompt, sampler, options)
    return 0


def _write(prompt, sampler, options):
    with _quiet_tensorflow():
        from keras_openllama import OpenLlamaCausalLM
        from keras_openllama._keras_hub import get_sampler

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


def _choose_backend(name):
    """Sets Keras's backend, before anything has imported Keras."""
    name = name or os.environ.get("KERAS_BACKEND") or "jax"
    if name in BACKENDS and importlib.util.find_spec(BACKENDS[name]) is None:
        extra = "[torch]" if name == "torch" else ""
        raise ValueError(
            f"The backend {name!r} is not installed: "
            f"pip install 'keras-openllama{extra}' brings it."
        )
    if "keras" in sys.modules and sys.modules["keras"].config.backend() != name:
        raise ValueError(
            f"--backend {name} comes too late: this process has imported Keras with "
            f"{sys.modules['keras'].config.backend()!r} already."
        )
    os.environ["KERAS_BACKEND"] = name
    # TensorFlow and XLA report what they do on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _quiet_tensorflow():
    """Drops what TensorFlow's C++ code reports of itself when it is imported.

    Setting TF_CPP_MIN_LOG_LEVEL does not reach the messages that it writes before its
    logging is set up. Everything else on stderr is passed on after the import.
    """
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if not _TENSORFLOW_REPORT.match(line):
                    os.write(2, line)


def _presets(options):
    from keras_openllama import _preset_list

    rows = _preset_list.preset_rows()
    print(json.dumps(rows, indent=2) if options.json else _preset_list.as_table(rows))
    return 0


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


def _one_line(message):
    return " ".join(str(message).split())


def _show_warning(message, category, filename, lineno, file=None, line=None):
    """Shows a warning as the program's own line, without the place in the source."""
    print(f"{PROGRAM}: {_one_line(message)}", file=file or sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
