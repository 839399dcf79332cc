"""`easylm.save` and `easylm.load` are exact, and follow EasyLM's conventions."""

import easylm_model
import flax.serialization
import keras
import msgpack
import numpy as np
import pytest
from easylm_files import write_stream
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, TinyShape, assert_close, batch, random_lm
from tokenizer_models import trained_model

from keras_openllama.checkpoints.rotary_order import (
    half_split_to_interleaved,
    interleaved_to_half_split,
)
from keras_openllama.convert import convert, easylm

SHAPE = SHAPES[2]  # With grouped-query attention.
CONTENTS = ("params", "trainstate_params", "flax_params")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with the architecture and a tokenizer of `SHAPE`."""
    path = tmp_path_factory.mktemp("model") / "out"
    random_lm(SHAPE, trained_model(True)).export_to_transformers(path)
    return path


def values(lm):
    return {w.path: keras.ops.convert_to_numpy(w) for w in lm.weights}


@first_on_tensorflow("shape", SHAPES, ids=str)
def test_save_writes_weights_that_give_the_same_logits_in_easylm(shape, tmp_path):
    lm = random_lm(shape)
    easylm.save(lm, tmp_path / "params", dtype="float32")
    arrays = easylm_model.read_stream(tmp_path / "params")
    ids = batch(shape, 1, 40)
    expected = easylm_model.logits(
        arrays, ids[0], shape.num_query_heads, shape.num_key_value_heads
    )
    assert_close(lm.score(ids)[0], expected)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.slow_on_tensorflow
def test_load_reads_what_save_wrote(content, directory, tmp_path):
    lm = random_lm(SHAPE, trained_model(True), seed=1)
    easylm.save(lm, tmp_path / "file", dtype="float32", content=content)
    back = easylm.load(tmp_path / "file", directory)
    expected = values(lm)
    for path, value in values(back).items():
        assert np.array_equal(value, expected[path]), path
    text = "The import statement"
    assert back.generate(text, max_new_tokens=5) == lm.generate(text, max_new_tokens=5)


@first_on_tensorflow("preset", ["transformers", "keras"])
def test_load_takes_the_architecture_of_a_directory_without_a_tokenizer(
    preset, tmp_path
):
    lm = random_lm(SHAPE)
    easylm.save(lm, tmp_path / "params", dtype="float32")
    if preset == "keras":
        random_lm(SHAPE, seed=1).save_to_preset(tmp_path / "model")
    else:
        random_lm(SHAPE, seed=1).export_to_transformers(tmp_path / "model")
    with pytest.warns(UserWarning, match="is missing from .*preprocessor=None"):
        back = easylm.load(tmp_path / "params", tmp_path / "model")
    assert back.preprocessor is None
    expected = values(lm)
    assert all(np.array_equal(v, expected[p]) for p, v in values(back).items())


@pytest.mark.slow_on_tensorflow
def test_load_reads_the_parameters_of_a_train_state(directory, tmp_path):
    lm = random_lm(SHAPE, trained_model(True), seed=1)
    easylm.save(lm, tmp_path / "params", dtype="float32")
    state = {("step",): np.int32(3)}
    for name, array in easylm_model.read_stream(tmp_path / "params").items():
        key = tuple(name.split("/"))
        state["opt_state", "0", "mu", "params", *key] = 2 * array
        state["params", "params", *key] = array
    write_stream(tmp_path / "state", state)
    back = easylm.load(tmp_path / "state", directory)
    expected = values(lm)
    assert all(np.array_equal(v, expected[p]) for p, v in values(back).items())


@pytest.mark.backend_free
def test_convert_reads_chunked_arrays(directory, tmp_path, monkeypatch):
    easylm.save(random_lm(SHAPE, trained_model(True)), tmp_path / "params", None)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    arrays = easylm_model.read_stream(tmp_path / "params")
    by_key = {tuple(name.split("/")): array for name, array in arrays.items()}
    write_stream(tmp_path / "chunked", by_key)
    for name in ("params", "chunked"):
        target = tmp_path / f"{name}_hf"
        convert(tmp_path / name, target, "transformers", preset=directory)
    paths = [tmp_path / f"{n}_hf" / "model.safetensors" for n in ("params", "chunked")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_save_writes_the_dtype(dtype, tmp_path):
    lm = random_lm(SHAPE)
    easylm.save(lm, tmp_path / "file", dtype=dtype)
    arrays = easylm_model.read_stream(tmp_path / "file")
    assert {array.dtype.name for array in arrays.values()} == {dtype}
    norm = keras.ops.convert_to_numpy(lm.backbone.final_norm.scale)
    written = arrays["transformer/ln_f/kernel"]
    assert np.array_equal(written, norm.astype(written.dtype))


@pytest.mark.backend_free
def test_save_writes_bfloat16_by_default(tmp_path):
    easylm.save(random_lm(SHAPE), tmp_path / "file")
    arrays = easylm_model.read_stream(tmp_path / "file")
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}


@pytest.mark.backend_free
def test_interleaved_to_half_split_follows_the_converter_of_easylm():
    # Its `permute` takes (heads, head_dim / 2, 2, …) to (heads, 2, head_dim / 2, …).
    rows = np.arange(2 * 6)[:, None] * np.ones((1, 3))
    assert interleaved_to_half_split(rows, 6)[:, 0].tolist() == [
        0,
        2,
        4,
        1,
        3,
        5,
        6,
        8,
        10,
        7,
        9,
        11,
    ]
    assert np.array_equal(
        half_split_to_interleaved(interleaved_to_half_split(rows, 6), 6), rows
    )


# ----- Invalid input


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("easylm") / "params"
    easylm.save(random_lm(SHAPE), path)
    return path


def load_weights(path, directory, **arguments):
    return easylm.load(path, directory, preprocessor=None, **arguments)


@pytest.mark.backend_free
def test_load_rejects_another_architecture(file, directory):
    wrong = {"num_query_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    with pytest.raises(
        ValueError, match=r"wrong shape: .*wq/kernel has \(96, 96\), expected"
    ):
        load_weights(file, directory, **wrong)
    with pytest.raises(ValueError, match="missing: transformer/h/2/attention_norm"):
        load_weights(file, directory, num_layers=3)


@pytest.mark.backend_free
def test_load_rejects_a_truncated_stream(file, directory, tmp_path):
    records = list(msgpack.Unpacker(open(file, "rb"), max_buffer_size=0))
    short = tmp_path / "short"
    short.write_bytes(b"".join(map(msgpack.packb, records[:-1])))
    with pytest.raises(ValueError, match=f"{short} .*missing: lm_head/kernel"):
        load_weights(short, directory)
    short.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{short} .*download it again"):
        load_weights(short, directory)


@pytest.mark.backend_free
def test_load_names_a_missing_file_and_one_of_another_model(directory, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_weights(tmp_path / "nowhere", directory)
    easylm.save(random_lm(TinyShape("other", 2, 2, 16)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other do not match this model"):
        load_weights(tmp_path / "other", directory)


@pytest.mark.backend_free
def test_save_rejects_an_unknown_content_and_dtype(tmp_path):
    lm = random_lm(SHAPE)
    with pytest.raises(ValueError, match="Received: content='trainstate'"):
        easylm.save(lm, tmp_path / "file", content="trainstate")
    with pytest.raises(ValueError, match="Received: dtype='float8'"):
        easylm.save(lm, tmp_path / "file", dtype="float8")
    assert not list(tmp_path.iterdir())
