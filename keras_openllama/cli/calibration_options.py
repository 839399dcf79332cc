"""Flags of `convert` for rounding by GPTQ, and the conversion with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from keras_openllama.cli.arguments import positive_int
from keras_openllama.cli.paths import require_texts

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

# `--quantization` -> bits, and inputs that share a scale (-1: all of an output).
_FORMATS = {"int4": (4, 32), "int8": (8, -1), "q4_0": (4, 32), "q8_0": (8, 32)}
_SEQUENCES, _LENGTH = 128, 512


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, for `check_calibration` and `convert_calibrated`."""
    group = parser.add_argument_group("rounding by GPTQ")
    group.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        metavar="TEXTS",
        help="choose the rounding by what layers compute on these texts: files .txt, "
        "files .jsonl with the key 'text', directories of .txt, prepared datasets. "
        f"Needs --quantization {', '.join(_FORMATS)}, and memory for the whole model",
    )
    group.add_argument(
        "--calibration-sequences",
        type=positive_int,
        metavar="N",
        help="number of sequences, evenly spaced over the texts (default: "
        f"{_SEQUENCES})",
    )
    group.add_argument(
        "--calibration-length",
        type=positive_int,
        metavar="TOKENS",
        help=f"tokens of a sequence (default: {_LENGTH}, or the model's context)",
    )


def check_calibration(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    """Rejects flags that contradict each other, and texts that cannot be read."""
    if options.calibration is None:
        for name in ("sequences", "length"):
            if getattr(options, f"calibration_{name}") is not None:
                parser.error(f"--calibration-{name} needs --calibration")
        return
    if options.quantization not in _FORMATS:
        parser.error(
            f"--calibration needs --quantization {', '.join(_FORMATS)}. Received: "
            f"--quantization {options.quantization}"
        )
    if options.preset is not None:
        parser.error(
            "--calibration needs a SOURCE that has a tokenizer: convert the file of "
            "EasyLM with --to transformers first"
        )
    require_texts("--calibration", options.calibration)


def convert_calibrated(options: argparse.Namespace) -> None:
    """Loads the model, quantizes it by GPTQ and writes it.

    Args:
        options: Those of `convert`, whose target has been checked.

    Raises:
        ValueError: If the model has no tokenizer, or the texts are too few.
        OSError: If a file cannot be read or written.
    """
    from keras_openllama.checkpoints.model_files import foreign_content
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM
    from keras_openllama.utils.staging import staged

    lm = OpenLlamaCausalLM.from_preset(
        options.source,
        dtype=options.dtype,
        quantization=None,
        revision=options.revision,
    )
    _quantize(lm, options)
    if options.to == "gguf":
        lm.export_to_gguf(
            options.target,
            options.quantization,
            tokenizer=not options.no_tokenizer,
            force=options.force,
        )
        return
    saved = lm.backbone if options.no_tokenizer else lm
    with staged(
        options.target, force=options.force, foreign_content=foreign_content
    ) as directory:
        saved.save_to_preset(str(directory))


def _quantize(lm: OpenLlamaCausalLM, options: argparse.Namespace) -> None:
    import keras

    from keras_openllama.evaluation.texts import read_texts

    if lm.preprocessor is None:
        raise ValueError(
            f"--calibration needs a tokenizer, and {options.source} has none."
        )
    documents = [
        document if isinstance(document, str) else document.tokens
        for texts in read_texts(options.calibration, lm).values()
        for document in texts
    ]
    bits, group_size = _FORMATS[options.quantization]
    length = options.calibration_length or min(_LENGTH, lm.backbone.context_length)
    lm.quantize(
        config=keras.quantizers.GPTQConfig(
            dataset=documents,
            tokenizer=lm.preprocessor.tokenizer,
            weight_bits=bits,
            group_size=group_size,
            symmetric=True,
            num_samples=options.calibration_sequences or _SEQUENCES,
            sequence_length=length,
        )
    )
