"""`keras-openllama generate`: generates text from a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.model_options import add_model_options, load_model
from keras_openllama.cli.paths import require_adapters, require_preset
from keras_openllama.cli.process import choose_backend, quiet_tensorflow

if TYPE_CHECKING:
    from keras_openllama.generation.sampling.config import SamplingConfig

# Sampler -> the options that apply to it. Penalties and the like apply to all.
_RANDOM = ("temperature", "min_p", "seed", "num_samples")
SAMPLERS = {
    "greedy": (),
    "random": _RANDOM,
    "top_k": ("top_k", *_RANDOM),
    "top_p": ("top_p", "top_k", *_RANDOM),
}
PROMPT_LOOKUP = "prompt_lookup"
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.9

DESCRIPTION = """\
Generate text from PROMPT and print it as it is generated.

The default model, open_llama_nano, is part of the package. Other presets are downloaded
from the Hugging Face Hub when they are first used, into the cache that `presets` shows.
"""

EXAMPLES = """\
examples:
  Greedy decoding with the embedded model, the same text every time:
    %(prog)s "The old man looked at the sea, and"

  Random sampling; --seed makes it reproducible:
    %(prog)s "It was a dark night" --top-p 0.9 --temperature 0.8 --seed 1

  Three texts, without many repetitions:
    %(prog)s "It was a dark night" --min-p 0.05 --repetition-penalty 1.1 \\
        --num-samples 3 --seed 1

  Ask a published model, stop at the first new line, and print only the answer:
    %(prog)s $'Q: What is the largest animal?\\nA:' \\
        --preset open_llama_3b_v2 --stop $'\\n' --strip-prompt

  Read the prompt from a file, run on PyTorch in bfloat16, half of the memory:
    %(prog)s - --preset open_llama_7b_v2 --backend torch \\
        --dtype bfloat16 < prompt.txt

  Generate sooner what repeats parts of the prompt, such as an edited text:
    %(prog)s - --preset open_llama_3b_v2 --draft prompt_lookup < edit.txt

  Load your own model from a directory, a training run, or the Hub:
    %(prog)s "Dear Sir," --preset ./my_finetuned_model
    %(prog)s "Dear Sir," --preset runs/nano
    %(prog)s "Dear Sir," --preset hf://user/repo --revision main

  Add LoRA adapters to the model that they were trained on:
    %(prog)s "Dear Sir," --preset 7b_v2 --adapters runs/7b_v2-finetuned/adapters
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the prompt; - reads it from standard input"
    )
    model = parser.add_argument_group("the model")
    add_model_options(model)
    model.add_argument(
        "--kv-cache-dtype",
        choices=("int8",),
        help="round the keys and values of the KV cache to 8 bits, for a quarter of "
        "its memory in float32 (default: that of the model, and 16 bits for quantized "
        "weights)",
    )
    text = parser.add_argument_group("the text")
    text.add_argument(
        "--max-new-tokens",
        type=types.positive_int,
        metavar="N",
        help=f"maximum number of generated tokens (default: {DEFAULT_MAX_NEW_TOKENS}, "
        "or what the context of the model leaves)",
    )
    text.add_argument(
        "--stop",
        type=types.not_empty,
        action="append",
        metavar="TEXT",
        help="stop before this string; may be given several times",
    )
    text.add_argument(
        "--strip-prompt",
        "--no-prompt",
        action="store_true",
        help="print the generated text without the prompt",
    )
    speed = parser.add_argument_group("speculative decoding")
    speed.add_argument(
        "--draft",
        metavar="DRAFT",
        help="propose tokens that the model verifies several at once: prompt_lookup, "
        "for text that repeats parts of the prompt or of itself, or the preset of a "
        "smaller model with the same tokenizer. The text is the same (default: none)",
    )
    speed.add_argument(
        "--draft-stats",
        action="store_true",
        help="print to standard error how many proposed tokens were accepted",
    )
    sampling = parser.add_argument_group(
        "sampling",
        "Greedy decoding, unless --sampler or an option that implies one is given.",
    )
    sampling.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="sample from all tokens (random), the K most likely (top_k), or the most "
        "likely with a total probability of P (top_p). --temperature, --top-k, "
        "--top-p, --min-p, --seed and --num-samples imply a sampler",
    )
    sampling.add_argument(
        "--temperature",
        type=types.temperature,
        metavar="T",
        help="temperature; below 1 favors likely tokens, 0 is greedy decoding "
        "(default: 1)",
    )
    sampling.add_argument(
        "--top-k",
        type=types.positive_int,
        metavar="K",
        help="sample from the K most likely tokens (sampler top_k; default: "
        f"{DEFAULT_TOP_K}); with --top-p, a limit on the tokens that it considers",
    )
    sampling.add_argument(
        "--top-p",
        type=types.probability,
        metavar="P",
        help="sample from the most likely tokens whose total probability is P (sampler "
        f"top_p; default: {DEFAULT_TOP_P})",
    )
    sampling.add_argument(
        "--seed",
        type=types.sampler_seed,
        metavar="N",
        help="random seed, for reproducible text",
    )
    sampling.add_argument(
        "--min-p",
        type=types.share,
        metavar="P",
        help="sample only tokens that are at least P times as probable as the most "
        "likely one",
    )
    sampling.add_argument(
        "--num-samples",
        type=types.positive_int,
        metavar="N",
        help="number of texts, printed when all are complete (default: 1)",
    )
    controls = parser.add_argument_group(
        "controls of single tokens", "They apply to greedy decoding, too."
    )
    controls.add_argument(
        "--repetition-penalty",
        type=types.positive_number,
        default=1.0,
        metavar="X",
        help="above 1, tokens of the prompt and of the new text become less likely "
        "(default: %(default)s)",
    )
    controls.add_argument(
        "--presence-penalty",
        type=types.finite_number,
        default=0.0,
        metavar="X",
        help="subtract X from the logits of tokens of the new text (default: "
        "%(default)s)",
    )
    controls.add_argument(
        "--frequency-penalty",
        type=types.finite_number,
        default=0.0,
        metavar="X",
        help="subtract X from the logit of a token for each time that the new text "
        "contains it (default: %(default)s)",
    )
    controls.add_argument(
        "--logit-bias",
        type=types.logit_bias,
        action="append",
        default=[],
        metavar="ID=VALUE",
        help="add a number to the logit of a token; may be given several times",
    )
    controls.add_argument(
        "--ban",
        type=types.non_negative_int,
        action="append",
        default=[],
        metavar="ID",
        help="never generate this token; may be given several times",
    )
    controls.add_argument(
        "--min-new-tokens",
        type=types.non_negative_int,
        default=0,
        metavar="N",
        help="generate no end token before N new tokens (default: %(default)s)",
    )
    return parser.parse_args(arguments)


