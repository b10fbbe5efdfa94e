"""Writes small corpora in the real on-disk formats, and reads prepared shards back."""

import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tarfile
import threading

import zstandard
from tqdm import tqdm

from fairseq_implicit.commands import load
from fairseq_implicit.corpora.durable import sha256_of
from fairseq_implicit.corpora.problems import ReadProblem
from fairseq_implicit.corpora.readers import ReadOptions, read_source
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.sources import Source

# Strings that break careless readers; every one must come through a JSON file unchanged.
NAUGHTY = [
    "plain",
    "next\u0085line and \u2028 separators \u2029 inside",
    "<s> </s> <mask> <pad> madeupword0000",
    'quotes " \\ and {"text": "json inside"}',
    "emoji 👩‍👩‍👧 and 𝒜𝓈𝓉𝓇𝒶𝓁",
    "日本語　全角スペース",
    "e\u0301 not composed",
    "nul \x00 bell \x07 escape \x1b",
    "zero\u200bwidth\ufeffjoiner",
    "Ω≈ç√∫˜µ≤≥÷ ١٢٣",
    "' OR 1=1; -- DROP TABLE",
    "tab\tand trailing space ",
]


def pile_lines(texts, component="Pile-CC"):
    return [json.dumps({"text": text, "meta": {"pile_set_name": component}}) for text in texts]


def made_up_texts(number, seed, words=30):
    """Documents of one line, as many as wanted, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(rng.randrange(5, words))) for _ in range(number)]


def write_zst(path, lines, frames=1):
    """JSON lines in one or several concatenated zstd frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [(line + "\n").encode() for line in lines]
    step = -(-len(data) // frames)
    compressor = zstandard.ZstdCompressor(level=3)
    path.write_bytes(b"".join(compressor.compress(b"".join(data[i : i + step])) for i in range(0, len(data), step)))
    return path


def write_gz(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode() if isinstance(text, str) else text, mtime=0))
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def oscar_22(content, labels=None, language="en", probability=0.9):
    return json.dumps(
        {
            "content": content,
            "warc_headers": {"warc-target-uri": "http://example.org", "content-length": "1"},
            "metadata": {
                "identification": {"label": language, "prob": probability},
                "annotation": labels,
                "sentence_identifications": [None for _ in content.split("\n")],
            },
        }
    )


def oscar_23(content, labels=None, language="en", probability=0.9, perplexity=500.0, categories=None):
    return json.dumps(
        {
            "content": content,
            "warc_headers": {"warc-target-uri": "http://example.org"},
            "metadata": {
                "harmful_pp": perplexity,
                "tlsh": "tlsh:T1B6",
                "quality_warnings": labels,
                "categories": categories,
                "identification": {"label": language, "prob": probability},
                "sentence_identifications": [None for _ in content.split("\n")],
            },
        }
    )


def read(path, boundary="auto", **options):
    """(documents, problems) of one file."""
    items = list(read_source(Source(str(path)), ReadOptions(boundary, **options)))
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, ReadProblem)]


def run_command(name, *arguments):
    """Runs a command without catching what it raises; returns the exit status."""
    command, parser = load(name)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def prepare(*arguments):
    """Runs the command line in this process, errors included."""
    return run_command("prepare-corpus", *arguments)


def documents_of(folder, split="train"):
    """The documents of all shards of a split, in order."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{split}*.txt"))]
    return [document for text in texts for document in text.removesuffix("\n").split("\n\n")]


def checksums(folder):
    """SHA-256 of the text files of a finished preparation."""
    assert not (folder / "work").exists()
    names = [path.name for path in folder.iterdir() if path.suffix == ".txt" and path.name != "report.txt"]
    return {name: sha256_of(folder / name) for name in names}


def run_one(tmp_path, lines, *flags):
    """(documents, counts) of one JSON lines file."""
    folder = tmp_path / hashlib.md5(repr((lines, flags)).encode()).hexdigest()
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    prepare(folder / "a.jsonl", "--output", folder / "out", "--valid-fraction", "0", *flags)
    counts = json.loads((folder / "out" / "report.json").read_text())["counts"]
    return sorted(documents_of(folder / "out")), counts


def start_in_own_group(arguments, calls=None):
    """Runs the command line of the preparation as `start_function_in_own_group` does."""
    return start_function_in_own_group(prepare, arguments, calls)


def start_function_in_own_group(function, arguments, calls=None):
    """Calls a function in a forked process that leads a group of its own; returns that process.

    With ``calls`` the process kills itself (``SIGKILL``) when it has made that many calls and returns of functions.
    """
    process = multiprocessing.get_context("fork").Process(target=_call_silently, args=(function, arguments, calls))
    process.start()
    return process


def _call_silently(function, arguments, calls):
    os.setpgid(0, 0)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is shared with this process, which would wait for a killed holder forever
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if calls is not None:
        left = itertools.count(calls, -1)
        sys.setprofile(lambda *event: None if next(left) else os.kill(os.getpid(), signal.SIGKILL))
    function(*arguments)
    os._exit(0)


def kill_group(process):
    """Kills a process of `start_function_in_own_group` with all its workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a group leader yet, or has ended
        process.kill()
    process.join()
