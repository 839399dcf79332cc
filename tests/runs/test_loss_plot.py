"""Loss plots: smoothing, axes, files and the `plot` command."""

import math

import numpy as np
import pytest

from keras_openllama.cli.plot import main
from keras_openllama.runs import loss_plot
from keras_openllama.runs.loss_plot import (
    PlottedRun,
    exponential_average,
    loss_figure,
    read_runs,
    save_loss_plot,
)
from keras_openllama.runs.metrics_log import RunLog

pytestmark = pytest.mark.backend_free


def made_run(name, steps=200, tokens=1000, level=2.0, validation=()):
    noise = np.random.default_rng(0).normal(0, 0.05, steps)
    records = [
        {
            "step": step,
            "tokens": step * tokens,
            "loss": level + 8 / step + noise[step - 1],
            "data_seconds": 6.0,
            "compute_seconds": 29.0,
            "checkpoint_seconds": 1.0,
        }
        for step in range(1, steps + 1)
    ]
    evaluated = [{"step": step, "loss": level + 0.1} for step in validation]
    return PlottedRun(name, records, evaluated)


def write(directory, run):
    with RunLog(directory, 0) as log:
        for record in run.records:
            log.write_record(record)
        for record in run.validation:
            log.write_record({"kind": "validation", **record})


def lines(figure):
    [axes] = figure.axes
    return axes.get_lines()


def test_exponential_average_starts_at_the_first_value():
    assert exponential_average([4.0, 1.0, 1.0], 2) == pytest.approx([4, 2, 10 / 7])
    assert list(exponential_average([3.0, 5.0, 4.0], 1)) == [3, 5, 4]
    assert exponential_average([7.0] * 500, 100) == pytest.approx([7] * 500)


def test_exponential_average_ignores_non_finite_values():
    got = exponential_average([math.nan, 4.0, math.inf, 1.0], 2)
    assert math.isnan(got[0])
    assert got[1:] == pytest.approx([4, 4, 2])


def test_loss_figure_draws_faint_and_smooth_lines_and_validation_points():
    runs = [made_run("3b", validation=[100, 200]), made_run("7b", level=1.5)]
    figure = loss_figure(runs, smooth=10)
    faint, line, points, other_faint, other_line = lines(figure)
    assert {faint.get_color(), line.get_color(), points.get_color()} == {"C0"}
    assert {other_faint.get_color(), other_line.get_color()} == {"C1"}
    losses = [record["loss"] for record in runs[0].records]
    assert list(faint.get_ydata()) == losses
    assert list(line.get_ydata()) == list(exponential_average(losses, 10))
    assert list(points.get_xdata()) == [100_000, 200_000]
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["3b", "7b", "validation loss"]
    assert figure.axes[0].get_title(loc="left") == "Training and validation loss"
    assert "10 steps" in figure.axes[0].get_title(loc="right")


def test_loss_figure_without_smoothing_draws_one_line():
    [line] = lines(loss_figure([made_run("a")], smooth=1))
    assert line.get_alpha() is None


@pytest.mark.parametrize(
    "tokens, scale, label",
    [
        (4 << 20, 1e6, "tokens (millions)"),
        (4 << 23, 1e9, "tokens (billions)"),
        (10, 1, "tokens"),
    ],
)
def test_loss_figure_scales_the_token_axis(tokens, scale, label):
    figure = loss_figure([made_run("a", tokens=tokens)])
    assert figure.axes[0].get_xlabel() == label
    assert lines(figure)[0].get_xdata()[-1] == 200 * tokens / scale


def test_loss_figure_plots_against_steps_or_hours():
    run = made_run("a", validation=[50])
    *_, points = lines(loss_figure([run], x="step"))
    assert list(points.get_xdata()) == [50]
    line, _, points = lines(loss_figure([run], x="hours"))
    assert line.get_xdata()[-1] == pytest.approx(2.0)  # 200 steps of 36 seconds.
    assert list(points.get_xdata()) == pytest.approx([0.5])


def test_loss_figure_excludes_the_first_steps_from_the_y_range():
    run = made_run("a", steps=1000)
    low, high = loss_figure([run]).axes[0].get_ylim()
    assert 1.7 < low < 2.0
    assert 2.3 < high < 4


def test_save_loss_plot_draws_a_diverged_run(tmp_path):
    run = made_run("a")
    for record in run.records[100:]:
        record["loss"] = math.nan
    save_loss_plot([run], tmp_path / "loss.png")
    for record in run.records:
        record["loss"] = math.inf
    save_loss_plot([run], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"runs": []}, "`runs` must not be empty"),
        ({"x": "days"}, "must be one of tokens, step, hours. Received: x='days'"),
        ({"smooth": 0}, "must be a positive number of steps. Received: smooth=0"),
        (
            {"path": "loss.pdf"},
            r"must end in \.png or \.svg\. Received: path='loss\.pdf'",
        ),
        (
            {"runs": [PlottedRun("a", [{"step": 1, "loss": 2.0}])], "x": "hours"},
            "A record of a has no 'data_seconds'. Choose another x",
        ),
    ],
)
def test_save_loss_plot_rejects_invalid_arguments(tmp_path, arguments, message):
    good = {"runs": [made_run("a")], "path": tmp_path / "loss.png"}
    with pytest.raises(ValueError, match=message):
        save_loss_plot(**{**good, **arguments})
    assert not (tmp_path / "loss.png").exists()


def test_read_runs_names_colliding_runs_by_their_paths(tmp_path):
    directories = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for directory in directories:
        write(directory, made_run("", steps=3, validation=[2]))
    runs = read_runs(directories)
    assert [run.name for run in runs] == [*map(str, directories[:2]), "c"]
    assert [record["step"] for record in runs[0].validation] == [2]


def test_plot_command_saves_a_figure(tmp_path, capsys):
    write(tmp_path / "one", made_run("", validation=[10, 200]))
    write(tmp_path / "two", made_run("", steps=loss_plot._MANY + 1))
    for name, beginning in (("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml")):
        output = tmp_path / name
        directories = [str(tmp_path / "one"), str(tmp_path / "two")]
        main([*directories, f"--output={output}", "--smooth=20", "--x=hours"])
        assert output.read_bytes().startswith(beginning)
        assert output.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "one: step 200, 200,000 tokens, loss 2." in printed
    assert f"Plot: {output}" in printed


def test_plot_command_reports_missing_metrics(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main([str(tmp_path / "none")]) == 2
    assert "none has no metrics.jsonl. Pass" in capsys.readouterr().err
    RunLog(tmp_path / "new", 0).close()
    assert main([str(tmp_path / "new")]) == 2
    assert "new has no step yet" in capsys.readouterr().err