@command("generate")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    sampling = sampling_config(options)
    prompt = options.prompt
    if prompt == "-":
        # The new line at the end of a file is not part of the prompt.
        prompt = _read_stdin().removesuffix("\n")
    if not prompt:
        raise ValueError("PROMPT is empty: the model needs text to continue.")
    if options.draft_stats and options.draft is None:
        raise ValueError("--draft-stats needs --draft.")
    require_preset("--preset", options.preset, options.revision)
    require_adapters("--adapters", options.adapters)
    if options.draft not in (None, PROMPT_LOOKUP):
        require_preset("--draft", options.draft)
    choose_backend(options.backend)
    _print_generated(prompt, sampling, options)


def _print_generated(prompt, sampling, options):
    lm = load_model(options)
    lm.compile(kv_cache_dtype=options.kv_cache_dtype)
    draft = _make_draft(options.draft, lm)
    limits = {"max_new_tokens": options.max_new_tokens}
    if options.max_new_tokens is None:
        limits = {
            "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
            "max_length": lm.backbone.context_length,
        }
    arguments = {"stop": options.stop, "sampling": sampling, "draft": draft, **limits}
    shown = "" if options.strip_prompt else prompt
    with quiet_tensorflow():
        from keras_openllama.generation.limits import ContextLengthError
    try:
        if options.num_samples is not None and options.num_samples > 1:
            texts = lm.generate(
                prompt, strip_prompt=True, num_samples=options.num_samples, **arguments
            )
            _print_texts(shown, texts)
        else:
            _print_pieces(shown, lm.stream(prompt, **arguments))
    except ContextLengthError as error:
        raise ValueError(_too_long(error, options)) from error
    if options.draft_stats:
        _print_stats(draft.stats)


