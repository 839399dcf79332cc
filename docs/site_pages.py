"""MkDocs hook: pages of the site that are not files of docs/.

- `index.md` is the README.
- `guides/NAME.md` is made from `examples/NAME.py` by `build_guides`.
- `api/NAME.md` has the docstrings of one public class or namespace of the package.

Links to files outside docs/ lead to the repository (`repo_url` of mkdocs.yml).
"""

import ast
import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import build_guides  # noqa: E402

import keras_openllama  # noqa: E402

# Modules of a namespace that are public, too.
SUBMODULES = {
    "convert": ("easylm",),
    "evaluation": ("perplexity", "texts", "human_eval", "lm_eval_model"),
}
# Images outside docs/ that pages show.
IMAGES = {"presets/open_llama_nano/loss.png": "images/open_llama_nano_loss.png"}
# [text](target) and ![text](target), outside code.
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(```.*?^```|    .*?)$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def syntax_tree(module):
    """Returns the parsed source of a module, by its dotted name below the package."""
    path = ROOT / "keras_openllama" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text("utf-8"))


def first_line(name):
    """Returns the first line of the docstring of a public class or namespace."""
    node = syntax_tree(keras_openllama._MODULES.get(name, name))
    if name in keras_openllama._MODULES:
        (node,) = (n for n in node.body if getattr(n, "name", None) == name)
    return ast.get_docstring(node).splitlines()[0]


def public_names(module):
    """Returns the public names of a module without importing it.

    Args:
        module: string, dotted name below the package, such as `"layers"`.

    Returns:
        List of strings: `__all__` where the module has one; otherwise its constants,
        classes and functions without a leading underscore, in order.
    """
    body = syntax_tree(module).body
    names = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = [target.id for target in targets if isinstance(target, ast.Name)]
            if named == ["__all__"]:
                return ast.literal_eval(node.value)
            names += filter(str.isupper, named)
    return [name for name in names if not name.startswith("_")]


def class_page(name):
    """Returns the page of a public class."""
    module = f"keras_openllama.{keras_openllama._MODULES[name]}"
    return (
        f"# {name} {{#keras_openllama.{name}}}\n\n"
        f"::: {module}.{name}\n    options:\n      show_root_heading: false\n"
    )


def namespace_page(name):
    """Returns the page of a public namespace: each public name below a heading."""
    lines = [f"# {name} {{#keras_openllama.{name}}}", ""]
    lines += summary_of(f"keras_openllama.{name}")
    submodules = SUBMODULES.get(name, ())
    for public in public_names(name):
        if public not in submodules:
            lines += [f"::: keras_openllama.{name}.{public}", ""]
    for submodule in submodules:
        full = f"{name}.{submodule}"
        lines += [f"## {submodule} {{#keras_openllama.{full}}}", ""]
        lines += summary_of(f"keras_openllama.{full}")
        for public in public_names(full):
            lines += [
                f"::: keras_openllama.{full}.{public}",
                "    options:",
                "      heading_level: 3",
                "",
            ]
    return "\n".join(lines)


def summary_of(module):
    """The docstring of a module, without its members."""
    options = ["show_root_heading: false", "show_root_toc_entry: false", "members: []"]
    return [f"::: {module}", "    options:", *(f"      {o}" for o in options), ""]


def api_pages():
    """Returns the pages of the API reference, by their path in the site."""
    classes, namespaces = [*keras_openllama._MODULES], keras_openllama._NAMESPACES
    pages = {f"api/{name}.md": class_page(name) for name in classes}
    pages |= {f"api/{name}.md": namespace_page(name) for name in namespaces}
    names = (*classes, *namespaces)
    listed = [f"- [`{name}`]({name}.md): {first_line(name)}" for name in names]
    pages["api/index.md"] = "\n".join(
        [
            "# API reference",
            "",
            "These names are public. The rest of the package is private and may move.",
            "",
            *listed,
        ]
    )
    return pages


def on_config(config):
    """Lists the pages of the API reference in the navigation."""
    for entry in config.nav:
        if entry.get("API reference") == "api/":
            entry["API reference"] = [
                "api/index.md",
                *({Path(p).stem: p} for p in api_pages() if p != "api/index.md"),
            ]
    return config


def on_files(files, config):
    """Adds the generated pages."""
    pages = {"index.md": (ROOT / "README.md").read_text("utf-8"), **api_pages()}
    for guide in build_guides.guides():
        pages[f"guides/{guide.stem}.md"] = build_guides.page(guide, config.repo_url)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path, place in IMAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def source_path(page):
    """The path in the repository of the text that a page is made from."""
    if page.file.src_uri == "index.md":
        return "README.md"
    if page.file.src_uri.startswith("guides/"):
        return f"examples/{Path(page.file.src_uri).stem}.py"
    return f"docs/{page.file.src_uri}"


def on_page_markdown(markdown, page, config, files):
    """Rewrites links, which are right in the repository, for the site."""
    folder = posixpath.dirname(source_path(page))
    if page.file.src_uri.startswith("api/"):
        return markdown

    def rewritten(match):
        before, target, anchor, after = match.groups(default="")
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        guide = re.fullmatch(r"examples/(\w+)\.(py|ipynb)", path)
        if path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif path == "README.md":
            place = "index.md"
        elif path in IMAGES:
            place = IMAGES[path]
        elif guide and files.get_file_from_path(f"guides/{guide[1]}.md"):
            place = f"guides/{guide[1]}.md"
        elif not (ROOT / path).exists():
            raise PluginError(f"{source_path(page)} links to {target}: no such file")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{before}{config.repo_url}/{kind}/main/{path}{anchor}{after}"
        start = posixpath.dirname(page.file.src_uri)
        return before + os.path.relpath(place, start or ".") + anchor + after

    # Code is left as it is.
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])
