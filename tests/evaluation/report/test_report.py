import json

import pytest

from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.report.measurements import read_results
from keras_openllama.evaluation.report.pictures import draw_chart, make_figure
from keras_openllama.evaluation.report.rendering import write_report
from keras_openllama.evaluation.report.tables import results_table

pytestmark = pytest.mark.backend_free

METRICS = published.load_published_table().metrics
RECORD = [metric.name for metric in METRICS].index("record/em")


def made_run(preset="open_llama_7b_v2", metrics=METRICS, name=None, **run):
    """A run whose values are 0.01 above those of its published column, or of 7B."""
    names = [name for name in ("limit", "num_fewshot", "apart") if name in run]
    settings = {name: run.pop(name) for name in names}
    column = published.column_of_preset(preset) or "7B"
    return {
        "run": {"name": name or preset, "preset": preset, "dtype": "float32", **run},
        "metrics": [
            {
                "task": metric.task,
                "metric": metric.metric,
                "value": metric.values[column] + 0.01,
                "stderr": 0.005,
                "version": metric.version,
                **settings,
            }
            for metric in metrics
        ],
        "skipped": {},
    }


def rows(text):
    """The cells of each table row by its first cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_table_of_one_run_shows_published_values_and_differences():
    got = rows(results_table([made_run()]))
    assert got["task/metric"] == ["measured", "published, 7Bv2", "difference"]
    assert got["hellaswag/acc_norm"] == ["0.760 ± 0.005", "0.75", "+0.010"]
    names = [metric.name for metric in METRICS]
    assert [name.split(" [")[0] for name in list(got)[2:-1]] == names
    assert got["**average**"] == ["**0.569**", "**0.56**", "**+0.009**"]


def test_table_adds_published_columns_of_other_models():
    got = rows(results_table([made_run()], ["LLaMA 7B"]))
    assert got["task/metric"][-1] == "LLaMA 7B"
    assert got["arc_easy/acc_norm"] == ["0.710 ± 0.005", "0.70", "+0.010", "0.52"]


def test_table_of_several_runs_has_a_column_for_each():
    runs = [made_run("7b_v2"), made_run("13b"), made_run("open_llama_nano")]
    got = rows(results_table(runs))
    heads = ["7b_v2", "13b", "open_llama_nano", "published, 7Bv2", "published, 13B"]
    assert got["task/metric"] == heads
    assert got["rte/acc"][-2:] == ["0.57", "0.64"]
    assert len(got["**average**"]) == 5


def test_average_of_some_metrics_names_their_number():
    got = rows(results_table([made_run(metrics=METRICS[:2])]))
    average = got["**average of the 2 measured**"]
    assert average == ["**0.355**", "**0.345**", "**+0.010**"]


def test_average_uses_metrics_that_all_runs_measured():
    got = rows(results_table([made_run(), made_run("13b", METRICS[:2])]))
    assert got["rte/acc"][1] == "–"
    assert got["**average of the 2 measured by all runs**"][0] == "**0.355**"
    disjoint = results_table(
        [made_run(metrics=METRICS[:1]), made_run("13b", METRICS[1:2])]
    )
    assert rows(disjoint)["average"] == ["–"] * 4


def test_table_of_an_unpublished_model_has_measured_values_only():
    text = results_table([made_run("open_llama_nano")])
    assert rows(text)["task/metric"] == ["measured"]
    assert "2023" not in text


def test_unpublished_tasks_have_their_own_table():
    run = made_run(metrics=METRICS[:1])
    run["metrics"] += [
        {"task": "lambada", "metric": "acc", "value": 0.7, "stderr": None},
        {"task": "lambada", "metric": "perplexity", "value": 5.0},
    ]
    text = results_table([run])
    before, after = text.split("Not in the published suite:")
    assert "lambada" not in before
    assert rows(after)["lambada/acc"] == ["0.700"]
    assert rows(after)["lambada/perplexity"] == ["5.000"]


def test_unpublished_tasks_have_no_average():
    run = made_run(metrics=())
    run["metrics"] = [{"task": "lambada", "metric": "acc", "value": 0.7}]
    assert "average" not in results_table([run])
    assert "2023" not in results_table([run])


@pytest.mark.parametrize(
    "run, expected",
    [
        ({"limit": 100}, "Only the first 100 documents of each task"),
        ({"limit": 0.25}, "Only 25 % of the documents of each task"),
        ({"num_fewshot": 5}, "**5 examples in each prompt** of anli_r1, "),
        ({"apart": True}, "tokenized separately, as in 2023."),
        ({"versions": {"lm_eval": "0.4.13"}}, "dtype float32, lm_eval 0.4.13."),
    ],
)
def test_table_describes_the_settings_of_a_run(run, expected):
    assert expected in results_table([made_run(**run)])


def test_table_lists_skipped_tasks_with_reasons():
    run = made_run(metrics=METRICS[:3])
    run["skipped"] = {"record": "its dataset is not in the cache"}
    assert "- record: its dataset is not in the cache" in results_table([run])
    assert "- 13b, record: its data" in results_table(
        [made_run(), {**run, "run": {"name": "13b"}}]
    )


def test_table_includes_perplexity_and_human_eval():
    run = made_run(metrics=())
    text = {"name": "novel", "perplexity": 8.125, "bits_per_byte": None}
    run |= {"perplexity": [text], "human_eval": {"pass@1": 0.125, "problems": 164}}
    assert rows(results_table([run]))["novel"] == ["8.12", "–"]
    assert rows(results_table([run]))["pass@1"] == ["0.125"]
    both = rows(results_table([run, made_run("13b", METRICS[:1])]))
    assert both["novel"] == ["8.12", "–", "–", "–"]
    assert both["pass@1"] == ["0.125", "–"]


def test_table_names_the_tasks_that_were_limited():
    run = made_run(metrics=METRICS[:2], limit=7)
    run["metrics"] += made_run(metrics=METRICS[2:4])["metrics"]
    assert f"Only the first 7 documents of {METRICS[0].task}, " in results_table([run])


def test_notes_on_joint_tokenization_are_omitted_for_separate_tokenization():
    note = "each answer was tokenized separately from its question"
    assert note in results_table([made_run()])
    assert note not in results_table([made_run(apart=True)])


def test_metrics_that_differ_from_2023_have_numbered_notes():
    text = results_table([made_run()])
    assert "| record/em [1] |" in text
    assert "| record/f1 [1] |" in text
    assert "| truthfulqa_mc/mc2 [2] |" in text
    assert f"- [1] {METRICS[RECORD].difference}" in text


def test_differences_of_a_column_are_noted_for_that_column_only():
    assert "- 7Bv2: In 2023 each answer was tokenized separately" in results_table(
        [made_run()]
    )
    assert "tokenized separately" not in results_table([made_run("7b")])


def test_table_notes_task_versions_not_compared_with_2023():
    run = made_run()
    run["metrics"][RECORD]["version"] = 3.0
    assert "Versions not compared with 2023: record 3.0 (not 2.0)." in results_table(
        [run]
    )


def test_runs_of_the_same_name_are_numbered():
    got = rows(results_table([made_run(), made_run()]))
    assert got["task/metric"][0] == "open_llama_7b_v2 (1)"


def bars(figure):
    [axes] = figure.axes
    return sorted(bar.get_width() for bar in axes.patches)


def test_figure_draws_published_values_behind_measured_ones():
    figure = make_figure([made_run(metrics=METRICS[:2])])
    assert bars(figure) == pytest.approx([0.34, 0.35, 0.35, 0.36])
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["measured", "published (7Bv2)", "± one standard error"]
    assert figure.get_suptitle() == "Evaluation of open_llama_7b_v2"


def test_figure_of_an_unpublished_model_has_measured_bars_only():
    figure = make_figure([made_run("open_llama_nano", METRICS[:2], limit=100)])
    assert len(bars(figure)) == 2
    assert len(figure.legends[0].get_texts()) == 2
    assert "first 100 documents" in figure.axes[0].get_title(loc="right")


def test_figure_names_the_run_that_was_limited():
    figure = make_figure([made_run(), made_run("13b", limit=9)])
    title = figure.axes[0].get_title(loc="right")
    assert title == "13b: Only the first 9 documents of each task"


def test_figure_draws_each_run_in_its_own_color():
    runs = [made_run(), made_run("13b", METRICS[:3]), made_run("open_llama_nano")]
    figure = make_figure(runs)
    assert len(bars(figure)) == (21 + 21) + (21 + 3) + 21
    assert len({bar.get_facecolor()[:3] for bar in figure.axes[0].patches}) == 3


def test_figure_omits_metrics_with_values_above_one():
    run = made_run(metrics=METRICS[:1])
    run["metrics"].append({"task": "lambada", "metric": "acc", "value": 0.7})
    run["metrics"].append({"task": "lambada", "metric": "perplexity", "value": 5.0})
    labels = [
        label.get_text() for label in make_figure([run]).axes[0].get_yticklabels()
    ]
    assert labels == ["anli_r1/acc", "lambada/acc"]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("metrics", [METRICS[:2], METRICS])
def test_figure_does_not_clip_its_texts(count, metrics):
    names = [
        "a fine-tuned model with a name that takes up half the width",
        "b",
        "c",
        "d",
    ]
    runs = [made_run(name=name, metrics=metrics) for name in names[:count]]
    figure = make_figure(runs)
    figure.draw_without_rendering()
    page = figure.bbox
    parts = [figure._suptitle, *figure.legends, *figure.axes[0].get_yticklabels()]
    for box in (part.get_window_extent() for part in parts):
        assert page.x0 <= box.x0 and box.x1 <= page.x1
        assert page.y0 <= box.y0 and box.y1 <= page.y1


def test_write_report_writes_a_table_and_two_charts(tmp_path):
    paths = write_report([made_run()], tmp_path / "report")
    names = ["table.md", "table.png", "table.svg"]
    assert paths == [str(tmp_path / "report" / name) for name in names]
    assert (tmp_path / "report" / "table.md").read_text() == results_table([made_run()])
    for name, beginning in (("table.png", b"\x89PNG"), ("table.svg", b"<?xml")):
        assert (tmp_path / "report" / name).read_bytes().startswith(beginning)


def test_write_report_without_drawable_metrics_writes_only_the_table(tmp_path):
    run = made_run(metrics=())
    assert write_report([run], tmp_path) == [str(tmp_path / "table.md")]
    with pytest.raises(ValueError, match="must have a metric with values between"):
        draw_chart([run], tmp_path / "table.png")


def test_read_results_returns_the_stored_results_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(made_run()))
    assert read_results(tmp_path) == made_run()


def test_read_results_rejects_a_directory_without_results(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no results\.json\. Pass an output dir"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no 'run' with a 'name'"),
        ('{"run": {"name": "a"}}', "has no list 'metrics'"),
        ('{"run": {"name": "a"}, "metrics": [{"task": "b"}]}', "without task, metric"),
        (
            '{"run": {"name": "a"}, "metrics": '
            '[{"task": "b", "metric": "acc", "value": "NaN"}]}',
            "value is not a number",
        ),
    ],
)
def test_read_results_rejects_malformed_files(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json.*{message}.*Run `evaluate`"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda path: results_table([]), "`runs` must not be empty"),
        (
            lambda path: results_table([made_run()], ["65B"]),
            "among GPT-J 6B.* Received: '65B'",
        ),
        (lambda path: draw_chart([], path / "a.png"), "`runs` must not be empty"),
        (
            lambda path: draw_chart([made_run()], path / "a.pdf"),
            r"must end in \.png or",
        ),
    ],
)
def test_report_functions_reject_invalid_arguments(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not any(tmp_path.iterdir())
