"""Tasks are found by name, with data of the Hub or of a directory, or are left out."""

import json

import pytest
from local_tasks import write_own_task, write_tasks

from keras_openllama.evaluation import tasks
from keras_openllama.evaluation.report import published

pytestmark = pytest.mark.backend_free


def test_the_suite_has_the_tasks_of_the_published_table():
    names = tasks.task_names("openllama", ["hellaswag", "lambada_openai"])
    assert len(published.load_published_table().tasks) == 15
    assert names == [*published.load_published_table().tasks, "lambada_openai"]


def test_a_task_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="no task 'helaswag'"):
        tasks.task_names(None, ["helaswag"])
    with pytest.raises(ValueError, match="suite='llama'"):
        tasks.task_names("llama")


def test_a_task_without_its_data_is_left_out_and_the_others_are_loaded(tmp_path):
    data = write_tasks(tmp_path)
    loaded, skipped = tasks.load(["piqa", "arc_easy"], data)
    assert list(loaded["tasks"]) == ["arc_easy"]
    assert list(skipped) == ["piqa"]
    assert "DIR/piqa.jsonl" in skipped["piqa"]


def test_documents_of_a_directory_are_those_of_the_task(tmp_path):
    loaded, _ = tasks.load(["record"], write_tasks(tmp_path, count=3))
    documents = list(loaded["tasks"]["record"].eval_docs)
    assert [document["entities"] for document in documents] == [
        ["Beta One", "Gamma", "The Alpha"]  # As the task itself sorts them.
    ] * 3


def test_documents_that_are_not_the_tasks_are_named_with_their_file(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text(json.dumps({"question": "?"}) + "\n")
    _, skipped = tasks.load(["hellaswag"], tmp_path)
    assert str(path) in skipped["hellaswag"]
    assert "ctx_a" in skipped["hellaswag"]


def test_a_directory_of_data_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tasks.load(["piqa"], tmp_path / "nowhere")


def test_tasks_of_ones_own_are_found(tmp_path):
    write_own_task(tmp_path, "boolq.jsonl")
    data = write_tasks(tmp_path / "data", count=3)
    (data / "boolq.jsonl").rename(data / "mine.jsonl")
    assert tasks.task_names(None, ["mine"], tmp_path) == ["mine"]
    loaded, skipped = tasks.load(["mine"], data, tmp_path)
    assert not skipped
    assert len(loaded["tasks"]["mine"].eval_docs) == 3


def test_nothing_loaded_is_nothing_measured():
    assert tasks.run(None, {"tasks": {}}) == []
