"""The code of the README and the guides runs, and their commands parse.

A block is fenced, and a comment before it may say what the tests do with it:

- ```` ```python ```` blocks of a page run in order, in one namespace and an empty
  directory. After `<!-- test: compile only (why) -->` a block is only compiled.
- In ```` ```bash ```` blocks each `keras-openllama` command must parse. After
  `<!-- test: run -->` the block is run, too.
"""

import argparse
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest
from checkout import ROOT

from keras_openllama.__main__ import COMMANDS, main

pytestmark = pytest.mark.backend_free

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<mark>[^\n]*) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARKS = re.compile(r"compile only \(.+\)|run")
# Options of other programs.
OTHER_FLAGS = {
    "--apply_chat_template",
    "--enable-lora",
    "--fewshot_as_multiturn",
    "--lora-modules",
    "--model",
    "--model_args",
    "--spot",
    "--system_instruction",
}
# Words that end a command.
OPERATORS = {"<", ">", ">>", "|", "&&", "||", ";", "&", "--"}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """Yields `(language, first line, mark, source)` of the blocks of the languages."""
    text = page.read_text("utf-8")
    for block in BLOCK.finditer(text):
        if block["language"] in languages:
            line = text.count("\n", 0, block.start("source")) + 1
            yield block["language"], line, block["mark"] or "", block["source"]


def commands(source):
    """Yields the arguments of each `keras-openllama` in shell code, quoted ones too.

    >>> [*commands("x 'a && .venv/bin/keras-openllama plot run' # b")]
    [['plot', 'run']]
    """
    pending = ""
    for line in source.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # A quoted string continues on the next line.
            continue
        pending = ""
        for place, word in enumerate(words):
            if word.endswith("keras-openllama"):
                rest = words[place + 1 :]
                yield [*itertools.takewhile(lambda word: word not in OPERATORS, rest)]
            elif "keras-openllama " in word:
                yield from commands(word)
    assert not pending, f"no closing quotation: {pending}"


class Reached(BaseException):
    """The arguments of a command are parsed."""


@pytest.fixture
def parsing_only(monkeypatch):
    """Lets commands end when they have parsed their arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, arguments=None, namespace=None):
        original(parser, arguments, namespace)
        raise Reached

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def options_of(command, monkeypatch):
    """Returns the option strings of a command."""
    found = set()

    def parse_args(parser, arguments=None, namespace=None):
        found.update(parser._option_string_actions)
        raise Reached

    with monkeypatch.context() as patch, pytest.raises(Reached):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        main([command])
    return found


def test_commands_finds_the_commands_of_shell_code():
    source = "KEY=1 keras-openllama plot a \\\n  b > c\nrun 'x\n  keras-openllama d'\n"
    assert [*commands(source)] == [["plot", "a", "b"], ["d"]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_fenced_and_marked_as_the_tests_know(page):
    text = page.read_text("utf-8")
    for block in BLOCK.finditer(text):
        assert block["language"], f"a block without a language:\n{block['source']}"
        assert not block["mark"] or MARKS.fullmatch(block["mark"]), block["mark"]
    assert text.count("<!-- test:") == sum(
        bool(block["mark"]) for block in BLOCK.finditer(text)
    )
    outside = BLOCK.sub("", text)
    assert not re.findall(r"^    keras-openllama .*", outside, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_and_marked_shell_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ["PYTHONPATH"])
    monkeypatch.setenv("PATH", sys.prefix + "/bin" + os.pathsep + os.environ["PATH"])
    namespace = {"__name__": "__main__"}
    for language, line, mark, source in blocks(page, "python", "bash"):
        if language == "bash":
            if mark == "run":
                subprocess.run(["bash", "-euc", source], check=True)
            continue
        # Errors show the page's name and line.
        code = compile("\n" * (line - 1) + source, name_of(page), "exec")
        if not mark.startswith("compile only"):
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_shell_blocks_parse(page, parsing_only, capsys):
    for *_, source in blocks(page, "bash", "console"):
        for words in commands(source):
            try:
                main(words)
            except Reached:
                continue
            except SystemExit:
                error = capsys.readouterr().err
                pytest.fail(f"keras-openllama {shlex.join(words)}\n{error}")
            pytest.fail(f"parses no arguments: {words}")


def test_options_named_in_text_exist(monkeypatch):
    known = set(OTHER_FLAGS)
    for command in {*COMMANDS} - {"lm-eval"}:  # Its options are the harness's.
        known |= options_of(command, monkeypatch)
    for page in PAGES:
        text = BLOCK.sub("", page.read_text("utf-8"))
        for code in re.findall(r"`([^`\n]+)`", text):
            # Those of other programs are left to them.
            if code.startswith(("--", "keras-openllama", "finetune", "pretrain")):
                named = {*re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", code)}
                assert named <= known, f"{name_of(page)}: {named - known}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_modules_and_make_targets_named_in_text_exist(page):
    text = page.read_text("utf-8")
    folders = "benchmarks|docs|examples|keras_openllama|presets|tests|train"
    for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", text):
        # "NAME" stands for any.
        assert (ROOT / path).exists() or re.search(r"\bNAME\b", path), path
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for name in re.findall(r"`(keras_openllama(?:\.\w+)+)`", text):
        importable(name)


def importable(name):
    """Fails unless a dotted name is a module, or an attribute of one."""
    for end in range(name.count(".") + 1, 0, -1):
        parts = name.split(".")
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return
    raise ModuleNotFoundError(name)
