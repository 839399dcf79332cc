"""`make test` runs each test file once on each backend."""

import ast
import re
import sys

import pytest
from checkout import ROOT

from tests import run_backends

pytestmark = pytest.mark.backend_free

FILES = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}


def files_of(part):
    """The test files that pytest collects for a part."""
    ignored = tuple(
        f"{argument.removeprefix('--ignore=')}/"
        for argument in part.arguments
        if argument.startswith("--ignore=")
    )
    if ignored or not part.arguments:
        return {file for file in FILES if not file.startswith(ignored)}
    chosen = tuple(f"{argument}/" for argument in part.arguments)
    return {file for file in FILES if file.startswith(chosen)}


@pytest.mark.parametrize("backend", run_backends.BACKENDS)
def test_parts_of_have_each_test_file_once(backend):
    found = [f for part in run_backends.parts_of(backend) for f in files_of(part)]
    assert sorted(found) == sorted(FILES)


def test_modules_assign_their_marks_once():
    for file in FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert len(re.findall("^pytestmark = ", text, re.MULTILINE)) <= 1, file


def test_bit_exact_is_a_part():
    assert run_backends.BIT_EXACT in {p.name for p in run_backends.parts_of("jax")}


def test_directories_of_parts_have_tests():
    for parts in run_backends.DIRECTORIES.values():
        for directory in {*run_backends.OPTIMIZED}.union(*parts):
            assert any(f.startswith(f"tests/{directory}/") for f in FILES), directory


def test_first_names_parts():
    names = [p.name for b in run_backends.BACKENDS for p in run_backends.parts_of(b)]
    for first in run_backends.FIRST:
        assert any(name.startswith(first) for name in names), first


def test_slow_optimizes_every_program():
    for backend in run_backends.BACKENDS:
        assert all(p.optimized for p in run_backends.parts_of(backend, slow=True))
    fast = {p.name: p.optimized for p in run_backends.parts_of("jax")}
    assert fast["jax: parity, planning"]
    assert not fast["jax: cli, runs"]


@pytest.mark.parametrize(
    ("name", "optimized", "expected"),
    [
        ("jax: x", False, run_backends.FAST_COMPILATION | run_backends.SIMPLE_FUSIONS),
        (run_backends.BIT_EXACT, False, run_backends.FAST_COMPILATION),
        ("jax: x", True, {}),
        ("tensorflow", False, run_backends.FAST_TENSORFLOW),
        ("tensorflow", True, {}),
    ],
)
def test_run_compiles_fast_unless_the_part_is_optimized(
    name, optimized, expected, monkeypatch, tmp_path
):
    names = [*run_backends.FAST_COMPILATION, *run_backends.SIMPLE_FUSIONS]
    for variable in names:
        monkeypatch.delenv(variable, raising=False)
    command = [sys.executable, "-c", "import os; print(dict(os.environ))"]
    monkeypatch.setattr(run_backends, "pytest_command", lambda *_: command)
    part = run_backends.Part(name.split(":")[0], name, (), optimized)
    output = run_backends.run(part, slow=False, cache=tmp_path).output.decode()
    found = ast.literal_eval(output)
    assert {name: found[name] for name in names if name in found} == expected


def test_pytest_arguments_choose_one_part():
    (part,) = run_backends.parts_of("torch", ["tests/x.py", "-k", "y"])
    assert part.arguments == ("tests/x.py", "-k", "y")


REPORT = """<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1">
<testcase classname="tests.text.test_x" name="test_y[1]" time="2.5"/>
</testsuite></testsuites>"""


def test_read_report_counts_outcomes_and_names_tests(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    counts, tests = run_backends.read_report(path)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1}
    assert tests == [(2.5, "tests/text/test_x::test_y[1]")]


@pytest.mark.parametrize(
    ("code", "passed", "narrowed", "expected"),
    [
        (0, 1, False, True),
        (1, 1, False, False),
        (0, 0, False, False),
        (5, 0, False, False),
        (5, 0, True, True),
        (-9, 0, True, False),
    ],
)
def test_summary_fails_parts_that_ran_nothing(code, passed, narrowed, expected):
    counts = {"passed": passed, "failed": 0, "skipped": 0}
    result = run_backends.Result(code, counts, [], 1.0, b"")
    good, line = run_backends.summary(
        run_backends.Part("jax", "x", ()), result, narrowed
    )
    assert good is expected
    assert ("FAILED" in line) is not expected
