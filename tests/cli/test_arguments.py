"""Types of arguments: what they accept, and what their errors say."""

import argparse

import pytest

from keras_openllama.cli import arguments as types

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("positive_int", "2147483647", 2**31 - 1),
        ("non_negative_int", "0", 0),
        ("run_seed", str(10**20), 10**20),
        ("sampler_seed", str(2**32 - 1), 2**32 - 1),
        ("positive_number", "2e-4", 2e-4),
        ("non_negative_number", "0", 0),
        ("temperature", "0", 0),
        ("probability", "1", 1),
        ("share", "1", 1),
        ("fraction", "0", 0),
        ("not_empty", " ", " "),
        ("number_of_bytes", "1.5k", 1500),
        ("finite_number", "-1e3", -1000),
        ("logit_bias", "13=-2.5", (13, -2.5)),
        ("mesh", "data=2,model=4", {"data": 2, "model": 4}),
    ],
)
def test_types_parse_valid_texts(kind, text, value):
    assert getattr(types, kind)(text) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("positive_int", ("0", "-1", "1.5", "1e3", "nan", "", str(2**31), "9" * 5000)),
        ("non_negative_int", ("-1", "inf", str(2**31))),
        ("run_seed", ("-1", "1.0")),
        ("sampler_seed", ("-1", str(2**32))),
        ("positive_number", ("0", "-1", "nan", "inf", "1e300", "1e-300", "x")),
        ("non_negative_number", ("-1", "nan", "inf", "1e300")),
        ("temperature", ("-1", "nan", "inf")),
        ("probability", ("0", "1.1", "nan")),
        ("share", ("-0.1", "1.1", "nan")),
        ("fraction", ("1", "-0.1", "nan")),
        ("number_of_bytes", ("0", "-1", "x", "1T", "9" * 30)),
        ("finite_number", ("nan", "-inf", "1e300", "x")),
        ("logit_bias", ("13", "=1", "13=", "-1=2", "13=inf", "1.5=2", "1=2=3")),
        ("mesh", ("", "data", "data=0", "rows=2", "data=-1", "data=2;fsdp=2")),
    ],
)
def test_types_reject_other_texts_with_the_value_received(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            getattr(types, kind)(text)
        assert str(error.value).startswith("must be ")
        assert str(error.value).endswith(f"Received: {text!r}")
