"""Inspection of prepared data: table, decoded batches, plot and command."""

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


def test_format_manifest_lists_sources_and_missing_sources(data):
    text = inspection.format_manifest(data)
    sums = data.split_info("web", "train")
    [line] = re.findall(r"^web +train .*$", text, re.MULTILINE)
    assert f"{sums['documents']:,}" in line
    assert f"{sums['tokens']:,}" in line
    assert "75.00%" in line
    assert "web: skipped nothing" in text
    assert "in the mixture but not prepared: books" in text


def test_describe_batch_shows_sources_and_document_boundaries(data):
    stream = TokenStream(data, 100, 6, packing="best_fit")
    processor = load_processor(data.tokenizer_proto(), "the data")
    text = inspection.describe_batch(stream, 2, processor, characters=20)
    for number, (source, spans) in enumerate(stream.sequences_read(2)):
        assert f"sequence {number}: {source}, " in text
        for document, first, size in spans:
            assert f"document {document}, tokens {first} to {first + size - 1}:" in text
    from_the_start = [
        span for _, spans in stream.sequences_read(2) for span in spans if span[1] == 0
    ]
    assert text.count("<s> ") == len(from_the_start)
    assert "more]" in text
    padding = [101 - sum(s for *_, s in spans) for _, spans in stream.sequences_read(2)]
    assert text.count("tokens of padding") == sum(p > 0 for p in padding)


def test_measure_mixture_returns_shares_of_the_tokens(data):
    stream = TokenStream(data, 64, 16)
    shares = inspection.measure_mixture(stream, first=5, steps=50)
    assert shares == pytest.approx({"web": 0.75, "code": 0.25}, abs=2e-3)


def test_length_histogram_counts_documents_by_length(data):
    documents = data.documents("web")
    edges = np.array([1, 10, 20, 30])
    counts = inspection.length_histogram(documents, edges)
    lengths = np.minimum(np.array(documents.lengths), 30)
    assert counts.sum() == len(documents)
    assert counts[0] == (lengths < 10).sum()


def test_inspect_data_prints_batches_and_draws_a_plot(data, tmp_path, capsys):
    picture = tmp_path / "overview.png"
    main(
        [
            *(data.directory, f"--picture={picture}", "--sequence-length=64"),
            *("--step=3", "--step=4", "--sampled-steps=20", "--mask-documents"),
        ]
    )
    printed = capsys.readouterr().out
    assert "step 3: 4 sequences of 64 tokens" in printed
    assert "step 4: 4 sequences of 64 tokens" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("flag", ["--batch-size", "--rows"])
def test_inspect_data_prints_a_batch_of_the_size(flag, data, tmp_path, capsys):
    picture = f"--picture={tmp_path / 'overview.png'}"
    main([data.directory, picture, "--sequence-length=64", flag, "2"])
    captured = capsys.readouterr()
    assert "step 0: 2 sequences of 64 tokens" in captured.out
    assert ("--rows was renamed to --batch-size" in captured.err) == (flag == "--rows")


def test_inspect_data_verifies_files_and_rejects_other_directories(
    data, tmp_path, capsys
):
    assert main([data.directory, "--verify"]) == 0
    assert "files are correct." in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.match(r"keras-openllama inspect-data: error: .* has no manifest", error)
