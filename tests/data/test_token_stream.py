"""`TokenStream`: the same batches for any processes, workers and first step."""

import collections
import logging
import socket
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT
from token_data import prepare_sources, texts

from keras_openllama import OpenLlamaTokenizer
from keras_openllama.data.mixture import mixture_from_weights
from keras_openllama.data.token_stream import TokenStream

pytestmark = pytest.mark.backend_free

COUNTS = {"web": 2500, "code": 400, "books": 60}
WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}
OPTIONS = [
    {"packing": packing, "mask_documents": mask}
    for packing in ("concatenate", "best_fit")
    for mask in (False, True)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stream")
    return prepare_sources(directory, COUNTS, WEIGHTS, validation_fraction=0.05)


@pytest.fixture(scope="module")
def tokenizer(data):
    return OpenLlamaTokenizer(data.tokenizer_proto(), add_bos=True, add_eos=True)


def stream(data, length=64, batch_size=8, **options):
    return TokenStream(data, length, batch_size, **{"seed": 3, **options})


def stack(batch):
    x, y, weights = batch
    return np.stack([x["token_ids"], x["padding_mask"], y, weights], axis=-1)


def assert_same(actual, expected):
    np.testing.assert_array_equal(stack(actual), stack(expected))


# --- Contents of a batch ---


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_has_the_arrays_of_fit(data, options):
    x, y, weights = stream(data, **options).batch(5)
    assert [v.dtype for v in (*x.values(), y, weights)] == ["int32"] * 3 + ["float32"]
    assert {v.shape for v in (*x.values(), y, weights)} == {(8, 64)}
    # Targets are one token ahead.
    inside = x["padding_mask"][:, 1:] > 0
    np.testing.assert_array_equal(y[:, :-1][inside], x["token_ids"][:, 1:][inside])
    assert set(np.unique(weights)) <= {0, 1}


def test_sequences_read_describes_the_tokens_of_a_batch(data):
    full = stream(data)
    x, y, _ = full.batch(11)
    tokens = np.concatenate([x["token_ids"], y[:, -1:]], axis=1)
    for number, (source, spans) in enumerate(full.sequences_read(11)):
        documents = data.documents(source)
        parts = [documents[d][0][first : first + size] for d, first, size in spans]
        np.testing.assert_array_equal(tokens[number], np.concatenate(parts))


def test_documents_start_with_bos_and_end_with_eos(data, tokenizer):
    known = {
        source: {tuple(ids) for ids in tokenizer(texts(source, count))}
        for source, count in COUNTS.items()
    }
    for source in COUNTS:
        for split in ("train", "validation"):
            documents = data.documents(source, split)
            for tokens, num_bytes in documents.read_many(range(min(3, len(documents)))):
                assert tuple(tokens.tolist()) in known[source]
                assert num_bytes == len(tokenizer.detokenize(tokens.tolist()))


def test_batch_with_mask_documents_numbers_documents_and_masks_first_tokens(data):
    masked = stream(data, mask_documents=True)
    plain = stream(data).batch(4)
    x, y, weights = masked.batch(4)
    assert_same((dict(x, padding_mask=plain[0]["padding_mask"]), y, plain[2]), plain)
    for number, (_, spans) in enumerate(masked.sequences_read(4)):
        sizes = [size for *_, size in spans]
        numbers = np.repeat(np.arange(len(sizes)) + 1, sizes)
        np.testing.assert_array_equal(x["padding_mask"][number], numbers[:-1])
        np.testing.assert_array_equal(weights[number], numbers[1:] == numbers[:-1])
    # Only the first token of a document is not a target.
    assert (y[weights == 0] == 1).all()
    assert plain[2].all()


def test_batch_with_best_fit_cuts_no_document_that_fits(data):
    packed = stream(data, packing="best_fit", length=200)
    for step in range(20):
        x, _, weights = packed.batch(step)
        for number, (source, spans) in enumerate(packed.sequences_read(step)):
            lengths = data.documents(source).lengths
            for document, first, size in spans:
                if lengths[document] <= 201:
                    assert (first, size) == (0, lengths[document])
            real = sum(size for *_, size in spans)
            assert weights[number].sum() == real - 1
            assert not x["token_ids"][number, real:].any()
            assert not x["padding_mask"][number, real:].any()


# --- Determinism ---


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_does_not_depend_on_previous_batches(data, options):
    full = stream(data, **options)
    batches = [full.batch(step) for step in range(40)]
    for step in np.random.default_rng(2).permutation(40)[:8].tolist():
        assert_same(stream(data, **options).batch(step), batches[step])
    # Some sequences start inside a document, which did not restart there.
    starts = [
        spans[0][1] for step in range(40) for _, spans in full.sequences_read(step)
    ]
    assert any(starts)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_batch_is_divided_among_processes(data, options, count):
    full = stream(data, **options)
    parts = [
        stream(data, **options, process_count=count, process_index=index)
        for index in range(count)
    ]
    for step in (0, 17, 333):
        together = [stack(part.batch(step)) for part in parts]
        expected = stack(full.batch(step))
        np.testing.assert_array_equal(np.concatenate(together), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dataset_with_threads_returns_batches_in_order(data, options):
    full = stream(data, **options)
    for step, batch in enumerate(full.dataset(13, 30, threads=4, prefetch=8), 13):
        assert_same(batch, full.batch(step))
    assert step == 42


@pytest.mark.parametrize(
    ("workers", "options"), [(1, OPTIONS[0]), (3, OPTIONS[3])], ids=str
)
def test_dataset_with_workers_returns_batches_in_order(data, workers, options):
    part = stream(data, **options, process_count=2, process_index=1)
    batches = list(part.dataset(from_step=7, steps=9, workers=workers))
    assert len(batches) == 9
    for step, batch in enumerate(batches, 7):
        assert_same(batch, part.batch(step))


def test_dataset_resumes_from_the_state_of_a_grain_iterator(data):
    full = stream(data)
    reading = iter(full.dataset(from_step=3))
    for _ in range(4):
        next(reading)
    state = reading.get_state()
    again = iter(stream(data).dataset(from_step=3))
    again.set_state(state)
    assert_same(next(again), full.batch(7))


def test_batch_depends_on_the_seed(data):
    one, same, other = stream(data), stream(data), stream(data, seed=4)
    assert_same(one.batch(9), same.batch(9))
    assert not np.array_equal(stack(one.batch(9)), stack(other.batch(9)))


def test_batch_is_divided_among_the_processes_of_jax_distributed(data, tmp_path):
    program = """
import sys
import jax
import numpy as np
from keras_openllama.data.token_stream import TokenStream

address, process, directory, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
stream = TokenStream(directory, 64, 8, seed=3)
targets = [stream.batch(step)[1] for step in (0, 5)]
np.save(out, np.stack(targets))
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    outputs = [tmp_path / f"{process}.npy" for process in (0, 1)]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", program, address, str(process)),
                *(data.directory, str(output)),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for process, output in enumerate(outputs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    first, second = map(np.load, outputs)
    full = stream(data)
    for place, step in enumerate((0, 5)):
        expected = full.batch(step)[1]
        np.testing.assert_array_equal(first[place], expected[:4])
        np.testing.assert_array_equal(second[place], expected[4:])


# --- Epochs and mixture ---


def test_sequences_read_has_every_document_once_per_epoch(data):
    packed = stream(
        data, packing="best_fit", mixture=mixture_from_weights({"books": 1})
    )
    lengths = data.documents("books").lengths
    sequences = [s for step in range(400) for s in packed.sequences_read(step)]
    epoch = int(packed._indexes[0].sequences_per_epoch)
    for start in (0, epoch):
        seen = collections.Counter()
        for _, spans in sequences[start : start + epoch]:
            for document, _, size in spans:
                seen[document] += size - 1
        assert seen == {d: size - 1 for d, size in enumerate(lengths.tolist())}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_mixture_weights_are_shares_of_the_tokens(data, packing):
    # Sources with more padding get more sequences.
    mixed = stream(data, length=150, batch_size=64, packing=packing)
    totals = collections.Counter()
    for step in range(120):
        real = (mixed.batch(step)[0]["padding_mask"] > 0).sum(axis=1)
        for (source, _), tokens in zip(mixed.sequences_read(step), real, strict=True):
            totals[source] += int(tokens)
    for source, weight in WEIGHTS.items():
        assert totals[source] / totals.total() == pytest.approx(weight, abs=1e-3)


def test_dataset_warns_at_the_end_of_an_epoch(data, caplog):
    mixed = stream(data, batch_size=32)
    epochs = [mixed.epochs_at(step)["books"] for step in range(200)]
    ends = [k for k in range(199) if int(epochs[k + 1]) > int(epochs[k])]
    with caplog.at_level(logging.WARNING):
        for _ in mixed.dataset(ends[0] - 2, 5):
            pass
    messages = [r.message for r in caplog.records if "books" in r.message]
    assert messages == [
        f"Step {ends[0]}: source books has completed epoch 1 and continues in a new "
        "order."
    ]


def test_batch_follows_the_schedule_of_the_mixture(data):
    mixture = data.mixture.with_weights(50, {"code": 1})
    before, changed = stream(data), stream(data, mixture=mixture)
    assert_same(changed.batch(49), before.batch(49))
    assert {source for source, _ in changed.sequences_read(50)} == {"code"}
    # The source continues at its previous position.
    counts = collections.Counter(
        s for k in range(50) for s, _ in before.sequences_read(k)
    )
    code = changed._indexes[changed.sources.index("code")]
    assert changed.sequences_read(50)[0][1] == code.spans(counts["code"])


def test_validation_split_shares_no_documents_with_train(data):
    train, validation = (
        {
            tuple(tokens.tolist())
            for source in COUNTS
            for tokens, _ in data.documents(source, split).read_many(
                range(len(data.documents(source, split)))
            )
        }
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == sum(COUNTS.values())
    assert not train & validation
    x, _, _ = stream(data, split="validation", length=1024, packing="best_fit").batch(0)
    for ids in x["token_ids"].tolist():
        assert tuple(ids[: ids.index(2) + 1]) in validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"length": 1.5}, "sequence_length"),
        ({"packing": "tight"}, "best_fit"),
        ({"split": "test"}, "split='test'"),
        ({"process_count": 3, "process_index": 0}, "batch_size=8, process_count=3"),
        ({"process_count": 2, "process_index": 2}, "process_index=2"),
        ({"process_count": 2}, "together"),
        ({"mixture": mixture_from_weights({"poems": 1})}, "no train documents .*poems"),
    ],
)
def test_token_stream_rejects_invalid_arguments(data, options, message):
    with pytest.raises(ValueError, match=message):
        stream(data, **options)
