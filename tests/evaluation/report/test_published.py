import importlib.util
import re
from pathlib import Path

import pytest

from keras_openllama import presets
from keras_openllama.evaluation.report import published

pytestmark = pytest.mark.backend_free

TABLE = published.load_published_table()


def test_published_table_has_21_metrics_of_8_models():
    assert len(TABLE.metrics) == len({metric.key for metric in TABLE.metrics}) == 21
    assert len(TABLE.columns) == 8
    for metric in TABLE.metrics:
        assert tuple(metric.values) == TABLE.columns
        assert all(0 < value < 1 for value in metric.values.values())


@pytest.mark.parametrize("column", TABLE.columns)
def test_the_published_averages_are_the_means_of_their_columns(column):
    mean = published.average(metric.values[column] for metric in TABLE.metrics)
    assert round(mean, 2) == TABLE.average[column]


def test_published_values_are_in_their_rows_and_columns():
    by_name = {metric.name: metric for metric in TABLE.metrics}
    assert by_name["arc_easy/acc_norm"].values["LLaMA 7B"] == 0.52
    assert by_name["hellaswag/acc_norm"].values["7Bv2"] == 0.75
    assert by_name["truthfulqa_mc/mc1"].key == ("truthfulqa_mc1", "acc")
    assert by_name["truthfulqa_mc/mc2"].key == ("truthfulqa_mc2", "acc")
    assert by_name["record/em"].key == ("record", "em")


def test_published_tasks_are_unique_and_in_order():
    assert TABLE.tasks[:4] == ("anli_r1", "anli_r2", "anli_r3", "arc_challenge")
    assert len(TABLE.tasks) == 15


FOLDERS = "anli arc glue hellaswag openbookqa piqa super_glue truthfulqa winogrande"


@pytest.fixture(scope="module")
def harness():
    """Version and metrics of each harness task, read without its dataset."""
    spec = importlib.util.find_spec("lm_eval")
    found = {}
    for folder in FOLDERS.split():
        directory = Path(spec.origin).parent / "tasks" / folder
        for path in sorted(directory.rglob("*.yaml")):
            text = full_text(path)
            for name in re.findall(r"^task: (\S+)", path.read_text(), re.MULTILINE):
                [*_, version] = re.findall(r"^  version: (\S+)", text, re.MULTILINE)
                metrics = set(re.findall(r"^ *- metric: (\S+)", text, re.MULTILINE))
                found[name.strip('"')] = float(version), metrics
    return found


def full_text(path):
    """The text of a task's file, preceded by the file that it includes."""
    text = path.read_text()
    included = re.search(r"^include: (\S+)", text, re.MULTILINE)
    return full_text(path.parent / included[1]) + text if included else text


@pytest.mark.parametrize("metric", TABLE.metrics, ids=lambda metric: metric.name)
def test_published_metric_exists_in_the_harness_with_the_compared_version(
    metric, harness
):
    version, metrics = harness[metric.task]
    assert version == metric.version
    assert metric.metric in metrics


@pytest.mark.parametrize(
    "preset, column",
    [
        ("open_llama_7b_v2", "7Bv2"),
        ("7b_v2", "7Bv2"),
        ("3b_v3", "3Bv2"),
        ("hf://openlm-research/open_llama_13b", "13B"),
        ("open_llama_nano", None),
        ("runs/3b", None),
        (None, None),
    ],
)
def test_column_of_preset(preset, column):
    assert published.column_of_preset(preset) == column


def test_all_presets_except_nano_have_published_results():
    assert set(presets.registry()) - set(TABLE.presets) == {"open_llama_nano"}
    assert set(TABLE.presets.values()) <= set(TABLE.columns)


def test_average_rejects_an_empty_list():
    with pytest.raises(ValueError, match="`values` must not be empty"):
        published.average([])
