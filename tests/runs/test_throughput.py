import pytest

from keras_openllama.runs.throughput import (
    PEAK_FLOPS,
    Clock,
    flops_per_token,
    peak_flops,
    speed_metrics,
)

pytestmark = pytest.mark.backend_free

# open_llama_7b, sequences of 2048 tokens.
FLOPS = flops_per_token(6_738_415_616, 32, 32, 128, 2048)


class FakeTime:
    """A time that advances only when `spend` is called."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def spend(self, clock, part, seconds):
        with clock.measure(part):
            self.seconds += seconds


def test_speed_metrics_reproduces_the_published_utilization():
    speed = speed_metrics(2200 * 256, 1.0, 256, FLOPS, peak_flops("TPU v4"))
    assert speed["tokens_per_second_per_chip"] == 2200
    assert round(speed["mfu"], 3) == 0.349


def test_flops_per_token_matches_the_formula():
    assert FLOPS == 6 * 6_738_415_616 + 12 * 32 * 4096 * 2048


@pytest.mark.parametrize(
    "one, other",
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
    ],
)
def test_peak_flops_is_equal_for_both_names_of_a_chip(one, other):
    assert peak_flops(one) == peak_flops(other) == PEAK_FLOPS[one]


def test_speed_metrics_has_no_mfu_if_the_peak_is_unknown():
    assert peak_flops("cpu") is None
    assert speed_metrics(100, 2.0, 5, FLOPS, peak_flops("cpu")) == {
        "tokens_per_second": 50,
        "tokens_per_second_per_chip": 10,
    }


@pytest.mark.parametrize("name", ["seconds", "chips"])
def test_speed_metrics_requires_positive_seconds_and_chips(name):
    arguments = {"tokens": 1, "seconds": 1.0, "chips": 1, name: 0}
    with pytest.raises(
        ValueError, match=f"`{name}` must be positive. Received: {name}=0"
    ):
        speed_metrics(**arguments)


def test_clock_splits_time_and_counts_applied_steps_as_goodput():
    now = FakeTime()
    clock = Clock(start_time=90.0, now=now)  # Ten seconds of imports.
    now.spend(clock, "data", 1)
    now.spend(clock, "compute", 6)
    now.spend(clock, "data", 0.5)
    first = clock.step()
    assert first == {
        "data_seconds": 1.5,
        "compute_seconds": 6,
        "checkpoint_seconds": 0,
        "goodput": 6 / 17.5,
    }
    now.spend(clock, "compute", 4)
    now.spend(clock, "checkpoint", 2)
    assert clock.step(applied=False)["goodput"] == 6 / 23.5
    now.spend(clock, "compute", 5)
    now.seconds += 1.5  # An evaluation.
    third = clock.step()
    assert third["compute_seconds"] == 5 and third["checkpoint_seconds"] == 0
    assert third["goodput"] == clock.goodput() == 11 / 30
    assert clock.totals() == {
        "data": 1.5,
        "compute": 15,
        "checkpoint": 2,
        "other": 11.5,
    }


def test_clock_starts_when_it_is_created():
    now = FakeTime()
    clock = Clock(now=now)
    assert clock.goodput() == 0
    now.spend(clock, "compute", 3)
    assert clock.step()["goodput"] == 1


def test_measure_counts_and_ends_a_block_that_raises():
    now = FakeTime()
    clock = Clock(now=now)
    with pytest.raises(OSError), clock.measure("data"):
        now.seconds += 2
        raise OSError
    now.spend(clock, "compute", 1)
    assert clock.step()["data_seconds"] == 2


def test_measure_rejects_nested_and_unknown_parts():
    clock = Clock()
    with clock.measure("compute"), pytest.raises(RuntimeError, match="'compute'"):
        with clock.measure("data"):
            pass
    with pytest.raises(ValueError, match=r"must be one of data, .*part='evaluation'"):
        with clock.measure("evaluation"):
            pass
