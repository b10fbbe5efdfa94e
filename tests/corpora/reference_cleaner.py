"""A second implementation of the cleaning and of every format's reading, to hold against the pipeline's output.

It is written from the rules in examples/pretraining/CORPORA.md and in the docstrings, character by character and with
whole files in memory, and calls nothing of the package. By hand, on any files::

    python -m tests.corpora.reference_cleaner book.txt oscar.jsonl.gz pile.jsonl.zst

reads the texts of each file, puts control characters and other trouble into them, writes them in every format, prepares
each of these files, and counts the documents that differ from what is expected.
"""

import argparse
import bz2
import gzip
import io
import itertools
import json
import logging
import lzma
import random
import re
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import zstandard

BREAKS = "\v\f\u2028\u2029"
SPACES = "\x1c\x1d\x1e\x1f\x85"
NOTHING_TO_SEE = "\u061c\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd"


def clean(text):
    """The text as it must stand in a shard; "" when nothing of it is left."""
    out = []
    for character in text.replace("\r\n", "\n"):
        if "\ud800" <= character <= "\udfff":
            out.append("\ufffd")
        elif character == "\r" or character in BREAKS:
            out.append("\n")
        elif character in SPACES:
            out.append(" ")
        elif character in "\t\n" or unicodedata.category(character) != "Cc":
            out.append(character)
    lines = unicodedata.normalize("NFC", "".join(out)).split("\n")
    kept = [line for line in lines if any(not (c.isspace() or c in NOTHING_TO_SEE) for c in line)]
    text = "\n".join(kept)
    while text[:1] == "\ufeff":
        text = text[1:]
    return text


TROUBLE = [
    *(chr(code) for code in range(0x20)),
    *(chr(code) for code in range(0x7F, 0xA1)),
    *(
        "\r\n",
        "\n\n",
        "\n \u3000\n",
        "\u2028",
        "\u2029",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "e\u0301",
        "\u0344",
        "\uac00\u11a8",
    ),
    *("<s>", "</s>", "<mask>", '{"text": "x"}', "\U0001f469\u200d\U0001f467", "\u202e", "\ufb01", "\u2581"),
]


def troubled(text, rng, surrogates):
    """The text with some of `TROUBLE` at random places."""
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(2, 12)))
    trouble = [*TROUBLE, "\ud800", "\udfff"] if surrogates else TROUBLE
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    text = "".join(piece + rng.choice(trouble) for piece in pieces[:-1]) + pieces[-1]
    # two halves that happen to meet are one character
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def json_of(texts, key="text", **more):
    """JSON lines in which every other text stands raw, U+0085 and U+2028 included; surrogates are always escaped."""
    lines = []
    for number, text in enumerate(texts):
        raw = number % 2 == 0 and not re.search("[\ud800-\udfff]", text)
        lines.append(json.dumps({key: text, **more}, ensure_ascii=not raw))
    return "".join(line + "\n" for line in lines).encode()


def zstd_frames(data):
    step = -(-len(data) // 3)
    return b"".join(zstandard.ZstdCompressor().compress(data[i : i + step]) for i in range(0, len(data), step))


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_of(texts):
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, "meta": ["{}"] * len(texts)}), file, row_group_size=7)
    return file.getvalue()


def oscar_23_of(texts):
    metadata = {"identification": {"label": "fr", "prob": 0.5}, "quality_warnings": None, "harmful_pp": 3.0}
    return zstd_frames(json_of(texts, "content", warc_headers={}, metadata=metadata))


def text_of(texts):
    return "\n\n".join(texts).encode()


