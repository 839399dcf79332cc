"""Mixtures: weights, schedules, and the source of each sequence."""

import json
import logging

import numpy as np
import pytest

from keras_openllama.data import mixture as mixtures
from keras_openllama.data.mixture import PERIOD, Interleaving

pytestmark = pytest.mark.backend_free


def test_mixture_v1_is_redpajama_with_its_published_tokens():
    mixture = mixtures.load_mixture("v1")
    weights = mixture.weights_at(0)
    assert weights["commoncrawl"] == pytest.approx(878 / 1210)
    assert weights["stackexchange"] == pytest.approx(20 / 1210)
    assert len(weights) == 7
    assert {source["text_field"] for source in mixture.sources.values()} == {"text"}


def test_mixture_v2_is_refinedweb_starcoder_and_parts_of_redpajama():
    mixture = mixtures.load_mixture("v2")
    assert mixture.names == [
        "refinedweb",
        "starcoder",
        "wikipedia",
        "arxiv",
        "books",
        "stackexchange",
    ]
    assert mixture.sources["refinedweb"]["text_field"] == "content"
    assert mixture.sources["starcoder"]["text_field"] == "content"
    assert sum(mixture.weights_at(0).values()) == pytest.approx(1)


@pytest.mark.parametrize("name", mixtures.available_mixtures())
def test_every_mixture_states_the_origin_of_its_weights(name):
    mixture = mixtures.load_mixture(name)
    for source in mixture.sources.values():
        assert "published" in source["weight_is"] or "heuristic" in source["weight_is"]
        assert source["url"].startswith("https://")


def test_restricted_to_redistributes_weights_and_warns(caplog):
    with caplog.at_level(logging.WARNING):
        mixture = mixtures.load_mixture("v2").restricted_to(["wikipedia", "books"])
    assert mixture.weights_at(0) == pytest.approx({"wikipedia": 0.48, "books": 0.52})
    [record] = caplog.records
    assert (
        "not available: refinedweb, starcoder, arxiv, stackexchange" in record.message
    )
    assert "wikipedia 48.00%" in record.message
    caplog.clear()
    assert mixture.restricted_to(["wikipedia", "books"]) is mixture
    assert not caplog.records


def test_restricted_to_rejects_a_source_of_another_mixture():
    with pytest.raises(ValueError, match=r"no source 'refinedweb'.*commoncrawl"):
        mixtures.load_mixture("v1").restricted_to(["refinedweb"])
    with pytest.raises(ValueError, match="weights"):
        mixtures.load_mixture("v1").restricted_to([])


def test_with_weights_changes_the_schedule_and_survives_json():
    mixture = mixtures.mixture_from_weights({"a": 1, "b": 1}).with_weights(
        100, {"a": 3, "b": 1}
    )
    assert mixture.weights_at(99) == {"a": 0.5, "b": 0.5}
    assert mixture.weights_at(100) == {"a": 0.75, "b": 0.25}
    again = mixtures.mixture_from_json(json.loads(json.dumps(mixture.to_json())))
    assert again == mixture
    # Later changes are dropped.
    assert [step for step, _ in mixture.with_weights(50, {"b": 1}).schedule] == [0, 50]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "'name' and 'sources'"),
        ([1], "'name' and 'sources'"),
        ({"name": "x", "sources": {"a": {}}}, "'weight'"),
        ({"name": "x", "sources": {"a": {"weight": -1}}}, "non-negative"),
        ({"name": "x", "sources": {"a": {"weight": 0}}}, "non-negative"),
        ({"name": "x", "sources": {"a": {"weight": "much"}}}, "non-negative"),
        ({"name": "x", "sources": {"a": {"weight": float("nan")}}}, "non-negative"),
        (
            {"name": "x", "sources": {}, "schedule": [{"from_step": 5, "weights": {}}]},
            "start at step 0",
        ),
        ({"name": "x", "sources": {}, "schedule": []}, "start at step 0"),
    ],
)
def test_mixture_from_json_rejects_invalid_data(data, message):
    with pytest.raises(ValueError, match=message):
        mixtures.mixture_from_json(data)


def test_load_mixture_accepts_a_file_or_a_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "sources": {"a": {"weight": 2}}}')
    assert mixtures.load_mixture(str(path)).weights_at(0) == {"a": 1.0}
    with pytest.raises(ValueError, match="v1, v2"):
        mixtures.load_mixture("v3")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is not valid JSON"):
        mixtures.load_mixture(str(path))


# --- Interleaving ---

WEIGHTS = mixtures.load_mixture("v2").weights_at(0)
NAMES = list(WEIGHTS)


def test_interleaving_has_exact_shares_to_two_sequences_in_any_range():
    interleaving = Interleaving([(0, WEIGHTS)], NAMES)
    sources, _ = interleaving.sequences(0, 3 * PERIOD)
    for first, last in ((0, 100), (1000, 3048), (PERIOD - 7, PERIOD + 2041)):
        counts = np.bincount(sources[first:last], minlength=len(NAMES))
        expected = np.array([WEIGHTS[name] for name in NAMES]) * (last - first)
        assert np.abs(counts - expected).max() <= 2
    shares = np.bincount(sources) / len(sources)
    assert np.abs(shares - np.array([*WEIGHTS.values()])).max() < 1 / PERIOD


def test_interleaving_numbers_the_sequences_of_a_source_without_gaps():
    interleaving = Interleaving([(0, WEIGHTS)], NAMES)
    sources, numbers = interleaving.sequences(0, 5000)
    for source in range(len(NAMES)):
        own = numbers[sources == source]
        assert (own == np.arange(len(own))).all()


def test_interleaving_supports_random_access():
    schedule = [
        (0, WEIGHTS),
        (70_001, {"books": 1.0}),
        (70_010, {"arxiv": 0.5, "books": 0.5}),
    ]
    interleaving = Interleaving(schedule, NAMES)
    sources, numbers = interleaving.sequences(0, 150_000)
    for first, last in ((5, 5), (69_990, 70_020), (70_001, 70_002), (140_000, 150_000)):
        found = interleaving.sequences(first, last) if last > first else None
        if found:
            np.testing.assert_array_equal(found[0], sources[first:last])
            np.testing.assert_array_equal(found[1], numbers[first:last])
        counts = np.bincount(sources[:first], minlength=len(NAMES))
        np.testing.assert_array_equal(interleaving.sequences_before(first), counts)
    assert {NAMES[i] for i in sources[70_001:70_010]} == {"books"}
    assert {NAMES[i] for i in sources[70_010:]} == {"arxiv", "books"}


def test_interleaving_includes_a_source_of_tiny_weight():
    interleaving = Interleaving([(0, {"large": 1.0, "tiny": 1e-9})], ["large", "tiny"])
    assert interleaving.sequences_before(PERIOD).tolist() == [PERIOD - 1, 1]


def test_interleaving_never_changes_between_versions():
    # Runs of other versions can be resumed with this one.
    interleaving = Interleaving([(0, WEIGHTS)], NAMES)
    sources, numbers = interleaving.sequences(10**12, 10**12 + 12)
    assert sources.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert numbers[0] == 622970581054
