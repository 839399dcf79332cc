"""Mixtures: weights, schedules, and which source each row comes from."""

import json
import logging

import numpy as np
import pytest

from keras_openllama.data import mixture as mixtures
from keras_openllama.data.mixture import PERIOD, Interleaving

pytestmark = pytest.mark.backend_free


def test_v1_is_redpajama_by_its_published_tokens():
    mixture = mixtures.load("v1")
    weights = mixture.weights_at(0)
    assert weights["commoncrawl"] == pytest.approx(878 / 1210)
    assert weights["stackexchange"] == pytest.approx(20 / 1210)
    assert len(weights) == 7
    assert {source["text_field"] for source in mixture.sources.values()} == {"text"}


def test_v2_is_refinedweb_starcoder_and_parts_of_redpajama():
    mixture = mixtures.load("v2")
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


@pytest.mark.parametrize("name", mixtures.available())
def test_every_weight_says_where_it_is_from(name):
    mixture = mixtures.load(name)
    for source in mixture.sources.values():
        assert "published" in source["weight_is"] or "heuristic" in source["weight_is"]
        assert source["url"].startswith("https://")


def test_missing_sources_leave_their_share_to_the_others_and_it_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        mixture = mixtures.load("v2").restricted_to(["wikipedia", "books"])
    assert mixture.weights_at(0) == pytest.approx({"wikipedia": 0.48, "books": 0.52})
    [record] = caplog.records
    assert "without refinedweb, starcoder, arxiv, stackexchange" in record.message
    assert "wikipedia 48.00%" in record.message
    caplog.clear()
    assert mixture.restricted_to(["wikipedia", "books"]) is mixture
    assert not caplog.records


def test_a_source_of_another_mixture_is_refused():
    with pytest.raises(ValueError, match=r"no source 'refinedweb'.*commoncrawl"):
        mixtures.load("v1").restricted_to(["refinedweb"])
    with pytest.raises(ValueError, match="weights"):
        mixtures.load("v1").restricted_to([])


def test_weights_change_from_a_step_on_and_are_stored():
    mixture = mixtures.from_weights({"a": 1, "b": 1}).changed(100, {"a": 3, "b": 1})
    assert mixture.weights_at(99) == {"a": 0.5, "b": 0.5}
    assert mixture.weights_at(100) == {"a": 0.75, "b": 0.25}
    again = mixtures.from_json(json.loads(json.dumps(mixture.to_json())))
    assert again == mixture
    # What was planned for later is dropped.
    assert [step for step, _ in mixture.changed(50, {"b": 1}).schedule] == [0, 50]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "'name' and 'sources'"),
        ([1], "'name' and 'sources'"),
        ({"name": "x", "sources": {"a": {}}}, "'weight'"),
        ({"name": "x", "sources": {"a": {"weight": -1}}}, "from 0 on"),
        ({"name": "x", "sources": {"a": {"weight": 0}}}, "from 0 on"),
        ({"name": "x", "sources": {"a": {"weight": "much"}}}, "from 0 on"),
        ({"name": "x", "sources": {"a": {"weight": float("nan")}}}, "from 0 on"),
        (
            {"name": "x", "sources": {}, "schedule": [{"from_step": 5, "weights": {}}]},
            "begin at step 0",
        ),
    ],
)
def test_nonsense_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        mixtures.from_json(data)


def test_a_file_or_a_name_is_needed(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "sources": {"a": {"weight": 2}}}')
    assert mixtures.load(str(path)).weights_at(0) == {"a": 1.0}
    with pytest.raises(ValueError, match="v1, v2"):
        mixtures.load("v3")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is not JSON"):
        mixtures.load(str(path))


# --- Rows ---

WEIGHTS = mixtures.load("v2").weights_at(0)
NAMES = list(WEIGHTS)


def test_shares_are_right_in_any_stretch_of_rows_to_two_rows():
    rows = Interleaving([(0, WEIGHTS)], NAMES)
    sources, _ = rows.rows(0, 3 * PERIOD)
    for first, last in ((0, 100), (1000, 3048), (PERIOD - 7, PERIOD + 2041)):
        counts = np.bincount(sources[first:last], minlength=len(NAMES))
        wanted = np.array([WEIGHTS[name] for name in NAMES]) * (last - first)
        assert np.abs(counts - wanted).max() <= 2
    shares = np.bincount(sources) / len(sources)
    assert np.abs(shares - np.array([*WEIGHTS.values()])).max() < 1 / PERIOD


def test_rows_of_a_source_are_numbered_without_gaps():
    rows = Interleaving([(0, WEIGHTS)], NAMES)
    sources, numbers = rows.rows(0, 5000)
    for source in range(len(NAMES)):
        mine = numbers[sources == source]
        assert (mine == np.arange(len(mine))).all()


def test_any_place_is_found_without_what_comes_before():
    schedule = [
        (0, WEIGHTS),
        (70_001, {"books": 1.0}),
        (70_010, {"arxiv": 0.5, "books": 0.5}),
    ]
    rows = Interleaving(schedule, NAMES)
    sources, numbers = rows.rows(0, 150_000)
    for first, last in ((5, 5), (69_990, 70_020), (70_001, 70_002), (140_000, 150_000)):
        found = rows.rows(first, last) if last > first else None
        if found:
            np.testing.assert_array_equal(found[0], sources[first:last])
            np.testing.assert_array_equal(found[1], numbers[first:last])
        counts = np.bincount(sources[:first], minlength=len(NAMES))
        np.testing.assert_array_equal(rows.rows_before(first), counts)
    assert {NAMES[i] for i in sources[70_001:70_010]} == {"books"}
    assert {NAMES[i] for i in sources[70_010:]} == {"arxiv", "books"}


def test_a_tiny_source_does_not_vanish():
    rows = Interleaving([(0, {"large": 1.0, "tiny": 1e-9})], ["large", "tiny"])
    assert rows.rows_before(PERIOD).tolist() == [PERIOD - 1, 1]


def test_the_order_of_rows_never_changes():
    # Runs that were begun with another version go on with this one.
    rows = Interleaving([(0, WEIGHTS)], NAMES)
    sources, numbers = rows.rows(10**12, 10**12 + 12)
    assert sources.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert numbers[0] == 622970581054
