"""The site builds without a warning, has every public name, and works offline."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from checkout import ROOT

import keras_openllama

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` fails on broken links, anchors and references."""
    directory = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return directory


def public_names():
    """Yields the public names of the package, dotted."""
    yield from (f"keras_openllama.{name}" for name in keras_openllama._MODULES)
    for namespace in keras_openllama._NAMESPACES:
        full = f"keras_openllama.{namespace}"
        yield full
        module = importlib.import_module(full)
        for name, value in vars(module).items():
            # What is imported into a module belongs to it if `__all__` has it.
            own = getattr(value, "__module__", None) == full
            if not name.startswith("_") and (
                own or name in getattr(module, "__all__", ())
            ):
                yield f"{full}.{name}"
    yield from (
        "keras_openllama.convert.easylm.load",
        "keras_openllama.convert.easylm.save",
    )


def test_every_public_name_has_a_place_in_the_reference(site):
    pages = [path.read_text("utf-8") for path in site.glob("api/*.html")]
    anchors = {name for page in pages for name in re.findall(r' id="([^"]+)"', page)}
    missing = {*public_names()} - anchors
    assert not missing


def test_the_site_needs_no_network(site):
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        tags = re.findall(r"<(?:script|img|iframe|link)[^>]*>", text)
        # A link to the page's own address loads nothing.
        tags = [tag for tag in tags if "canonical" not in tag]
        loaded = [tag for tag in tags if re.search(r"(src|href)=\"?https?:", tag)]
        assert not loaded, path


def test_links_to_files_outside_the_site_lead_to_the_repository(site):
    text = (site / "index.html").read_text("utf-8")
    (license_link,) = {*re.findall(r'href="([^"]*LICENSE)"', text)}
    assert re.fullmatch(
        r"https://github\.com/[\w-]+/\w+/blob/main/LICENSE", license_link
    )
    assert 'href="generation.html"' in text


def test_relative_links_between_files_of_the_repository_exist():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]
    pages += [ROOT / "benchmarks" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor and linked.suffix == ".md":
                assert anchor in slugs(linked), f"{page.name}: {target}"


def slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
