"""`convert --calibration` quantizes as `lm.quantize` with a `GPTQConfig` does."""

import keras
import numpy as np
import pytest

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.__main__ import main

pytestmark = pytest.mark.backend_free

TEXTS = ["It was a bright cold day in April. " * 3, "The sea shines. " * 8]
SIZES = ("--calibration-sequences", "4", "--calibration-length", "16")


@pytest.fixture
def texts(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return tmp_path


def projections(lm):
    return {
        weight.path: np.asarray(weight.value)
        for weight in lm.backbone.transformer_layers[0].weights
    }


def test_convert_calibration_writes_what_quantize_with_gptq_makes(texts, capsys):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.quantize(
        config=keras.quantizers.GPTQConfig(
            dataset=TEXTS,
            tokenizer=lm.preprocessor.tokenizer,
            weight_bits=4,
            group_size=32,
            symmetric=True,
            num_samples=4,
            sequence_length=16,
        )
    )
    expected = projections(lm)
    for name, to, quantization in (("out", "keras", "int4"), ("x", "gguf", "q4_0")):
        target = str(texts / (name if to == "keras" else f"{name}.gguf"))
        arguments = ("convert", "nano", target, "--to", to)
        flags = ("--quantization", quantization, "--calibration", str(texts), *SIZES)
        assert main([*arguments, *flags]) == 0
        assert target in capsys.readouterr().out
        found = projections(OpenLlamaCausalLM.from_preset(target))
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            assert np.array_equal(found[path], array), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--quantization", "q5_0"], "--calibration needs --quant"),
        (["--to", "gguf"], "--calibration needs --quantization int4"),
        (
            ["--to", "keras", "--quantization", "int4", "--preset", "nano"],
            "has a tokenizer",
        ),
    ],
)
def test_convert_calibration_explains_what_it_needs(arguments, message, texts, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "nano", "out", *arguments, "--calibration", str(texts)])
    assert message in capsys.readouterr().err


def test_convert_calibration_names_a_missing_file(capsys):
    arguments = ["--to", "keras", "--quantization", "int8"]
    arguments += ["--calibration", "missing.txt"]
    assert main(["convert", "nano", "out", *arguments]) == 2
    assert "missing.txt does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--calibration-sequences", "--calibration-length"])
def test_convert_refuses_the_sizes_of_a_calibration_without_texts(flag, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "nano", "out", "--to", "keras", flag, "4"])
    assert f"{flag} needs --calibration" in capsys.readouterr().err
