import collections
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from checkout import ROOT

from keras_openllama.cli.arguments import number_of_bytes
from keras_openllama.cli.train_tokenizer import main
from keras_openllama.data.document_reader import EMPTY, NOT_JSON, Skipped
from keras_openllama.data.text_sources import SourceError
from keras_openllama.data.tokenizer_training import (
    format_vocabulary,
    sample_documents,
    train_sentencepiece,
    training_lines,
)
from keras_openllama.models.tokenizer import OpenLlamaTokenizer

pytestmark = pytest.mark.backend_free

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXT = [line for topic in topics.values() for line in topic.split("\n")]

V1 = OpenLlamaTokenizer(train_sentencepiece(TEXT, 600, "v1"))
V2 = OpenLlamaTokenizer(train_sentencepiece(TEXT, 600, "v2"))
V1._warned_of_lost_spaces = True

both = pytest.mark.parametrize("tokenizer", [V1, V2], ids=["v1", "v2"])


# --- Trained models ---


@both
def test_train_sentencepiece_uses_the_ids_of_llama(tokenizer):
    assert tokenizer.vocabulary_size() == 600
    vocabulary = tokenizer.get_vocabulary()
    assert vocabulary[:3] == ["<unk>", "<s>", "</s>"]
    assert vocabulary[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert tokenizer.token_to_id("<0x0A>") == 13
    assert tokenizer.processor.pad_id() == -1
    special = (tokenizer.unk_token_id, tokenizer.start_token_id, tokenizer.end_token_id)
    assert special == (0, 1, 2)


TEXTS = ["a  b", "  if x:\n\treturn 1\n\n", "trailing   ", "naïve 日本語 🦙", "\r\n x"]


@pytest.mark.parametrize("text", TEXTS)
def test_v2_tokenizer_is_lossless(text):
    assert V2.keeps_spaces
    assert V2.detokenize(V2(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_v1_tokenizer_merges_spaces_and_loses_nothing_else(text):
    assert not V1.keeps_spaces
    merged = " ".join(part for part in text.split(" ") if part)
    assert V1.detokenize(V1(text)) == merged


def test_v2_tokenizer_has_pieces_of_several_spaces():
    assert V2.id_to_token(V2("    x")[0]) in ("▁▁▁▁", "▁▁▁▁▁")
    assert not any("▁▁" in piece for piece in V1.get_vocabulary())


@both
def test_train_sentencepiece_splits_newlines_and_digits(tokenizer):
    assert tokenizer("\n\n")[-2:] == [13, 13]
    digits = [tokenizer.id_to_token(i) for i in tokenizer("12345")]
    assert digits[-5:] == ["1", "2", "3", "4", "5"]


@both
def test_train_sentencepiece_does_not_normalize_text(tokenizer):
    for text in ("ﬁ ½ Å", "e\u0301", "ＡＢ", "a\u00a0b"):
        assert tokenizer.detokenize(tokenizer(text)) == text


def test_format_vocabulary_equals_the_vocab_file_of_sentencepiece(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(tmp_path / "m"),
        vocab_size=500,
        model_type="bpe",
        minloglevel=2,
    )
    listed = format_vocabulary((tmp_path / "m.model").read_bytes())
    assert listed == (tmp_path / "m.vocab").read_text()


def test_train_sentencepiece_accepts_words_of_any_length():
    script = """
        from keras_openllama.data.tokenizer_training import train_sentencepiece
        words = ["x" * 70_000, " " * 70_000, "é" * 70_000, "▁ " * 40_000]
        lines = words + [word.encode() for word in words]
        train_sentencepiece([*lines, "plain words"] * 3, 280, "v2")
        print("done")
    """
    # SentencePiece would abort the process.
    result = subprocess.run(
        [sys.executable, "-c", "if True:" + script],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "done", result.stderr


def test_train_sentencepiece_uses_long_lines():
    long = " ".join(["zyzzyva"] * 300_000)
    pieces = OpenLlamaTokenizer(train_sentencepiece([long], 275, "v2")).get_vocabulary()
    assert "▁zyzzyva" in pieces


def test_train_sentencepiece_accepts_options_of_sentencepiece():
    proto = train_sentencepiece(TEXT, 600, "v2", split_digits=False, unk_piece="<?>")
    assert OpenLlamaTokenizer(proto).id_to_token(0) == "<?>"


# --- Determinism ---


def pieces_of(proto):
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(processor.vocab_size())
    ]


def test_train_sentencepiece_is_deterministic():
    assert train_sentencepiece(TEXT, 600, "v2") == V2.proto
    as_bytes = [line.encode() for line in TEXT]
    assert train_sentencepiece(as_bytes, 600, "v2") == V2.proto


def test_train_sentencepiece_does_not_depend_on_the_number_of_cores():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(cores)])
        assert train_sentencepiece(TEXT, 600, "v2") == V2.proto
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_train_sentencepiece_pieces_do_not_depend_on_num_threads(threads):
    proto = train_sentencepiece(TEXT, 600, "v2", num_threads=threads)
    assert pieces_of(proto) == pieces_of(V2.proto)


def specs_of(proto):
    """The fields of a model after its pieces, which describe its training."""
    position = 0
    while proto[position] == 0x0A:  # A piece.
        position += 2 + proto[position + 1]
    return proto[position:]


def test_nano_tokenizer_has_the_training_options_of_its_preset():
    published = (ROOT / "presets/open_llama_nano/tokenizer.model").read_bytes()
    preset = json.loads((ROOT / "presets/open_llama_nano.json").read_text())
    options = preset["provenance"]["tokenizer_options"]
    lines = "\n".join(topics.values()).split("\n")
    assert specs_of(train_sentencepiece(lines, **options)) == specs_of(published)


# --- Invalid arguments ---


def test_train_sentencepiece_error_states_the_largest_vocabulary():
    with pytest.raises(ValueError, match=r"vocabulary_size=50000") as error:
        train_sentencepiece(TEXT[:200], 50_000, "v2")
    [largest] = [int(word) for word in str(error.value).split() if word.isdigit()]
    assert len(pieces_of(train_sentencepiece(TEXT[:200], largest, "v2"))) == largest
    with pytest.raises(ValueError, match=f"{largest} is the maximum"):
        train_sentencepiece(TEXT[:200], largest + 1, "v2")


def test_train_sentencepiece_error_states_the_smallest_vocabulary():
    with pytest.raises(ValueError, match=r"vocabulary_size=261") as error:
        train_sentencepiece(["abc def"] * 9, 261, "v2")
    assert "at least 266" in str(error.value)  # ▁ and six letters.
    train_sentencepiece(["abc def"] * 9, 266, "v2")


@pytest.mark.parametrize("size", [-1, 0, 259])
def test_train_sentencepiece_rejects_a_vocabulary_without_room_for_text(size):
    with pytest.raises(ValueError, match=f"above 259.*vocabulary_size={size}$"):
        train_sentencepiece(TEXT, size, "v2")


@pytest.mark.parametrize("lines", [[], ["", ""]])
def test_train_sentencepiece_rejects_empty_text(lines):
    with pytest.raises(ValueError, match="There is no text to train on"):
        train_sentencepiece(lines, 300, "v2")


def test_train_sentencepiece_rejects_an_unknown_style():
    with pytest.raises(ValueError, match=r"one of v1, v2\. Received: style='v3'"):
        train_sentencepiece(TEXT, 600, "v3")


def test_train_sentencepiece_rejects_an_unknown_option():
    with pytest.raises((OSError, ValueError), match="no_such_option"):
        train_sentencepiece(TEXT, 600, "v2", no_such_option=1)


# --- The sample ---


def documents(name, count, size=100):
    """Different texts of `size` bytes."""
    return [f"{name} {number} ".ljust(size, ".") for number in range(count)]


def all_of(sample):
    return sample.held_out + sample.training


def test_sample_documents_samples_sources_by_weight():
    texts = {name: documents(name, 1000) for name in ("web", "code", "books")}
    samples = sample_documents(
        texts, {"web": 6, "code": 3, "books": 1}, max_bytes=50_000
    )
    sizes = {name: sum(map(len, all_of(sample))) for name, sample in samples.items()}
    assert sizes == {"books": 5000, "code": 15_000, "web": 30_000}
    assert {name: sample.share for name, sample in samples.items()} == sizes


def test_sample_documents_without_weights_samples_sources_evenly():
    samples = sample_documents(
        {"b": documents("b", 99), "a": documents("a", 99)}, None, 8000
    )
    assert [len(all_of(sample)) for sample in samples.values()] == [40, 40]


def test_sample_documents_takes_all_of_a_source_smaller_than_its_share():
    texts = documents("web", 10)
    sample = sample_documents({"web": texts}, max_bytes=10**6)["web"]
    assert sorted(all_of(sample)) == sorted(text.encode() for text in texts)
    assert (sample.documents, sample.num_bytes, sample.share) == (10, 1000, 10**6)


def test_sample_documents_is_uniform():
    texts = documents("web", 40)
    times = collections.Counter()
    for seed in range(1000):
        times.update(all_of(sample_documents({"web": texts}, None, 1000, seed)["web"]))
    # 10 of 40: each 250 times on average, with a standard deviation of 14.
    assert len(times) == 40 and sum(times.values()) == 10_000
    assert 250 - 5 * 14 < min(times.values()) <= max(times.values()) < 250 + 5 * 14


def varied(count):
    return [f"{number} " + "x" * (number * 37 % 400) for number in range(count)]


def test_sample_documents_does_not_depend_on_the_order_of_documents():
    texts = varied(300)
    expected = sample_documents({"web": texts, "code": texts}, max_bytes=9000, seed=3)
    for order in (texts[::-1], texts[150:] + texts[:150], sorted(texts)):
        assert (
            sample_documents({"code": order, "web": order}, None, 9000, 3) == expected
        )
    assert list(training_lines(expected)) == [
        *expected["code"].training,
        *expected["web"].training,
    ]


def test_sample_documents_depends_on_the_seed():
    texts = {"web": varied(300)}
    first, second = (
        sample_documents(texts, None, 9000, seed)["web"] for seed in (0, 1)
    )
    assert {*all_of(first)} != {*all_of(second)}


def test_sample_documents_stops_at_the_document_that_fills_the_share():
    for max_bytes in (1, 5000, 20_000):
        sample = all_of(sample_documents({"web": varied(300)}, None, max_bytes)["web"])
        size = sum(map(len, sample))
        assert max_bytes <= size < max_bytes + 404


def test_sample_documents_never_holds_out_training_text():
    texts = documents("web", 500) * 3
    sample = sample_documents({"web": texts}, max_bytes=10**6)["web"]
    assert len(sample.held_out) == 10  # One in 50.
    assert len(sample.training) == 490
    assert not {*sample.held_out} & {*sample.training}
    assert (sample.documents, sample.num_bytes) == (1500, 150_000)
    once, thrice = (
        sample_documents({"web": t}, None, 9999)["web"] for t in (texts[:500], texts)
    )
    assert all_of(once) == all_of(thrice)


@pytest.mark.parametrize("count, held_out", [(1, 0), (2, 1), (50, 1), (51, 2)])
def test_sample_documents_of_few_documents_has_training_text(count, held_out):
    sample = sample_documents({"web": documents("web", count)})["web"]
    assert (len(sample.held_out), len(sample.training)) == (held_out, count - held_out)


def test_training_lines_have_no_line_ends():
    assert list(training_lines(sample_documents({"web": ["a\n\n  b\r\nc\n"]}))) == [
        *(b"a", b"", b"  b\r", b"c", b"")
    ]


def test_sample_documents_counts_skipped_documents_by_reason():
    texts = [*documents("web", 300), Skipped(EMPTY), Skipped(NOT_JSON), Skipped(EMPTY)]
    sample = sample_documents({"web": texts})["web"]
    assert sample.skipped == {EMPTY: 2, NOT_JSON: 1}
    assert sample.documents == 300


def test_sample_documents_rejects_too_many_damaged_documents():
    texts = [*documents("web", 97), *[Skipped(NOT_JSON)] * 3]
    assert sample_documents({"web": texts}, max_skipped=0.03)["web"].documents == 97
    with pytest.raises(SourceError, match=r"'web': 3 of 100 .*not JSON: 3.* 0.029 "):
        sample_documents({"web": texts}, max_skipped=0.029)


def test_sample_documents_stops_early_if_all_documents_are_damaged():
    with pytest.raises(SourceError, match="Source 'web'"):
        sample_documents({"web": itertools.repeat(Skipped(NOT_JSON))})


def test_sample_documents_rejects_a_source_without_text():
    with pytest.raises(SourceError, match="Source 'web' has no text"):
        sample_documents({"web": [Skipped(EMPTY)], "code": documents("code", 3)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": {"web": 1, "books": 1}}, "each of web. Received: .*books"),
        ({"weights": {"web": 0}}, "positive"),
        ({"max_bytes": 0}, "`max_bytes` must be positive. Received: 0"),
        ({"max_skipped": 2}, "`max_skipped` must be from 0 to 1. Received: 2"),
    ],
)
def test_sample_documents_rejects_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_documents({"web": documents("web", 3)}, **arguments)


# --- The command ---


def run_command(output, *inputs, size=900, options=()):
    arguments = ["--output", str(output), "--vocab-size", str(size), *options]
    assert main([*arguments, "--input", *map(str, inputs)]) == 0
    return (output / "tokenizer.model").read_bytes()


def error_line(capsys, *arguments):
    """The line on stderr with which the command fails, with exit code 2."""
    try:
        assert main([str(argument) for argument in arguments]) == 2
    except SystemExit as exit:  # Errors of the parser.
        assert exit.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("keras-openllama train-tokenizer: error: ")
    return line


@pytest.fixture
def prose(tmp_path):
    """The language reference as JSON lines, in two files."""
    folder = tmp_path / "prose"
    folder.mkdir()
    texts = [json.dumps({"content": text, "text": "no"}) for text in topics.values()]
    for name, part in {"a": texts[::2], "b": texts[1::2]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    return folder


def test_train_tokenizer_trains_on_the_mixture(prose, tmp_path, capsys, caplog):
    output = tmp_path / "new" / "tokenizer"
    code = STDLIB / "[a-d]*.py"
    options = ["--mixture", "v2", "--sample-bytes", "400k", "--max-skipped", "0"]
    proto = run_command(
        *(output, f"refinedweb={prose}", f"starcoder={code}"),
        options=[*options, "--text-field", "refinedweb=content"],
    )
    assert sorted(path.name for path in output.iterdir()) == [
        *("report.json", "report.png", "tokenizer.model", "tokenizer.vocab")
    ]
    tokenizer = OpenLlamaTokenizer(output / "tokenizer.model")
    assert tokenizer.proto == proto and tokenizer.keeps_spaces
    source = "def f(x):\n    return 'naïve'  # 🦙\n"
    assert tokenizer.detokenize(tokenizer(source)) == source

    listed = (output / "tokenizer.vocab").read_text().split("\n")[:-1]
    pieces = [line.split("\t")[0] for line in listed]
    assert pieces == tokenizer.get_vocabulary()

    report = json.loads((output / "report.json").read_text())
    assert (report["style"], report["seed"]) == ("v2", 0)
    shares = {name: source["share"] for name, source in report["sources"].items()}
    assert shares == {  # 575 and 250 of 825.
        "refinedweb": 400_000 * 575 // 825,
        "starcoder": 400_000 * 250 // 825,
    }
    assert report["sources"]["refinedweb"]["documents"] == len(topics)
    own = report["tokenizers"]["this tokenizer"]
    assert own["sha256"] == tokenizer.fingerprint and own["pieces"] == 900
    assert 1 < own["overall"] < 8
    assert "open_llama_nano" in report["tokenizers"]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")

    text = capsys.readouterr().out
    assert f'OpenLlamaTokenizer("{output}/tokenizer.model")' in text
    assert f"keras-openllama prepare-data --tokenizer {output}" in text
    assert "prints nothing until it is done" in text
    assert f"{own['overall']:.2f}" in text
    assert "not available: wikipedia" in caplog.text


def test_train_tokenizer_does_not_depend_on_the_order_of_files(prose, tmp_path):
    a, b = prose / "a.jsonl", prose / "b.jsonl"
    options = ["--sample-bytes", "200k"]
    code = f"code={STDLIB}/[a-c]*.py"
    first = run_command(tmp_path / "1", f"p={a}", f"p={b}", code, options=options)
    second = run_command(tmp_path / "2", code, f"p={b}", f"p={a}", options=options)
    other = run_command(
        tmp_path / "3", code, f"p={b}", f"p={a}", options=[*options, "--seed", "1"]
    )
    assert first == second != other


def test_train_tokenizer_names_a_single_source_text(prose, tmp_path):
    field = ["--text-field", "text=content"]
    proto = run_command(tmp_path / "v1", prose, options=["--style", "v1", *field])
    assert not OpenLlamaTokenizer(proto).keeps_spaces
    report = json.loads((tmp_path / "v1" / "report.json").read_text())
    assert [*report["sources"]] == ["text"]


def test_train_tokenizer_uses_the_text_field_of_the_mixture(prose, tmp_path):
    run_command(tmp_path / "out", f"starcoder={prose}", options=["--mixture", "v2"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    size = sum(len(text.encode()) for text in topics.values())
    assert report["sources"]["starcoder"]["bytes"] == size


def test_train_tokenizer_replaces_a_tokenizer_with_force_only(prose, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "tokenizer.model").write_bytes(b"precious")
    arguments = ["--input", prose, "--output", output, "--vocab-size", 900]
    arguments += ["--text-field", "text=content"]
    assert "--force" in error_line(capsys, *arguments)
    assert [path.name for path in output.iterdir()] == ["tokenizer.model"]
    assert (output / "tokenizer.model").read_bytes() == b"precious"
    assert (
        run_command(output, prose, options=["--force", *arguments[-2:]]) != b"precious"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nothing/*.txt"], "'nothing/*.txt' matches no files"),
        (["--input", "Web=x"], "Received: 'Web=x'"),
        (["--input", "{prose}", "--vocab-size", "100"], "above 259"),
        (["--input", "{prose}", "--vocab-size", "90000"], "is the maximum"),
        (["--input", "{prose}", "--mixture", "v2"], "has no source 'text'"),
        (["--input", "{prose}", "--mixture", "v9"], "Received: --mixture 'v9'"),
        (["--input", "{prose}", "--text-field", "web=body"], "--text-field names web"),
        (["--input", "{prose}", "--text-field", "text=body"], "no text field: "),
        (["--input", "{prose}", "--max-skipped", "1.5"], "from 0 to 1"),
        (["--input", "{damaged}"], "2 of 30 documents would be skipped"),
    ],
)
def test_train_tokenizer_reports_user_errors_in_one_line(
    arguments, message, prose, tmp_path, capsys
):
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "good"}\n' * 28 + '{"text": \n' * 2)
    given = [word.format(prose=prose, damaged=damaged) for word in arguments]
    output = tmp_path / "out"
    assert message in error_line(capsys, "--output", output, *given)
    assert not output.exists() or not list(output.iterdir())


def test_train_tokenizer_process_shows_no_traceback_on_user_errors(tmp_path):
    script = [sys.executable, ROOT / "train" / "train_tokenizer.py"]
    command = [*script, "--input", "nothing", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(
        "python train/train_tokenizer.py: error: "
        "Source 'text': 'nothing' matches no files"
    )


def test_train_tokenizer_rejects_an_unwritable_output_before_reading(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    text = error_line(capsys, "--input", "no such", "--output", file)
    assert str(file) in text


@pytest.mark.parametrize(
    "text, number",
    [("20000", 20_000), ("1k", 1000), ("1.5M", 1_500_000), ("2g", 2 * 10**9)],
)
def test_number_of_bytes_accepts_suffixes(text, number):
    assert number_of_bytes(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "1T", "much", "", "0.1"])
def test_train_tokenizer_rejects_other_sizes(text, capsys):
    with pytest.raises(SystemExit) as failed:
        main(["--input", "x", "--output", "y", "--sample-bytes", text])
    assert failed.value.code == 2
    assert "such as 1G, 500M" in capsys.readouterr().err


def test_train_tokenizer_help_explains_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "keras-openllama train-tokenizer --output" in text
    assert "unsuitable for code" in text and "--sample-bytes" in text
