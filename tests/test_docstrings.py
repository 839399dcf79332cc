"""Public functions are annotated, and the examples of docstrings run as they stand."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import keras_openllama

pytestmark = pytest.mark.backend_free  # The examples are written for JAX.

ROOT = Path(keras_openllama.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Named as `-k` of pytest can choose them: `checkpoints`, `config`.
PARTS = sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES})
WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text()]


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def is_public(name):
    return not name.startswith("_") or name in ("__init__", "__call__")


def public_functions(body, prefix=""):
    """Yields the name and the node of each public function and method."""
    for node in body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and is_public(node.name):
            yield prefix + node.name, node


def missing_annotations(function):
    """Yields the names of arguments without a type, and "return"."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    for argument in positional + arguments.kwonlyargs:
        if argument.annotation is None and argument.arg not in ("self", "cls"):
            yield argument.arg
    # `-> None` goes without saying where nothing is returned.
    returned = [
        node.value for node in ast.walk(function) if isinstance(node, ast.Return)
    ]
    if function.returns is None and any(
        value is not None and not is_none(value) for value in returned
    ):
        yield "return"


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


@pytest.mark.parametrize("part", PARTS)
def test_public_functions_have_type_annotations(part):
    missing = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0].removesuffix(".py") == part:
            for name, function in public_functions(ast.parse(path.read_text()).body):
                missing += [
                    f"{path.relative_to(ROOT)}:{function.lineno} {name}: {argument}"
                    for argument in missing_annotations(function)
                ]
    assert not missing, "\n".join(missing)


@pytest.fixture
def nano():
    return keras_openllama.OpenLlamaCausalLM.from_preset("open_llama_nano")


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name_of)
def test_examples_of_docstrings_run(path, tmp_path, monkeypatch, request):
    """They may use `lm`, which is `open_llama_nano`, and write into their directory."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name_of(path))
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        if any(re.search(r"\blm\b", step.source) for step in example.examples):
            example.globs["lm"] = request.getfixturevalue("nano")
        failures = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
            example, out=failures.append
        )
        assert not failures, "".join(failures)


def type_checking_imports(tree):
    """Yields module and name of each import that only type checkers carry out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom):
                    for alias in statement.names:
                        yield statement.module, alias.name


def test_imports_for_type_checkers_exist():
    imports = {
        pair
        for path in FILES
        for pair in type_checking_imports(ast.parse(path.read_text()))
        if pair[0].startswith("keras_openllama")
    }
    missing = []
    for module, name in sorted(imports):
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}.{name}")
    assert not missing and len(imports) > 20
