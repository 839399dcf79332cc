import pytest

from keras_openllama.runs.throughput import (
    PEAK_FLOPS,
    Clock,
    flops_per_token,
    peak_flops,
    rates,
)

pytestmark = pytest.mark.backend_free

# open_llama_7b, rows of 2048 tokens.
A_TOKEN = flops_per_token(6_738_415_616, 32, 32, 128, 2048)


class Time:
    """Stands still until told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def spend(self, clock, part, seconds):
        with clock.measure(part):
            self.seconds += seconds


def test_openllamas_published_speed_is_the_published_utilization():
    speed = rates(2200 * 256, 1.0, 256, A_TOKEN, peak_flops("TPU v4"))
    assert speed["tokens_per_second_per_chip"] == 2200
    assert round(speed["mfu"], 3) == 0.349


def test_flops_are_those_counted_by_hand():
    assert A_TOKEN == 6 * 6_738_415_616 + 12 * 32 * 4096 * 2048


@pytest.mark.parametrize(
    "one, other",
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
    ],
)
def test_both_names_of_a_chip_have_one_peak(one, other):
    assert peak_flops(one) == peak_flops(other) == PEAK_FLOPS[one]


def test_where_the_peak_is_unknown_there_is_no_utilization():
    assert peak_flops("cpu") is None
    assert rates(100, 2.0, 5, A_TOKEN, peak_flops("cpu")) == {
        "tokens_per_second": 50,
        "tokens_per_second_per_chip": 10,
    }


@pytest.mark.parametrize("name", ["seconds", "chips"])
def test_no_time_and_no_chips_are_refused(name):
    arguments = {"tokens": 1, "seconds": 1.0, "chips": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0; it must be positive"):
        rates(**arguments)


def test_time_is_split_and_goodput_is_that_of_kept_steps():
    now = Time()
    clock = Clock(began=90.0, now=now)  # Ten seconds of imports.
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


def test_a_clock_begins_when_it_is_made():
    now = Time()
    clock = Clock(now=now)
    assert clock.goodput() == 0
    now.spend(clock, "compute", 3)
    assert clock.step()["goodput"] == 1


def test_a_part_that_fails_is_counted_and_ended():
    now = Time()
    clock = Clock(now=now)
    with pytest.raises(OSError), clock.measure("data"):
        now.seconds += 2
        raise OSError
    now.spend(clock, "compute", 1)
    assert clock.step()["data_seconds"] == 2


def test_parts_do_not_nest_and_have_known_names():
    clock = Clock()
    with clock.measure("compute"), pytest.raises(RuntimeError, match="'compute'"):
        with clock.measure("data"):
            pass
    with pytest.raises(ValueError, match="part='evaluation'; it is one of data, "):
        with clock.measure("evaluation"):
            pass
