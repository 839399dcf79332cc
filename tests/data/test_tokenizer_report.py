import dataclasses
from pydoc_data.topics import topics

import pytest

from keras_openllama.data.tokenizer_report import (
    draw_chart,
    format_table,
    installed_tokenizers,
    measure_tokenizers,
)
from keras_openllama.data.tokenizer_training import (
    sample_documents,
    train_sentencepiece,
)

pytestmark = pytest.mark.backend_free

TEXT = [line for topic in topics.values() for line in topic.split("\n")]
V1, V2 = (train_sentencepiece(TEXT, 600, style) for style in ("v1", "v2"))


def held_out(*texts):
    """The sample of a source that holds out these texts."""
    [sample] = sample_documents({"source": ["training text"]}).values()
    return dataclasses.replace(sample, held_out=[text.encode() for text in texts])


# A digit is a token, and so are each byte of an unknown character and the space that
# SentencePiece puts before a text.
SAMPLES = {"digits": held_out("7", "78"), "llamas": held_out("🦙🦙")}


def test_measure_tokenizers_counts_bytes_per_token():
    numbers = measure_tokenizers(SAMPLES, {"new": V2})
    assert numbers["held_out"] == {
        "digits": {"documents": 2, "bytes": 3},
        "llamas": {"documents": 1, "bytes": 8},
    }
    new = numbers["tokenizers"]["new"]
    assert new["bytes_per_token"] == {"digits": 3 / (2 + 3), "llamas": 8 / 9}
    assert new["overall"] == (3 + 8) / (5 + 9)
    assert new["pieces"] == 600 and new["keeps_spaces"]


def test_format_table_aligns_columns_and_marks_lossy_tokenizers():
    text = format_table(
        measure_tokenizers(SAMPLES, {"new": V2, "merging": V1})
    ).splitlines()
    assert text == [
        "bytes per token  held out   new  merging *",
        "digits            0.00 MB  0.60       0.60",
        "llamas            0.00 MB  0.89       0.89",
        "all sources                0.79       0.79",
        "pieces                      600        600",
        "* merges runs of spaces, so detokenization loses them.",
    ]
    assert "*" not in format_table(measure_tokenizers(SAMPLES, {"new": V2}))


def test_measure_tokenizers_ignores_sources_without_held_out_text():
    samples = {
        **sample_documents({"single": ["one document"]}),
        "digits": SAMPLES["digits"],
    }
    assert [*measure_tokenizers(samples, {"new": V2})["held_out"]] == ["digits"]
    del samples["digits"]
    numbers = measure_tokenizers(samples, {"new": V2})
    assert numbers["tokenizers"]["new"]["overall"] is None
    assert "0.00" not in format_table(numbers)
    assert draw_chart(numbers).startswith(b"\x89PNG")


def test_draw_chart_returns_a_png():
    png = draw_chart(measure_tokenizers(SAMPLES, {"new": V2, "merging": V1}))
    assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82")


def test_installed_tokenizers_include_nano():
    known = installed_tokenizers()
    assert (
        measure_tokenizers(SAMPLES, known)["tokenizers"]["open_llama_nano"]["pieces"]
        == 3072
    )


def test_measure_tokenizers_favors_a_larger_vocabulary_on_its_own_text():
    samples = sample_documents({"reference": topics.values()})
    large = train_sentencepiece(TEXT, 3000, "v2")
    measured = measure_tokenizers(samples, {"small": V2, "large": large})["tokenizers"]
    assert measured["large"]["overall"] > 1.3 * measured["small"]["overall"]
