"""The style of all plots, and writing them."""

import matplotlib
import pytest
from checkout import ROOT
from matplotlib.figure import Figure

from keras_openllama.utils import plots

pytestmark = pytest.mark.backend_free


def test_style_applies_inside_the_block_only():
    before = dict(matplotlib.rcParams)
    with plots.style():
        axes = Figure().subplots()
        assert matplotlib.rcParams["font.size"] == 11
    assert not axes.spines["right"].get_visible()
    assert dict(matplotlib.rcParams) == before


def test_style_does_not_depend_on_the_users_settings():
    with matplotlib.rc_context({"axes.facecolor": "black"}), plots.style():
        assert matplotlib.rcParams["axes.facecolor"] == "white"


@pytest.mark.parametrize("name, start", [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_save_writes_the_format_of_the_extension(name, start, tmp_path):
    for path in (tmp_path / name, tmp_path / f"again_{name}"):
        with plots.style():
            figure = Figure(figsize=(2, 1))
            figure.subplots().plot([1, 2])
            plots.save(figure, path)
        assert path.read_bytes().startswith(start)
    assert path.read_bytes() == (tmp_path / name).read_bytes()


def test_save_refuses_other_formats(tmp_path):
    with pytest.raises(
        ValueError, match=r"must end in \.png or \.svg\. Received.*a\.pdf"
    ):
        plots.save(Figure(), tmp_path / "a.pdf")


def test_every_module_that_draws_uses_the_style():
    paths = [
        path
        for folder in ("keras_openllama", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "plots.py"
        and "= Figure(" in (source := path.read_text("utf-8"))
        and "plots.style()" not in source
    ]
    assert paths == []
