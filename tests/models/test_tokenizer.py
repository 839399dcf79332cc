"""The tokenizer: round trips, spaces, control strings, saving."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import keras
import pytest
import sentencepiece
from checkout import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_openllama.backend.keras_hub import Tokenizer
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import large_model, train_tokenizer, trained_model

quick = settings(max_examples=150, deadline=None, derandomize=True)

V1 = OpenLlamaTokenizer(trained_model(keep_spaces=False))
V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
LARGE = OpenLlamaTokenizer(large_model())
V1._warned_of_lost_spaces = True  # Tests of the warning create other tokenizers.

by_name = pytest.mark.parametrize(
    "tokenizer", [V1, V2, LARGE], ids=["v1", "v2", "large"]
)
backend_free = pytest.mark.backend_free

# All of Unicode, and often what is difficult for tokenizers. SentencePiece represents
# spaces by U+2581, so this character alone does not round-trip.
SNIPPETS = ["  ", "\t", "\n", "\r\n", "def f(x):\n    ", "<s>", "</s>", "<unk>"]
SNIPPETS += ["<0x41>", "[INST]", "日本語", "한국어", "👩\u200d👧", "🦙", "e\u0301"]
SNIPPETS += ["é", "\0", "\ufffd"]
texts = st.lists(
    st.one_of(
        st.sampled_from(SNIPPETS),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")),
    ),
    max_size=6,
).map("".join)


def merged_spaces(text):
    """The text that a v1 model preserves."""
    return " ".join(part for part in text.split(" ") if part)


# --- Round trips ---


@backend_free
@given(texts)
@quick
def test_detokenize_inverts_tokenize_with_v2(text):
    for tokenizer in (V2, LARGE):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@backend_free
@given(texts)
@quick
def test_detokenize_inverts_tokenize_up_to_spaces_with_v1(text):
    assert V1.detokenize(V1.tokenize(text)) == merged_spaces(text)


@backend_free
@pytest.mark.parametrize("text", ["a\tb", "\ta", "a\n\nb\n", "日本語 の 文", "🦙 b"])
def test_v1_preserves_all_characters_but_spaces(text):
    assert V1.detokenize(V1(text)) == text


@backend_free
@by_name
def test_tokenize_agrees_with_sentencepiece(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    text = "def add(a, b):\n    return a + b  # 日本語 🦙\n"
    assert tokenizer(text) == reference.encode(text)


@backend_free
def test_special_token_ids_are_those_of_llama():
    assert (V2.unk_token_id, V2.start_token_id, V2.end_token_id) == (0, 1, 2)
    assert V2.pad_token_id == 0
    assert V2.special_tokens == ["<s>", "</s>"]
    assert V2.special_token_ids == [1, 2]
    assert V2.id_to_token(13) == "<0x0A>" and V2("\n")[-1] == 13


@backend_free
@by_name
def test_get_vocabulary_is_in_the_order_of_ids(tokenizer):
    vocabulary = tokenizer.get_vocabulary()
    assert len(vocabulary) == tokenizer.vocabulary_size()
    for token_id in (0, 1, 2, 13, 300, len(vocabulary) - 1):
        assert tokenizer.id_to_token(token_id) == vocabulary[token_id]
        assert tokenizer.token_to_id(vocabulary[token_id]) == token_id
    assert tokenizer.token_to_id("no such token") == tokenizer.unk_token_id


# --- Spaces in v1 and v2 ---


@backend_free
def test_keeps_spaces_is_read_from_the_model_file():
    assert not V1.keeps_spaces
    assert V2.keeps_spaces and LARGE.keeps_spaces


@backend_free
@given(texts)
@example(" leading")
@example("trailing ")
@example("in  between")
@example("none at all")
@quick
def test_tokenize_with_v1_warns_exactly_when_a_text_loses_spaces(text):
    tokenizer = OpenLlamaTokenizer(V1.proto)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenizer.tokenize(["harmless", text])[1]
    assert bool(caught) == (tokenizer.detokenize(ids) != text)


@backend_free
def test_tokenize_with_v1_warns_once_and_recommends_v2():
    tokenizer = OpenLlamaTokenizer(V1.proto)
    with pytest.warns(UserWarning, match="open_llama_7b_v2") as caught:
        tokenizer("if x:\n    return")
        tokenizer("if y:\n    return")
    assert len(caught) == 1


@backend_free
def test_tokenize_with_v2_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        V2("  if x:\n    return  ")


# --- Start and end tokens, control strings ---


@backend_free
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_add_bos_and_add_eos_insert_special_tokens(add_bos, add_eos):
    tokenizer = OpenLlamaTokenizer(V2.proto, add_bos=add_bos, add_eos=add_eos)
    expected = [1] * add_bos + V2("some text") + [2] * add_eos
    assert tokenizer("some text") == expected
    assert tokenizer(["some text"]) == [expected]
    assert V2.tokenize("some text", add_bos=add_bos, add_eos=add_eos) == expected


@backend_free
def test_tokenize_overrides_add_bos_and_add_eos():
    tokenizer = OpenLlamaTokenizer(V2.proto, add_bos=True, add_eos=True)
    assert tokenizer.tokenize("a", add_bos=False, add_eos=False) == V2("a")


@backend_free
@given(texts)
@quick
def test_plain_text_never_becomes_control_tokens(text):
    for tokenizer in (V1, V2, LARGE):
        special_token_ids = {tokenizer.start_token_id, tokenizer.end_token_id}
        assert not special_token_ids & set(tokenizer.tokenize(text))


@backend_free
@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s>b", "<unk>", "<0x41>", "▁</s>"])
@by_name
def test_control_strings_in_plain_text_stay_text(tokenizer, text):
    ids = tokenizer(text)
    assert not {0, 1, 2, 3 + 0x41} & set(ids)
    assert tokenizer.detokenize(ids).strip() == text.replace("▁", "").strip()


@backend_free
def test_parse_special_encodes_control_strings_as_tokens():
    assert V2.tokenize("<s>one</s><s>two", parse_special=True) == [
        *[1, *V2("one"), 2],
        *[1, *V2("two")],
    ]
    assert V2(["</s>", "a"], parse_special=True) == [[2], V2("a")]
    assert V2.tokenize("no <unk>here", parse_special=True) == [
        *V2("no "),
        0,
        *V2("here"),
    ]


@backend_free
def test_parse_special_does_not_double_start_and_end_tokens():
    ids = V2.tokenize("<s>a</s>", parse_special=True, add_bos=True, add_eos=True)
    assert ids == [1, *V2("a"), 2]


# --- Inputs and outputs ---


@backend_free
def test_batches_give_the_results_of_single_texts():
    batch = [f"text {i}: " + "多 bytes " * (i % 7) for i in range(300)]
    rows = V2(batch)
    assert rows == [V2(text) for text in batch]
    assert V2.detokenize(rows) == batch


@backend_free
def test_batches_are_processed_by_all_threads(monkeypatch):
    seen = {}

    class Spy:
        def encode(self, inputs, num_threads=1):
            seen["encode"] = num_threads
            return [[5]] * len(inputs)

        def decode(self, inputs, num_threads=1):
            seen["decode"] = num_threads
            return ["a"] * len(inputs)

        def vocab_size(self):
            return 512

    tokenizer = OpenLlamaTokenizer(V2.proto)
    monkeypatch.setattr(tokenizer.vocabulary, "processor", Spy())
    tokenizer.detokenize(tokenizer.tokenize(["a", "b"]))
    assert seen == {"encode": -1, "decode": -1}  # One thread per core.


@backend_free
def test_tokenizer_is_thread_safe():
    batch = ["a text of  some length 日本語\n" * 20] * 50
    expected = V2(batch)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(V2(batch))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


# --- Invalid input ---


@backend_free
def test_tokenizer_without_proto_raises_an_error_that_names_it():
    tokenizer = OpenLlamaTokenizer()
    for use in (
        lambda: tokenizer("a"),
        lambda: tokenizer.detokenize([1]),
        lambda: tokenizer.vocabulary_size(),
        lambda: tokenizer.start_token_id,
        lambda: tokenizer.keeps_spaces,
        lambda: tokenizer.fingerprint,
        lambda: tokenizer.stream_decoder(),
        lambda: tokenizer.save_assets("."),
    ):
        with pytest.raises(ValueError, match="no vocabulary"):
            use()


# --- Configuration, saving, loading ---


@backend_free
def test_proto_accepts_a_path_bytes_or_base64(tmp_path):
    path = train_tokenizer(tmp_path / "a" / "tokenizer.model", keep_spaces=True)
    config = V2.get_config()
    for proto in (path, str(path), path.read_bytes(), config["proto"]):
        tokenizer = OpenLlamaTokenizer(proto)
        assert tokenizer("a  b") == V2("a  b")
        assert tokenizer.fingerprint == V2.fingerprint


@backend_free
def test_fingerprint_is_a_hash_of_the_model_file():
    assert len(V2.fingerprint) == 64
    assert V2.fingerprint != V1.fingerprint


@backend_free
def test_tokenizer_config_round_trips_through_json():
    tokenizer = OpenLlamaTokenizer(V2.proto, add_bos=True, add_eos=True, name="mine")
    config = json.loads(json.dumps(tokenizer.get_config()))
    for copy in (
        OpenLlamaTokenizer.from_config(config),
        OpenLlamaTokenizer(**config),
        keras.layers.deserialize(keras.layers.serialize(tokenizer)),
    ):
        assert copy("a  b") == tokenizer("a  b")
        assert copy.get_config() == tokenizer.get_config()
        assert copy.name == "mine"


@backend_free
def test_from_config_does_not_read_files(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.model", keep_spaces=True)
    config = {**V2.get_config(), "proto": str(path)}
    with pytest.raises(ValueError, match="base64"):
        OpenLlamaTokenizer.from_config(config)


@backend_free
def test_save_assets_and_load_assets_round_trip(tmp_path):
    tokenizer = OpenLlamaTokenizer(V2.proto, add_bos=True)
    assert tokenizer.file_assets == ["vocabulary.spm"]
    tokenizer.save_assets(tmp_path)
    assert (tmp_path / "vocabulary.spm").read_bytes() == V2.proto
    for before in (OpenLlamaTokenizer(), OpenLlamaTokenizer(V1.proto)):
        before.load_assets(tmp_path)
        assert before.keeps_spaces and before("a  b") == V2("a  b")


def run_on_jax(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


@backend_free
def test_tokenizer_and_preprocessor_work_without_tensorflow():
    script = f"""
        import sys

        class NotInstalled:
            def find_spec(name, path=None, target=None):
                if name.split(".")[0] in ("tensorflow", "tensorflow_text"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, NotInstalled)
        from keras_openllama import OpenLlamaCausalLMPreprocessor, OpenLlamaTokenizer
        from tests.support.tokenizer_models import trained_model

        tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
        assert tokenizer.detokenize(tokenizer(["a  b", "🦙"])) == ["a  b", "🦙"]
        assert tokenizer("a  b") == {V2("a  b")}
        preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=8)
        x, y, sample_weight = preprocessor(["a  b"])
        assert x["token_ids"][0, 0] == 1
        assert preprocessor.generate_postprocess(x) == ["a  b"]
        try:
            import tensorflow
        except ImportError:
            print("works without TensorFlow")
    """
    result = run_on_jax(script)
    assert result.stdout.strip() == "works without TensorFlow", result.stderr


@backend_free
def test_tensorflow_is_not_imported_on_jax():
    script = """
        import sys
        from keras_openllama import OpenLlamaCausalLMPreprocessor, OpenLlamaTokenizer
        from tests.support.tokenizer_models import trained_model

        tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
        preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer)
        preprocessor(["a text"], sample_weight=[1.0])
        preprocessor.generate_postprocess(preprocessor.generate_preprocess("a"))
        tokenizer.detokenize(tokenizer(["a", "b"]))
        print("tensorflow" in sys.modules)
    """
    result = run_on_jax(script)
    assert result.stdout.strip() == "False", result.stderr


@backend_free
def test_tokenize_accepts_tensorflow_strings_in_a_tf_dataset():
    tensorflow = pytest.importorskip("tensorflow")
    batch = ["a  b", "naïve 日本語", ""]
    assert V2(tensorflow.constant(batch)) == V2(batch)
    assert V2(tensorflow.constant("naïve")) == V2("naïve")
    assert V2.detokenize(tensorflow.ragged.constant(V2(batch))) == batch

    dataset = tensorflow.data.Dataset.from_tensor_slices(batch)
    rows = [ids.numpy().tolist() for ids in dataset.map(V2)]
    assert rows == V2(batch)
    [ragged] = dataset.batch(3).map(V2)
    assert ragged.to_list() == V2(batch)


@backend_free
def test_tokenizer_is_a_keras_hub_tokenizer():
    assert issubclass(OpenLlamaTokenizer, Tokenizer)
