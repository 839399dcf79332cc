"""The stream: the same batches whatever the hosts, the workers, the place of resume."""

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
WAYS = [
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


def stream(data, length=64, rows=8, **options):
    return TokenStream(data, length, rows, **{"seed": 3, **options})


def flat(batch):
    x, y, weights = batch
    return np.stack([x["token_ids"], x["padding_mask"], y, weights], axis=-1)


def assert_same(found, wanted):
    np.testing.assert_array_equal(flat(found), flat(wanted))


# --- What a batch is ---


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_batch_is_what_fit_takes(data, way):
    x, y, weights = stream(data, **way).batch(5)
    assert [v.dtype for v in (*x.values(), y, weights)] == ["int32"] * 3 + ["float32"]
    assert {v.shape for v in (*x.values(), y, weights)} == {(8, 64)}
    # Targets are one token ahead.
    inside = x["padding_mask"][:, 1:] > 0
    np.testing.assert_array_equal(y[:, :-1][inside], x["token_ids"][:, 1:][inside])
    assert set(np.unique(weights)) <= {0, 1}


def test_rows_say_which_tokens_of_which_documents_they_hold(data):
    whole = stream(data)
    x, y, _ = whole.batch(11)
    tokens = np.concatenate([x["token_ids"], y[:, -1:]], axis=1)
    for row, (source, spans) in enumerate(whole.sequences_read(11)):
        documents = data.documents(source)
        parts = [documents[d][0][first : first + size] for d, first, size in spans]
        np.testing.assert_array_equal(tokens[row], np.concatenate(parts))


def test_documents_stand_between_bos_and_eos(data, tokenizer):
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


def test_masks_number_the_documents_and_spare_the_border(data):
    masked = stream(data, mask_documents=True)
    plain = stream(data).batch(4)
    x, y, weights = masked.batch(4)
    assert_same((dict(x, padding_mask=plain[0]["padding_mask"]), y, plain[2]), plain)
    for row, (_, spans) in enumerate(masked.sequences_read(4)):
        sizes = [size for *_, size in spans]
        numbers = np.repeat(np.arange(len(sizes)) + 1, sizes)
        np.testing.assert_array_equal(x["padding_mask"][row], numbers[:-1])
        np.testing.assert_array_equal(weights[row], numbers[1:] == numbers[:-1])
    # What is no target is the first token of a document, and nothing else.
    assert (y[weights == 0] == 1).all()
    assert plain[2].all()


def test_best_fit_cuts_no_document_that_fits(data):
    packed = stream(data, packing="best_fit", length=200)
    for step in range(20):
        x, _, weights = packed.batch(step)
        for row, (source, spans) in enumerate(packed.sequences_read(step)):
            lengths = data.documents(source).lengths
            for document, first, size in spans:
                if lengths[document] <= 201:
                    assert (first, size) == (0, lengths[document])
            real = sum(size for *_, size in spans)
            assert weights[row].sum() == real - 1
            assert not x["token_ids"][row, real:].any()
            assert not x["padding_mask"][row, real:].any()


# --- The same stream ---


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_any_place_is_reached_without_what_comes_before(data, way):
    whole = stream(data, **way)
    batches = [whole.batch(step) for step in range(40)]
    for step in np.random.default_rng(2).permutation(40)[:8].tolist():
        assert_same(stream(data, **way).batch(step), batches[step])
        # In the midst of a document: nothing was begun anew there.
    starts = [
        spans[0][1] for step in range(40) for _, spans in whole.sequences_read(step)
    ]
    assert any(starts)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_batches(data, way, hosts):
    whole = stream(data, **way)
    parts = [stream(data, **way, hosts=hosts, host=host) for host in range(hosts)]
    for step in (0, 17, 333):
        together = [flat(part.batch(step)) for part in parts]
        np.testing.assert_array_equal(np.concatenate(together), flat(whole.batch(step)))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_threads_give_the_batches_in_order(data, way):
    whole = stream(data, **way)
    for step, batch in enumerate(whole.dataset(13, 30, threads=4, prefetch=8), 13):
        assert_same(batch, whole.batch(step))
    assert step == 42


@pytest.mark.parametrize(("workers", "way"), [(1, WAYS[0]), (3, WAYS[3])], ids=str)
def test_workers_give_the_batches_in_order(data, workers, way):
    part = stream(data, **way, hosts=2, host=1)
    batches = list(part.dataset(from_step=7, steps=9, workers=workers))
    assert len(batches) == 9
    for step, batch in enumerate(batches, 7):
        assert_same(batch, part.batch(step))


def test_a_position_of_grain_goes_on_where_it_was(data):
    whole = stream(data)
    reading = iter(whole.dataset(from_step=3))
    for _ in range(4):
        next(reading)
    state = reading.get_state()
    again = iter(stream(data).dataset(from_step=3))
    again.set_state(state)
    assert_same(next(again), whole.batch(7))


def test_the_stream_depends_on_the_seed_alone(data):
    one, same, other = stream(data), stream(data), stream(data, seed=4)
    assert_same(one.batch(9), same.batch(9))
    assert not np.array_equal(flat(one.batch(9)), flat(other.batch(9)))


def test_processes_joined_by_jax_see_halves_of_the_same_batches(data, tmp_path):
    program = """
import sys
import jax
import numpy as np
from keras_openllama.data.token_stream import TokenStream

address, process, directory, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
stream = TokenStream(directory, 64, 8, seed=3)
rows = [stream.batch(step)[1] for step in (0, 5)]
np.save(out, np.stack(rows))
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
    whole = stream(data)
    for place, step in enumerate((0, 5)):
        wanted = whole.batch(step)[1]
        np.testing.assert_array_equal(first[place], wanted[:4])
        np.testing.assert_array_equal(second[place], wanted[4:])


# --- Epochs and the mixture ---


def test_every_document_comes_once_an_epoch(data):
    packed = stream(
        data, packing="best_fit", mixture=mixture_from_weights({"books": 1})
    )
    lengths = data.documents("books").lengths
    rows = [row for step in range(400) for row in packed.sequences_read(step)]
    epoch = int(packed._indexes[0].sequences_per_epoch)
    for start in (0, epoch):
        seen = collections.Counter()
        for _, spans in rows[start : start + epoch]:
            for document, _, size in spans:
                seen[document] += size - 1
        assert seen == {d: size - 1 for d, size in enumerate(lengths.tolist())}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_shares_of_the_tokens_are_the_weights(data, packing):
    # Sources whose rows are padded more get more rows.
    mixed = stream(data, length=150, rows=64, packing=packing)
    totals = collections.Counter()
    for step in range(120):
        real = (mixed.batch(step)[0]["padding_mask"] > 0).sum(axis=1)
        for (source, _), tokens in zip(mixed.sequences_read(step), real, strict=True):
            totals[source] += int(tokens)
    for source, weight in WEIGHTS.items():
        assert totals[source] / totals.total() == pytest.approx(weight, abs=1e-3)


def test_a_source_that_ends_begins_again_and_it_is_said(data, caplog):
    mixed = stream(data, rows=32)
    epochs = [mixed.epochs_at(step)["books"] for step in range(200)]
    ends = [k for k in range(199) if int(epochs[k + 1]) > int(epochs[k])]
    with caplog.at_level(logging.WARNING):
        for _ in mixed.dataset(ends[0] - 2, 5):
            pass
    said = [r.message for r in caplog.records if "books" in r.message]
    assert said == [
        f"Step {ends[0]}: source books has been read 1 times to its end, and begins "
        "again in another order."
    ]


def test_weights_change_at_their_step_and_not_before(data):
    mixture = data.mixture.with_weights(50, {"code": 1})
    before, changed = stream(data), stream(data, mixture=mixture)
    assert_same(changed.batch(49), before.batch(49))
    assert {source for source, _ in changed.sequences_read(50)} == {"code"}
    # It goes on in the source where it was.
    counts = collections.Counter(
        s for k in range(50) for s, _ in before.sequences_read(k)
    )
    code = changed._indexes[changed.sources.index("code")]
    assert changed.sequences_read(50)[0][1] == code.spans(counts["code"])


def test_the_validation_split_is_other_documents(data):
    train, validation = (
        {
            tuple(tokens.tolist())
            for source in COUNTS
            for tokens, _ in data.documents(source, split).read(
                range(len(data.documents(source, split)))
            )
        }
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == sum(COUNTS.values())
    assert not train & validation
    x, _, _ = stream(data, split="validation", length=1024, packing="best_fit").batch(0)
    for row in x["token_ids"].tolist():
        assert tuple(row[: row.index(2) + 1]) in validation


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "batch_size"),
        ({"length": 1.5}, "sequence_length"),
        ({"packing": "tight"}, "best_fit"),
        ({"split": "test"}, "split='test'"),
        ({"hosts": 3, "host": 0}, "batch_size=8, hosts=3"),
        ({"hosts": 2, "host": 2}, "host=2"),
        ({"hosts": 2}, "together"),
        ({"mixture": mixture_from_weights({"poems": 1})}, "no documents .*poems"),
    ],
)
def test_nonsense_is_refused(data, options, says):
    with pytest.raises(ValueError, match=says):
        stream(data, **options)
