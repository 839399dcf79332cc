import json

import pytest

from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.report.measurements import read
from keras_openllama.evaluation.report.pictures import draw, figure_of
from keras_openllama.evaluation.report.rendering import write
from keras_openllama.evaluation.report.tables import table

pytestmark = pytest.mark.backend_free

METRICS = published.load().metrics
RECORD = [metric.name for metric in METRICS].index("record/em")


def made_run(preset="open_llama_7b_v2", metrics=METRICS, name=None, **run):
    """A run that measured a hundredth more than was published of its column, or 7B."""
    names = [name for name in ("limit", "num_fewshot", "apart") if name in run]
    settings = {name: run.pop(name) for name in names}
    column = published.column_of(preset) or "7B"
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
    """Cells of a table's lines by the first of them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_one_run_stands_beside_what_was_published():
    got = rows(table([made_run()]))
    assert got["task/metric"] == ["measured", "published, 7Bv2", "difference"]
    assert got["hellaswag/acc_norm"] == ["0.760 ± 0.005", "0.75", "+0.010"]
    names = [metric.name for metric in METRICS]
    assert [name.split(" [")[0] for name in list(got)[2:-1]] == names
    assert got["**average**"] == ["**0.569**", "**0.56**", "**+0.009**"]


def test_columns_of_other_models_can_be_added():
    got = rows(table([made_run()], ["LLaMA 7B"]))
    assert got["task/metric"][-1] == "LLaMA 7B"
    assert got["arc_easy/acc_norm"] == ["0.710 ± 0.005", "0.70", "+0.010", "0.52"]


def test_runs_stand_side_by_side():
    runs = [made_run("7b_v2"), made_run("13b"), made_run("open_llama_nano")]
    got = rows(table(runs))
    heads = ["7b_v2", "13b", "open_llama_nano", "published, 7Bv2", "published, 13B"]
    assert got["task/metric"] == heads
    assert got["rte/acc"][-2:] == ["0.57", "0.64"]
    assert len(got["**average**"]) == 5


def test_an_average_of_some_metrics_says_of_how_many():
    got = rows(table([made_run(metrics=METRICS[:2])]))
    average = got["**average of the 2 measured**"]
    assert average == ["**0.355**", "**0.345**", "**+0.010**"]


def test_runs_are_averaged_over_what_all_of_them_measured():
    got = rows(table([made_run(), made_run("13b", METRICS[:2])]))
    assert got["rte/acc"][1] == "–"
    assert got["**average of the 2 measured by all**"][0] == "**0.355**"
    apart = table([made_run(metrics=METRICS[:1]), made_run("13b", METRICS[1:2])])
    assert rows(apart)["average"] == ["–"] * 4


def test_a_model_that_was_not_published_has_its_measures_alone():
    text = table([made_run("open_llama_nano")])
    assert rows(text)["task/metric"] == ["measured"]
    assert "2023" not in text


def test_other_tasks_have_a_table_of_their_own():
    run = made_run(metrics=METRICS[:1])
    run["metrics"] += [
        {"task": "lambada", "metric": "acc", "value": 0.7, "stderr": None},
        {"task": "lambada", "metric": "perplexity", "value": 5.0},
    ]
    text = table([run])
    before, after = text.split("Beside the published suite:")
    assert "lambada" not in before
    assert rows(after)["lambada/acc"] == ["0.700"]
    assert rows(after)["lambada/perplexity"] == ["5.000"]


def test_only_other_tasks_have_no_average():
    run = made_run(metrics=())
    run["metrics"] = [{"task": "lambada", "metric": "acc", "value": 0.7}]
    assert "average" not in table([run])
    assert "2023" not in table([run])


@pytest.mark.parametrize(
    "run, said",
    [
        ({"limit": 100}, "Only the first 100 documents of each task"),
        ({"limit": 0.25}, "Only 25 % of the documents of each task"),
        ({"num_fewshot": 5}, "**5 examples in each prompt** of anli_r1, "),
        ({"apart": True}, "tokenized apart from questions, as in 2023."),
        ({"versions": {"lm_eval": "0.4.13"}}, "dtype float32, lm_eval 0.4.13."),
    ],
)
def test_the_table_says_how_a_run_was_made(run, said):
    assert said in table([made_run(**run)])


def test_the_table_says_what_was_skipped_and_why():
    run = made_run(metrics=METRICS[:3])
    run["skipped"] = {"record": "its data set is not in the cache"}
    assert "- record: its data set is not in the cache" in table([run])
    assert "- 13b, record: its data" in table(
        [made_run(), {**run, "run": {"name": "13b"}}]
    )


def test_perplexity_and_pass_rates_are_in_the_table():
    run = made_run(metrics=())
    text = {"name": "novel", "perplexity": 8.125, "bits_per_byte": None}
    run |= {"perplexity": [text], "human_eval": {"pass@1": 0.125, "problems": 164}}
    assert rows(table([run]))["novel"] == ["8.12", "–"]
    assert rows(table([run]))["pass@1"] == ["0.125"]
    both = rows(table([run, made_run("13b", METRICS[:1])]))
    assert both["novel"] == ["8.12", "–", "–", "–"]
    assert both["pass@1"] == ["0.125", "–"]


def test_only_some_tasks_may_be_limited():
    run = made_run(metrics=METRICS[:2], limit=7)
    run["metrics"] += made_run(metrics=METRICS[2:4])["metrics"]
    assert f"Only the first 7 documents of {METRICS[0].task}, " in table([run])


def test_what_only_holds_for_tokens_together_is_not_said_of_tokens_apart():
    note = "each answer was tokenized apart from its question"
    assert note in table([made_run()])
    assert note not in table([made_run(apart=True)])


def test_metrics_that_changed_since_2023_have_notes():
    text = table([made_run()])
    assert "| record/em [1] |" in text
    assert "| record/f1 [1] |" in text
    assert "| truthfulqa_mc/mc2 [2] |" in text
    assert f"- [1] {METRICS[RECORD].shift}" in text


def test_what_shifts_a_column_is_told_of_that_column():
    assert "- 7Bv2: In 2023 each answer was tokenized apart" in table([made_run()])
    assert "tokenized apart" not in table([made_run("7b")])


def test_another_version_of_a_task_is_told():
    run = made_run()
    run["metrics"][RECORD]["version"] = 3.0
    assert "Versions not compared with 2023: record 3.0 (not 2.0)." in table([run])


def test_runs_of_one_name_are_numbered():
    got = rows(table([made_run(), made_run()]))
    assert got["task/metric"][0] == "open_llama_7b_v2 (1)"


def bars(figure):
    [axes] = figure.axes
    return sorted(bar.get_width() for bar in axes.patches)


def test_a_metric_is_a_bar_with_what_was_published_behind_it():
    figure = figure_of([made_run(metrics=METRICS[:2])])
    assert bars(figure) == pytest.approx([0.34, 0.35, 0.35, 0.36])
    [legend] = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["measured", "published (7Bv2)", "± one standard error"]
    assert figure.get_suptitle() == "open_llama_7b_v2"


def test_a_model_that_was_not_published_has_its_bars_alone():
    figure = figure_of([made_run("open_llama_nano", METRICS[:2], limit=100)])
    assert len(bars(figure)) == 2
    assert len(figure.legends[0].get_texts()) == 2
    assert "first 100 documents" in figure.axes[0].get_title(loc="right")


def test_the_picture_says_which_run_was_limited():
    figure = figure_of([made_run(), made_run("13b", limit=9)])
    title = figure.axes[0].get_title(loc="right")
    assert title == "13b: Only the first 9 documents of each task"


def test_several_runs_are_as_many_colours():
    runs = [made_run(), made_run("13b", METRICS[:3]), made_run("open_llama_nano")]
    figure = figure_of(runs)
    assert len(bars(figure)) == (21 + 21) + (21 + 3) + 21
    assert len({bar.get_facecolor()[:3] for bar in figure.axes[0].patches}) == 3


def test_more_than_one_is_no_bar():
    run = made_run(metrics=METRICS[:1])
    run["metrics"].append({"task": "lambada", "metric": "acc", "value": 0.7})
    run["metrics"].append({"task": "lambada", "metric": "perplexity", "value": 5.0})
    labels = [label.get_text() for label in figure_of([run]).axes[0].get_yticklabels()]
    assert labels == ["anli_r1/acc", "lambada/acc"]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("metrics", [METRICS[:2], METRICS])
def test_nothing_of_a_picture_is_clipped(count, metrics):
    names = [
        "a fine-tuned model with a name that takes up half the width",
        "b",
        "c",
        "d",
    ]
    runs = [made_run(name=name, metrics=metrics) for name in names[:count]]
    figure = figure_of(runs)
    figure.draw_without_rendering()
    page = figure.bbox
    parts = [figure._suptitle, *figure.legends, *figure.axes[0].get_yticklabels()]
    for box in (part.get_window_extent() for part in parts):
        assert page.x0 <= box.x0 and box.x1 <= page.x1
        assert page.y0 <= box.y0 and box.y1 <= page.y1


def test_a_report_is_a_table_and_two_pictures(tmp_path):
    paths = write([made_run()], tmp_path / "report")
    names = ["table.md", "table.png", "table.svg"]
    assert paths == [str(tmp_path / "report" / name) for name in names]
    assert (tmp_path / "report" / "table.md").read_text() == table([made_run()])
    for name, beginning in (("table.png", b"\x89PNG"), ("table.svg", b"<?xml")):
        assert (tmp_path / "report" / name).read_bytes().startswith(beginning)


def test_where_there_is_nothing_to_draw_the_report_is_the_table(tmp_path):
    run = made_run(metrics=())
    assert write([run], tmp_path) == [str(tmp_path / "table.md")]
    with pytest.raises(ValueError, match="no metric between 0 and 1"):
        draw([run], tmp_path / "table.png")


def test_results_are_read(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(made_run()))
    assert read(tmp_path) == made_run()


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no results\.json; give a dir"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("[]", "holds no object"),
        ("{}", "has no 'run' with a 'name'"),
        ('{"run": {"name": "a"}}', "has no list 'metrics'"),
        ('{"run": {"name": "a"}, "metrics": [{"task": "b"}]}', "without task, metric"),
        (
            '{"run": {"name": "a"}, "metrics": '
            '[{"task": "b", "metric": "acc", "value": "NaN"}]}',
            "value is no number",
        ),
    ],
)
def test_malformed_results_are_refused_by_name(tmp_path, text, said):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json.*{said}.*run `evaluate`"):
        read(tmp_path)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda path: table([]), "runs is empty"),
        (lambda path: table([made_run()], ["65B"]), "column '65B' is not one of GPT-J"),
        (lambda path: draw([], path / "a.png"), "runs is empty"),
        (lambda path: draw([made_run()], path / "a.pdf"), r"it must end in \.png or"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, call, said):
    with pytest.raises(ValueError, match=said):
        call(tmp_path)
    assert not any(tmp_path.iterdir())