# name of the file -> bytes of it, and whether it can hold unpaired surrogates
JSON_FORMATS = {
    "a.jsonl": (json_of, True),
    "a.jsonl.zst": (lambda texts: zstd_frames(json_of(texts)), True),
    "a.json.gz": (lambda texts: gzip.compress(json_of(texts)), True),
    "a.jsonl.bz2": (lambda texts: bz2.compress(json_of(texts)), True),
    "a.jsonl.xz": (lambda texts: lzma.compress(json_of(texts), preset=1), True),
    "a.jsonl.zst.tar": (
        lambda texts: tar_of({f"{k}.zst": zstd_frames(json_of(texts[k::2])) for k in range(2) if texts[k::2]}),
        True,
    ),
    "fr_meta_part_1.jsonl.zst": (oscar_23_of, True),
    "utf16.jsonl": (lambda texts: json_of(texts).decode().encode("utf-16"), False),
    "a.parquet": (parquet_of, False),
}
TEXT_FORMATS = {
    "a.txt": text_of,
    "fr.txt.gz": lambda texts: gzip.compress(text_of(texts)),
    "fr.txt.zst": lambda texts: zstd_frames(text_of(texts)),
    "a.tar": lambda texts: tar_of({"x/a.txt": text_of(texts), "README": b"no text"}),
    "utf16.txt": lambda texts: text_of(texts).decode().encode("utf-16"),
}


def documents_of_text(data, compressed):
    """A text is cut where one or more lines of nothing but ASCII white space stand.

    A compressed one without them has a document in every line, as OSCAR 2019's files have.
    """
    documents, current = [], []
    for line in data.decode().split("\n"):
        if line.strip(" \t\r\v\f"):
            current.append(line)
        elif current:
            documents.append("\n".join(current))
            current = []
    documents += ["\n".join(current)] if current else []
    return documents[0].split("\n") if compressed and len(documents) == 1 else documents


def cases(texts, seed):
    """Yields (name of a file, its bytes, the set of documents that must come out of it)."""
    rng = random.Random(seed)
    for name, (write, surrogates) in JSON_FORMATS.items():
        given = [troubled(text, rng, surrogates) for text in texts]
        yield name, write(given), {clean(text) for text in given} - {""}
    for name, write in TEXT_FORMATS.items():
        given = [troubled(text, rng, False) for text in texts]
        documents = documents_of_text(text_of(given), name.endswith((".gz", ".zst")))
        yield name, write(given), {clean(text) for text in documents} - {""}


def texts_in(path):
    """The texts of a file, read with the standard library and zstandard alone."""
    data = path.read_bytes()
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile()]
            return [text for m in members for text in texts_of(m.name, archive.extractfile(m).read())]
    return texts_of(path.name, data)


def texts_of(name, data):
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        if name.endswith(suffix):
            name, data = name.removesuffix(suffix), module.decompress(data)
    if name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
        name, data = name.removesuffix(".zst"), reader.read()
    if not name.endswith((".jsonl", ".json")) and data[:1] != b"{":
        return [data.decode("utf-8")]
    records = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    found = [record.get("text", record.get("content")) for record in records]
    return ["\n\n".join(text) if isinstance(text, list) else text for text in found]


def differences(name, data, expected, folder):
    """(documents expected, missing, unexpected) of one file's preparation in ``folder``."""
    from tests.corpora.formats import documents_of, prepare

    folder.mkdir()
    (folder / name).write_bytes(data)
    # the cleaning alone: no line is wrapped and no document dropped but for being empty or a duplicate
    flags = ["--max-line-size", 0, "--drop-annotation", "none", "--strict", "--valid-fraction", 0.2]
    prepare(folder / name, "--output", folder / "out", *flags)
    found = {document for split in ("train", "valid") for document in documents_of(folder / "out", split)}
    return len(expected), expected - found, found - expected


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    differing = 0
    for path in arguments.files:
        texts = [text for text in texts_in(path) if text]
        documents = 0
        for name, data, expected in cases(texts, arguments.seed):
            with tempfile.TemporaryDirectory() as folder:
                stdout, sys.stdout = sys.stdout, io.StringIO()
                try:
                    number, missing, unexpected = differences(name, data, expected, Path(folder) / "case")
                finally:
                    sys.stdout = stdout
            documents += number
            differing += len(missing) + len(unexpected)
            for text in list(missing | unexpected)[:3]:
                print(f"  {name}: {text[:200]!r}")
        formats = len(JSON_FORMATS) + len(TEXT_FORMATS)
        print(f"{path.name}: {len(texts)} texts, {formats} formats, {documents} documents expected", flush=True)
    print(f"{differing} documents differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
