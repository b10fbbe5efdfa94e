"""What can be read once only is opened once: pipes and FIFOs given as files lose nothing, and never hang."""

import gzip
import json
import os
import sys
import threading

import pytest

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.sources import Source, find_sources
from tests.corpora.formats import (
    documents_of,
    kill_group,
    pile_lines,
    prepare,
    read,
    start_function_in_own_group,
    write_tar,
)

TEXTS = [f"document {number} " + "of some words " * 20 for number in range(300)]
LINES = ("\n".join(pile_lines(TEXTS)) + "\n").encode()


class Feeder(threading.Thread):
    """Writes data into a pipe while it is read."""

    def __init__(self, descriptor, data):
        super().__init__(daemon=True)
        self._descriptor, self._data = descriptor, data
        self.start()

    def run(self):
        with open(self._descriptor, "wb") as file:
            file.write(self._data)


@pytest.fixture
def pipe():
    """Gives the name that a shell's ``<(command)`` has."""
    readers = []

    def make(data):
        reading, writing = os.pipe()
        readers.append(reading)
        Feeder(writing, data)
        return f"/dev/fd/{reading}"

    yield make
    for reading in readers:
        os.close(reading)


@pytest.mark.parametrize("form", ["plain", "gz", "tar", "text"])
def test_process_substitution_is_read_like_the_file(pipe, tmp_path, form):
    data = {
        "plain": LINES,
        "gz": gzip.compress(LINES),
        "tar": write_tar(tmp_path / "a.tar", {"a.jsonl": LINES}).read_bytes(),
        "text": "\n\n".join(TEXTS).encode(),
    }[form]
    documents, problems = read(pipe(data))
    assert [document.text for document in documents] == TEXTS and problems == []


def test_pipe_is_prepared_like_the_file(pipe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    prepare(tmp_path / "a.jsonl", "--output", tmp_path / "file")
    prepare(pipe(LINES), "--output", tmp_path / "pipe")
    assert (tmp_path / "pipe" / "SHA256SUMS").read_bytes() == (tmp_path / "file" / "SHA256SUMS").read_bytes()
    assert json.loads((tmp_path / "pipe" / "report.json").read_text())["counts"]["documents_read"] == len(TEXTS)


def test_named_pipe_is_opened_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert Source(str(tmp_path / "a.jsonl")).is_pipe
    writer = threading.Thread(target=(tmp_path / "a.jsonl").write_bytes, args=(LINES,), daemon=True)
    writer.start()
    documents, problems = read(tmp_path / "a.jsonl")
    writer.join(5)
    assert not writer.is_alive() and [document.text for document in documents] == TEXTS and problems == []


def test_pipes_cannot_be_divided_and_are_not_read_again(pipe, tmp_path, caplog):
    name = pipe(LINES)
    with pytest.raises(CorpusError, match=f"The pipe {name} cannot be divided into 2 parts"):
        prepare(name, "--output", tmp_path / "out", "--part", "0/2")
    prepare(name, "--output", tmp_path / "out")
    prepare(name, "--output", tmp_path / "out")
    assert f"{name} was not read; give another --output" in caplog.text


def test_parquet_in_a_pipe_is_refused(pipe):
    [problem] = read(pipe(b"PAR1" + bytes(100)))[1]
    assert "is a parquet file, which is not read out of an archive or a pipe" in problem.sentence


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_read_beside_files_with_several_workers(tmp_path, name):
    """Worker processes do not take it away from the one that reads it."""
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(pile_lines([f"file {number}"])))
    (tmp_path / "input").write_bytes(LINES)
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    flags = ["--workers", 2, "--output", tmp_path / "out", "--valid-fraction", 0]

    def with_input():
        os.dup2(os.open(tmp_path / "input", os.O_RDONLY), 0)
        sys.stdin = open(0)
        prepare(name, *files, *flags)

    process = start_function_in_own_group(with_input, [])
    process.join(60)
    assert process.exitcode == 0
    assert sorted(documents_of(tmp_path / "out")) == sorted(TEXTS) + ["file 0", "file 1"]


@pytest.mark.parametrize("first", ["named pipe", "standard input"])
def test_pipes_that_one_command_feeds_are_read_side_by_side(tmp_path, first):
    """As `tee` does, the writer opens one after the other, and waits for the reader of each as soon as it is full."""
    pipes = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in pipes:
        os.mkfifo(path)
    lines = [("\n".join(pile_lines([f"{name} {text}" for text in TEXTS])) + "\n").encode() for name in "ab"]
    assert min(map(len, lines)) > 65536, "a pipe would hold it"

    def tee():
        with open(pipes[0], "wb") as a, open(pipes[1], "wb") as b:
            for k in range(0, max(map(len, lines)), 4096):
                for file, data in zip((a, b), lines, strict=True):
                    file.write(data[k : k + 4096])

    def run():
        name = pipes[0]
        if first == "standard input":
            os.dup2(os.open(name, os.O_RDONLY), 0)
            sys.stdin = open(0)
            name = "-"
        prepare(name, "--valid-input", pipes[1], "--output", tmp_path / "out")

    threading.Thread(target=tee, daemon=True).start()
    process = start_function_in_own_group(run, [])
    process.join(20)
    kill_group(process)
    assert process.exitcode == 0, "it waits for ever"
    assert sorted(documents_of(tmp_path / "out")) == sorted(f"a {text}" for text in TEXTS)
    assert sorted(documents_of(tmp_path / "out", "valid")) == sorted(f"b {text}" for text in TEXTS)


def test_fifo_in_a_folder_is_named_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_text("{}")
    sources, passed_over = find_sources([str(tmp_path)])
    assert [source.name for source in sources] == [str(tmp_path / "a.jsonl")]
    assert passed_over == [str(tmp_path / "pipe.jsonl")]
