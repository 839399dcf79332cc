"""Make notebooks and pages of the site from the guides, which are Python files.

    python docs/build_guides.py            # writes examples/NAME.ipynb
    python docs/build_guides.py --check    # fails if one is not up to date

A guide is `examples/NAME.py`, in the form of the guides of keras.io. It begins with a
docstring that is its header: `Title:`, `Author:`, `Date created:`, `Description:` and
`Accelerator:`. Every other string that is a statement of its own at the top level is
text in Markdown; what is between two of them is a code cell. Text that begins with a
line `shell` holds commands: they are a cell that runs them, with `!`, in the notebook,
and are not run with the Python file.

Colab and Kaggle open notebooks from GitHub, so they are in the repository, without
outputs.
"""

import argparse
import ast
import dataclasses
import posixpath
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FIELDS = ("Title", "Author", "Date created", "Description", "Accelerator")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A piece of a guide: `kind` is "text", "code" or "shell"."""

    kind: str
    source: str


def guides():
    """Returns the paths of all guides."""
    header = f'"""\n{FIELDS[0]}: '
    return [
        p for p in sorted(EXAMPLES.glob("*.py")) if p.read_text().startswith(header)
    ]


def repository():
    """Returns the address of the repository, `repo_url` of mkdocs.yml."""
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    return re.search(r"^repo_url: (\S+)", settings, re.MULTILINE)[1]


def parse(text):
    """Returns the header, a dict, and the cells of a guide.

    Args:
        text: string, the Python file.

    Raises:
        ValueError: if a field of the header is missing or unknown.
    """
    lines = text.splitlines()
    first, *nodes = ast.parse(text).body
    header = dict(
        line.split(": ", 1) for line in first.value.value.strip().splitlines()
    )
    if tuple(header) != FIELDS:
        raise ValueError(f"The header must have {FIELDS}. Received: {(*header,)}")
    cells, end = [], first.end_lineno
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            cells.append(Cell("code", "\n".join(lines[end : node.lineno - 1])))
            prose = node.value.value.strip("\n")
            shell = prose.startswith("shell\n")
            cells.append(
                Cell("shell", prose.removeprefix("shell\n"))
                if shell
                else Cell("text", prose)
            )
            end = node.end_lineno
    cells.append(Cell("code", "\n".join(lines[end:])))
    cells = [dataclasses.replace(cell, source=cell.source.strip()) for cell in cells]
    return header, [cell for cell in cells if cell.source]


def links(name, repo_url):
    """Returns the line of links to the guide's notebook and its source."""
    path = repo_url.removeprefix("https://github.com/")
    notebook = f"blob/main/examples/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{path}/{notebook}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={repo_url}/{notebook}"
    source = f"{repo_url}/blob/main/examples/{name}.py"
    return f"[Colab]({colab}) · [Kaggle]({kaggle}) · [Source]({source})"


def with_absolute_links(text, repo_url):
    """Returns text of a notebook whose relative links lead to the repository.

    Colab and Kaggle show a notebook without the files beside it.
    """

    def absolute(match):
        path = posixpath.normpath(posixpath.join("examples", match[3]))
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}{match[2]}({repo_url}/{kind}/main/{path})"

    return re.sub(r"(!?)(\[[^]]*\])\((?![a-z]+:)([^)\s]+)\)", absolute, text)


def introduction(name, header, repo_url):
    """Returns the first text of the notebook and of the page."""
    return "\n".join(
        [
            f"# {header['Title']}",
            "",
            links(name, repo_url),
            "",
            header["Description"],
            "",
            f"{header['Author']}, {header['Date created']}. "
            f"Accelerator: {header['Accelerator']}.",
        ]
    )


def page(path, repo_url):
    """Returns the page of the site, in Markdown."""
    header, cells = parse(path.read_text("utf-8"))
    parts = [introduction(path.stem, header, repo_url)]
    for cell in cells:
        if cell.kind == "text":
            parts.append(cell.source)
        else:
            language = "bash" if cell.kind == "shell" else "python"
            source = cell.source.replace("REPOSITORY", repo_url)
            parts.append(f"```{language}\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def notebook(path, repo_url):
    """Returns the notebook, as text."""
    header, cells = parse(path.read_text("utf-8"))
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    made = [text(introduction(path.stem, header, repo_url))]
    for cell in cells:
        if cell.kind == "text":
            made.append(text(with_absolute_links(cell.source, repo_url)))
        elif cell.kind == "code":
            made.append(code(cell.source))
        else:
            source = cell.source.replace("REPOSITORY", repo_url)
            commands = re.sub(r"\\\n\s*", "", source).splitlines()
            made.append(code("\n".join(f"!{command}" for command in commands)))
    for number, cell in enumerate(made):
        cell.id = f"cell-{number:02}"  # Random unless set.
    names = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": names, "language_info": {"name": "python"}}
    whole = nbformat.v4.new_notebook(cells=made, metadata=metadata)
    nbformat.validate(whole)
    return nbformat.writes(whole) + "\n"


def main():
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for path in guides():
        made, target = notebook(path, repository()), path.with_suffix(".ipynb")
        if not target.exists() or target.read_text("utf-8") != made:
            stale.append(target)
            if not options.check:
                target.write_text(made, "utf-8")
    for target in stale:
        state = "is not up to date: run make docs" if options.check else "written"
        print(f"{target.relative_to(ROOT)} {state}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
