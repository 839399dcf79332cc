"""Each token is scored once, and both protocols match their definition."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from keras import ops
from tensorflow_marks import first_on_tensorflow
from tiny_models import TinyShape, in_transformers, random_lm
from token_data import prepare_sources, texts
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.evaluation import perplexity
from keras_openllama.evaluation.perplexity import (
    evaluate_perplexity,
    mean_bits_per_byte,
    perplexity_table,
)
from keras_openllama.evaluation.perplexity_protocols import (
    TokenizedDocument,
    llama_cpp_windows,
    strided_windows,
)
from keras_openllama.evaluation.texts import read_texts

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = TinyShape("tiny", 2, 1, 16, hidden_dim=32, intermediate_dim=48, context=32)
TEXT = "The  quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 4
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def lm():
    return random_lm(SHAPE, trained_model(keep_spaces=True))


@pytest.fixture(scope="module")
def nano():
    return OpenLlamaCausalLM.from_preset("open_llama_nano")


def token_losses(lm, ids):
    """Loss of each token after the first, in nats, from a single forward pass."""
    token_ids = np.zeros((1, SHAPE.context), "int32")  # The causal mask hides padding.
    token_ids[0, : len(ids) - 1] = ids[:-1]
    mask = np.ones_like(token_ids, "bool")
    logits = ops.convert_to_numpy(
        lm.logits_function(token_ids=token_ids, padding_mask=mask)
    )[0]
    log_probs = logits - np.log(np.exp(logits.astype("float64")).sum(-1, keepdims=True))
    return -log_probs[np.arange(len(ids) - 1), ids[1:]]


# --- Strided ---


@pytest.mark.slow_on_tensorflow
def test_strided_perplexity_of_a_short_text_matches_score(nano):
    text = "The captain looked at the sea and said nothing."
    [row] = evaluate_perplexity(nano, {"text": text}, **QUIET)
    losses = ops.convert_to_numpy(nano.score(text, scoring_mode="loss"))
    assert row["tokens"] == losses.size
    assert row["nats"] == pytest.approx(losses.sum(), rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    bits = losses.sum() / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-4)


@pytest.mark.parametrize("context, stride", [(32, None), (20, 20), (17, 3)])
@pytest.mark.slow_on_tensorflow
def test_strided_perplexity_of_a_long_text_sums_over_windows(lm, context, stride):
    ids = [1, *lm.preprocessor.tokenizer(TEXT)]
    expected = 0.0
    for start, first, last in strided_windows(len(ids) - 1, context, stride or 16):
        expected += token_losses(lm, ids[start : last + 1])[first - start - 1 :].sum()
    [row] = evaluate_perplexity(
        lm, {"text": TEXT}, context=context, stride=stride, **QUIET
    )
    assert row["tokens"] == len(ids) - 1 > 3 * 32
    assert row["nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.backend_free
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_strided_windows_score_each_token_once(stride):
    for count in (1, 7, 8, 9, 12, 13, 100):
        windows = strided_windows(count, 8, stride)
        scored = [i for w in windows for i in range(w.first, w.last + 1)]
        assert scored == list(range(1, count + 1))
        for start, first, last in windows:
            assert 0 <= start < first
            assert last <= start + 8
            assert start == 0 or first - start > 8 - stride


@pytest.mark.slow_on_tensorflow
def test_perplexity_of_a_large_corpus_is_computed_in_parts(lm, monkeypatch):
    [expected] = evaluate_perplexity(lm, {"text": TEXT}, **QUIET)
    monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", 64)
    [parts] = evaluate_perplexity(lm, {"text": TEXT}, **QUIET)
    assert parts["nats"] == pytest.approx(expected["nats"], rel=1e-5)
    assert parts["tokens"] == expected["tokens"]


# --- llama.cpp ---


@first_on_tensorflow("context", [16, 9])
def test_llama_cpp_perplexity_matches_logits_of_transformers(context, tmp_path):
    theirs = in_transformers(SHAPE)
    theirs.resize_token_embeddings(512, mean_resizing=False)
    theirs.save_pretrained(tmp_path)
    lm = OpenLlamaCausalLM.from_preset(str(tmp_path), preprocessor=None)
    lm.preprocessor = random_lm(SHAPE, trained_model(keep_spaces=True)).preprocessor
    # As `perplexity` in llama.cpp's tools/perplexity/perplexity.cpp computes it.
    tokens = [1, *lm.preprocessor.tokenizer(TEXT.removesuffix("\n"))]
    nats, count, expected = 0.0, 0, []
    for i in range(len(tokens) // context):
        chunk = torch.tensor([1, *tokens[i * context + 1 : (i + 1) * context]])
        with torch.no_grad():
            log_probs = theirs(chunk[None]).logits[0].double().log_softmax(-1)
        for j in range(context // 2, context - 1):
            nats, count = nats - log_probs[j, chunk[j + 1]].item(), count + 1
        expected.append(math.exp(nats / count))
    [row] = evaluate_perplexity(
        lm, {"text": TEXT}, "llama.cpp", context=context, **QUIET
    )
    assert row["tokens"] == count
    assert row["cumulative"] == pytest.approx(expected, rel=1e-5)
    assert row["perplexity"] == row["cumulative"][-1]
    assert row["bits_per_byte"] is None
    assert "–" in perplexity_table([row])


@pytest.mark.backend_free
def test_llama_cpp_windows_are_disjoint_and_drop_the_remainder():
    assert llama_cpp_windows(22, 8) == [(0, 5, 7), (8, 13, 15)]
    assert llama_cpp_windows(23, 8)[-1] == (16, 21, 23)
    assert llama_cpp_windows(17, 7) == [(0, 4, 6), (7, 11, 13)]


@pytest.mark.backend_free
def test_llama_cpp_protocol_requires_one_text_of_two_chunks(lm):
    with pytest.raises(ValueError, match="requires 64, two chunks"):
        evaluate_perplexity(lm, {"text": "Short."}, "llama.cpp")
    with pytest.raises(ValueError, match="'lines' has 2 documents"):
        evaluate_perplexity(lm, {"lines": [TEXT, TEXT]}, "llama.cpp")
    with pytest.raises(ValueError, match="'ids' has 1 document of token ids"):
        evaluate_perplexity(lm, {"ids": ([5, 6], 2)}, "llama.cpp")
    with pytest.raises(ValueError, match="stride=8"):
        evaluate_perplexity(lm, {"text": TEXT}, "llama.cpp", stride=8)


# --- Results ---


@pytest.mark.slow_on_tensorflow
def test_each_document_has_its_own_start_token(lm):
    rows = evaluate_perplexity(
        lm, {"a": "One text.", "b": "Another.", "both": [TEXT, ""]}, **QUIET
    )
    a, b, both, total = rows
    assert [row["name"] for row in rows] == ["a", "b", "both", "total"]
    assert both["documents"] == 2
    for key in ("bytes", "tokens", "nats", "documents"):
        assert total[key] == pytest.approx(a[key] + b[key] + both[key])
    together = evaluate_perplexity(lm, {"x": ["One text.", "Another."]}, **QUIET)[0]
    assert together["nats"] == pytest.approx(a["nats"] + b["nats"], rel=1e-5)
    assert total["perplexity"] == pytest.approx(
        math.exp(total["nats"] / total["tokens"])
    )
    mean = sum(row["bits_per_byte"] for row in rows[:-1]) / 3
    assert mean_bits_per_byte(rows) == pytest.approx(mean)
    assert json.loads(json.dumps(rows)) == rows
    lines = perplexity_table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == "a b both total mean".split()
    assert f"{a['xz_bits_per_byte']:.3f}" in lines[1]


@pytest.mark.parametrize("kind", [tuple, TokenizedDocument._make])
@pytest.mark.slow_on_tensorflow
def test_a_source_may_be_a_single_tokenized_document(lm, kind):
    ids = lm.preprocessor.tokenizer("One text.")
    pair = kind((np.array(ids, "int32"), np.int64(9)))
    expected, found, listed = (
        evaluate_perplexity(lm, {"x": source}, **QUIET)[0]
        for source in ("One text.", pair, [pair])
    )
    assert found["bytes"] == 9
    for key in ("documents", "bytes", "tokens", "nats", "bits_per_byte"):
        assert found[key] == listed[key] == expected[key]
    assert found["xz_bits_per_byte"] is None
    assert json.loads(json.dumps(found)) == found


def test_mean_bits_per_byte_of_rows_without_a_total():
    rows = [
        {"name": name, "bits_per_byte": bits} for name, bits in [("a", 1), ("b", 2)]
    ]
    assert mean_bits_per_byte(rows) == 1.5


@pytest.mark.slow_on_tensorflow
@pytest.mark.filterwarnings("ignore:This tokenizer merges runs of spaces")
def test_bits_per_byte_use_the_bytes_of_the_original_text(lm):
    merging = random_lm(SHAPE, trained_model(keep_spaces=False))
    text = "a  b   c    d " * 8
    for model in (lm, merging):
        [row] = evaluate_perplexity(model, {"text": text}, **QUIET)
        assert row["bytes"] == len(text)
        bits = row["nats"] / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits / len(text))


def test_evaluate_perplexity_rejects_non_finite_log_probabilities():
    lm = random_lm(SHAPE, trained_model(keep_spaces=True))
    [kernel] = lm.lm_head.weights
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match="tokens of 'text' are not finite"):
        evaluate_perplexity(lm, {"text": "One text."}, **QUIET)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"protocol": "windows"},
            "'strided', 'llama.cpp'. Received: protocol='windows'",
        ),
        (
            {"context": 33},
            "`context` must be an integer from 1 to 32. Received: context=33",
        ),
        ({"context": 2.5}, "`context` must be an integer"),
        ({"sources": {"x": [[5, 6]]}}, r"`sources\['x'\]` must be a text, a pair"),
        ({"sources": {"x": ([5, 6], 0)}}, "number of bytes=0"),
        ({"sources": {"a": TEXT, "total": TEXT}}, "Received: a, total"),
        ({"stride": 33}, "`stride` must be an integer from 1 to 32"),
        ({"context": 8, "stride": 9}, "`stride` must be an integer from 1 to 8"),
        (
            {"context": 2, "protocol": "llama.cpp"},
            "`context` must be an integer from 3 to 32",
        ),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sources": {}}, "`sources` must not be empty"),
        ({"sources": {"empty": ""}}, "'empty' has no tokens"),
    ],
)
def test_evaluate_perplexity_rejects_invalid_arguments(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(lm, **{"sources": {"text": TEXT}} | arguments)


# --- Reading ---


@pytest.mark.slow_on_tensorflow
def test_perplexity_of_prepared_data_matches_its_texts(tmp_path, lm):
    options = {"validation_fraction": 0.2}
    prepare_sources(tmp_path, {"web": 40, "code": 20}, **options)
    sources = read_texts([tmp_path / "data"], lm)
    assert [*sources] == ["web", "code"]
    sizes = sorted(size for _, size in sources["web"])
    held_out = [
        text
        for text in texts("web", 40)
        if any(
            lm.preprocessor.tokenizer(text) == list(ids) for ids, _ in sources["web"]
        )
    ]
    assert sorted(map(len, held_out)) == sizes
    prepared, as_text = (
        evaluate_perplexity(lm, {"web": documents}, **QUIET)[0]
        for documents in (sources["web"], held_out)
    )
    for key in ("documents", "bytes", "tokens"):
        assert prepared[key] == as_text[key]
    assert prepared["nats"] == pytest.approx(as_text["nats"], rel=1e-5)
    assert prepared["xz_bits_per_byte"] is None


@pytest.mark.backend_free
def test_read_texts_rejects_data_of_another_tokenizer_or_without_validation_split(
    tmp_path, lm
):
    prepare_sources(tmp_path, {"web": 10}, validation_fraction=0)
    with pytest.raises(ValueError, match=r"data has no validation documents"):
        read_texts([tmp_path / "data"], lm)
    other = random_lm(SHAPE, trained_model(keep_spaces=False))
    with pytest.raises(ValueError, match="another tokenizer"):
        read_texts([tmp_path / "data"], other)
    shutil.rmtree(tmp_path / "data")


@pytest.mark.backend_free
def test_read_texts_reads_files_and_directories(tmp_path, lm):
    Path(tmp_path, "b.txt").write_text("Bé.\n", "utf-8")
    Path(tmp_path, "a.txt").write_text("A.")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "One\\nline.", "id": 1}\n\n{"text": ""}\n')
    assert read_texts([tmp_path, lines], lm) == {
        "a": ["A."],
        "b": ["Bé.\n"],
        "lines": ["One\nline.", ""],
    }


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 3\). Convert"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "y"}\n', "a.jsonl, line 2 must be"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1 must be"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl has no text in any line"),
        ("a.csv", b"x", r"a.csv must end in .txt or .jsonl. Received: '.csv'"),
    ],
)
def test_read_texts_names_invalid_files(tmp_path, lm, name, content, message):
    Path(tmp_path, name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts([tmp_path / name], lm)


@pytest.mark.backend_free
def test_read_texts_names_invalid_paths(tmp_path, lm):
    with pytest.raises(ValueError, match=r"has no .txt files and is not a prepared"):
        read_texts([tmp_path], lm)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_texts([tmp_path / "absent"], lm)
    for folder in ("x", "y"):
        Path(tmp_path, folder).mkdir()
        Path(tmp_path, folder, "same.txt").write_text("Text.")
    with pytest.raises(ValueError, match="second source named 'same'"):
        read_texts([tmp_path / "x", tmp_path / "y"], lm)
