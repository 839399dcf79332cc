import dataclasses
from pydoc_data.topics import topics

import pytest

from keras_openllama.data.tokenizer_report import (
    chart,
    installed_tokenizers,
    report,
    table,
)
from keras_openllama.data.tokenizer_training import sample, train_sentencepiece

pytestmark = pytest.mark.backend_free

TEXT = [line for topic in topics.values() for line in topic.split("\n")]
V1, V2 = (train_sentencepiece(TEXT, 600, style) for style in ("v1", "v2"))


def held_out(*texts):
    """The sample of a source that holds out these texts."""
    [kept] = sample({"source": ["what is trained on"]}).values()
    return dataclasses.replace(kept, held_out=[text.encode() for text in texts])


# A digit is a token, so is each byte of what the tokenizers have not seen, and so is
# the space that SentencePiece puts before a text.
SAMPLES = {"digits": held_out("7", "78"), "llamas": held_out("🦙🦙")}


def test_bytes_per_token_are_those_counted_by_hand():
    numbers = report(SAMPLES, {"new": V2})
    assert numbers["held_out"] == {
        "digits": {"documents": 2, "bytes": 3},
        "llamas": {"documents": 1, "bytes": 8},
    }
    new = numbers["tokenizers"]["new"]
    assert new["bytes_per_token"] == {"digits": 3 / (2 + 3), "llamas": 8 / 9}
    assert new["overall"] == (3 + 8) / (5 + 9)
    assert new["pieces"] == 600 and new["keeps_spaces"]


def test_the_table_is_aligned_and_marks_who_merges_spaces():
    said = table(report(SAMPLES, {"new": V2, "merging": V1})).splitlines()
    assert said == [
        "bytes per token  held out   new  merging *",
        "digits            0.00 MB  0.60       0.60",
        "llamas            0.00 MB  0.89       0.89",
        "all sources                0.79       0.79",
        "pieces                      600        600",
        "* merges runs of spaces: its tokens do not give the whole text back.",
    ]
    assert "*" not in table(report(SAMPLES, {"new": V2}))


def test_a_source_that_holds_nothing_out_is_left_out():
    samples = {**sample({"single": ["one document"]}), "digits": SAMPLES["digits"]}
    assert [*report(samples, {"new": V2})["held_out"]] == ["digits"]
    del samples["digits"]
    numbers = report(samples, {"new": V2})
    assert numbers["tokenizers"]["new"]["overall"] is None
    assert "0.00" not in table(numbers)
    assert chart(numbers).startswith(b"\x89PNG")


def test_the_chart_is_a_png():
    png = chart(report(SAMPLES, {"new": V2, "merging": V1}))
    assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82")


def test_nano_is_always_at_hand():
    known = installed_tokenizers()
    assert report(SAMPLES, known)["tokenizers"]["open_llama_nano"]["pieces"] == 3072


def test_a_tokenizer_of_more_pieces_needs_fewer_tokens_on_what_it_knows():
    samples = sample({"reference": topics.values()})
    large = train_sentencepiece(TEXT, 3000, "v2")
    measured = report(samples, {"small": V2, "large": large})["tokenizers"]
    assert measured["large"]["overall"] > 1.3 * measured["small"]["overall"]
