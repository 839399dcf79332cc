"""A look inside prepared data: the table, batches in words, the picture, the script."""

import re

import numpy as np
import pytest
from token_data import prepare_sources

from keras_openllama.cli.inspect_data import main
from keras_openllama.data import inspection
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.text.sentencepiece_model import load_processor

pytestmark = pytest.mark.backend_free

WEIGHTS = {"web": 3, "code": 1, "books": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inspection")
    return prepare_sources(directory, {"web": 300, "code": 40}, WEIGHTS)


def test_the_table_says_what_there_is_and_what_is_missing(data):
    text = inspection.table(data)
    sums = data.split("web", "train")
    [line] = re.findall(r"^web +train .*$", text, re.MULTILINE)
    assert f"{sums['documents']:,}" in line
    assert f"{sums['tokens']:,}" in line
    assert "75.00%" in line
    assert "web: skipped nothing" in text
    assert "not prepared, though in the mixture: books" in text


def test_a_batch_is_told_with_its_borders_and_sources(data):
    stream = TokenStream(data, 100, 6, packing="best_fit")
    processor = load_processor(data.proto(), "the data")
    text = inspection.describe_batch(stream, 2, processor, characters=20)
    for row, (source, spans) in enumerate(stream.sequences_read(2)):
        assert f"row {row}: {source}, " in text
        for document, first, size in spans:
            assert f"document {document}, tokens {first} to {first + size - 1}:" in text
    whole = [
        span for _, spans in stream.sequences_read(2) for span in spans if span[1] == 0
    ]
    assert text.count("<s> ") == len(whole)
    assert "more]" in text
    padding = [101 - sum(s for *_, s in spans) for _, spans in stream.sequences_read(2)]
    assert text.count("tokens of padding") == sum(p > 0 for p in padding)


def test_the_realised_mixture_is_counted_in_tokens(data):
    stream = TokenStream(data, 64, 16)
    shares = inspection.realised_mixture(stream, first=5, steps=50)
    assert shares == pytest.approx({"web": 0.75, "code": 0.25}, abs=2e-3)


def test_documents_are_counted_by_length(data):
    documents = data.documents("web")
    edges = np.array([1, 10, 20, 30])
    counts = inspection.length_histogram(documents, edges)
    lengths = np.minimum(np.array(documents.lengths), 30)
    assert counts.sum() == len(documents)
    assert counts[0] == (lengths < 10).sum()


def test_the_script_prints_and_draws(data, tmp_path, capsys):
    picture = tmp_path / "look.png"
    main(
        [
            *(data.directory, f"--picture={picture}", "--sequence-length=64"),
            *("--step=3", "--step=4", "--sampled-steps=20", "--mask-documents"),
        ]
    )
    printed = capsys.readouterr().out
    assert "step 3: 4 rows of 64 tokens" in printed
    assert "step 4: 4 rows of 64 tokens" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_the_script_verifies_and_refuses(data, tmp_path, capsys):
    assert main([data.directory, "--verify"]) == 0
    assert "files are as they were prepared" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert re.match(r"keras-openllama inspect-data: error: .* has no manifest", said)
