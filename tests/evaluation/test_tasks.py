"""Tasks are loaded by name, with data of the Hub or a directory, or skipped."""

import json

import pytest
from local_tasks import write_own_task, write_tasks

from keras_openllama.evaluation import tasks
from keras_openllama.evaluation.report import published

pytestmark = pytest.mark.backend_free


def test_task_names_of_the_suite_are_those_of_the_published_table():
    names = tasks.task_names("openllama", ["hellaswag", "lambada_openai"])
    assert len(published.load_published_table().tasks) == 15
    assert names == [*published.load_published_table().tasks, "lambada_openai"]


def test_task_names_rejects_unknown_tasks_and_suites():
    with pytest.raises(ValueError, match="no task 'helaswag'"):
        tasks.task_names(None, ["helaswag"])
    with pytest.raises(ValueError, match="suite='llama'"):
        tasks.task_names("llama")


def test_load_tasks_skips_tasks_without_data(tmp_path):
    data = write_tasks(tmp_path)
    loaded, skipped = tasks.load_tasks(["piqa", "arc_easy"], data)
    assert list(loaded["tasks"]) == ["arc_easy"]
    assert list(skipped) == ["piqa"]
    assert "DIR/piqa.jsonl" in skipped["piqa"]


def test_load_tasks_uses_documents_of_a_directory(tmp_path):
    loaded, _ = tasks.load_tasks(["record"], write_tasks(tmp_path, count=3))
    documents = list(loaded["tasks"]["record"].eval_docs)
    assert [document["entities"] for document in documents] == [
        ["Beta One", "Gamma", "The Alpha"]  # Sorted by the task.
    ] * 3


def test_load_tasks_names_the_file_of_invalid_documents(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text(json.dumps({"question": "?"}) + "\n")
    _, skipped = tasks.load_tasks(["hellaswag"], tmp_path)
    assert str(path) in skipped["hellaswag"]
    assert "ctx_a" in skipped["hellaswag"]


def test_load_tasks_rejects_a_missing_data_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tasks.load_tasks(["piqa"], tmp_path / "nowhere")


def test_load_tasks_finds_tasks_of_include_path(tmp_path):
    write_own_task(tmp_path, "boolq.jsonl")
    data = write_tasks(tmp_path / "data", count=3)
    (data / "boolq.jsonl").rename(data / "mine.jsonl")
    assert tasks.task_names(None, ["mine"], tmp_path) == ["mine"]
    loaded, skipped = tasks.load_tasks(["mine"], data, tmp_path)
    assert not skipped
    assert len(loaded["tasks"]["mine"].eval_docs) == 3


def test_evaluate_tasks_without_tasks_returns_no_metrics():
    assert tasks.evaluate_tasks(None, {"tasks": {}}) == []