def _make_draft(name, lm):
    """Returns the draft of `--draft`, or `None`."""
    with quiet_tensorflow():
        from keras_openllama.generation.drafting import DraftModel, PromptLookup
        from keras_openllama.models.causal_lm import OpenLlamaCausalLM

    if name is None:
        return None
    if name == PROMPT_LOOKUP:
        return PromptLookup()
    dtype = lm.backbone.compute_dtype
    return DraftModel(OpenLlamaCausalLM.from_preset(name, dtype=dtype))


def _print_texts(shown, texts):
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} of {len(texts)} ---\n{shown}{text}", flush=True)


def _print_pieces(shown, pieces):
    print(shown, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _print_stats(stats):
    print(
        f"draft: {stats.accepted} of {stats.proposed} proposed tokens accepted "
        f"({stats.acceptance_rate:.0%}), {stats.tokens_per_step:.2f} tokens per "
        "step of the model",
        file=sys.stderr,
    )


def _read_stdin():
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"The standard input is not UTF-8: {error}") from error


def _too_long(error, options):
    """Describes what exceeds the context of the model, and what to do."""
    context = f"the context of {options.preset}, {error.context} tokens"
    left = error.context - error.prompt_tokens
    if left < 1:
        return (
            f"PROMPT has {error.prompt_tokens} tokens, and {context}, has no room for "
            "more: shorten it."
        )
    return (
        f"PROMPT has {error.prompt_tokens} tokens: --max-new-tokens must be at most "
        f"{left}, since more exceed {context}. Received: {options.max_new_tokens}"
    )


def sampling_config(options: argparse.Namespace) -> SamplingConfig:
    """Returns how tokens are chosen, from the options.

    Args:
        options: the result of `parse_arguments`.

    Returns:
        The configuration.

    Raises:
        ValueError: If an option does not apply to the sampler.

    Example:
        >>> options = parse_arguments(["The sea", "--top-k", "5"], prog="generate")
        >>> sampling_config(options).top_k
        5
    """
    from keras_openllama.generation.sampling.config import SamplingConfig

    name = options.sampler or _implied_sampler(options)
    given = {}
    for option in ("temperature", "top_k", "top_p", "min_p", "seed", "num_samples"):
        value = getattr(options, option)
        if value is None or (option, value) == ("num_samples", 1):
            continue
        if option not in SAMPLERS[name]:
            flag = "--" + option.replace("_", "-")
            raise ValueError(
                f"{flag} {value} does not apply to the sampler {name!r}: remove it, or "
                "choose another sampler with --sampler."
            )
        given[option] = value
    given.pop("num_samples", None)
    defaults = {
        "greedy": {"temperature": 0.0},
        "top_k": {"top_k": DEFAULT_TOP_K},
        "top_p": {"top_p": DEFAULT_TOP_P},
    }
    return SamplingConfig(
        **{**defaults.get(name, {}), **given},
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(options.logit_bias),
        banned_tokens=options.ban,
        min_new_tokens=options.min_new_tokens,
    )


def _implied_sampler(options):
    if options.top_p is not None:
        return "top_p"
    if options.top_k is not None:
        return "top_k"
    implies_random = (options.temperature, options.min_p, options.seed)
    if any(value is not None for value in implies_random):
        return "random"
    return "greedy" if (options.num_samples or 1) == 1 else "random"
