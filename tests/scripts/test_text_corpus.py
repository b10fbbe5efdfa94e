"""Text of the user's own: files, folders, given splits, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.corpus_splits import SPLITS
from scripts.text_corpus import documents_of, given_splits, text_files

SCRIPT = Path(__file__).parents[2] / "scripts" / "text_corpus.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def texts(folder):
    return {split: [line for line in (folder / f"{split}.txt").read_text().splitlines() if line] for split in SPLITS}


def test_blank_lines_separate_documents_and_long_ones_are_cut(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\ufeffone\r\ntwo\r\n\r\n\r\nthree\r\n \t\r\n" + "line\n" * 7, encoding="utf-8")
    documents = [document.paragraphs for document in documents_of(str(file), longest=5)]
    assert documents == [["one", "two"], ["three"], ["line"] * 5, ["line"] * 2]


def test_a_folder_with_its_own_split_keeps_it(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"wiki.{split}.tokens").write_text(f"this is {split}\n\nmore of {split}\n")
    result = run(folder, "--out", tmp_path / "corpus")
    assert result.returncode == 0, result.stderr
    assert texts(tmp_path / "corpus") == {split: [f"this is {split}", f"more of {split}"] for split in SPLITS}


@pytest.mark.parametrize(
    "names", [["train.txt", "test.txt"], ["train.txt", "notes.txt", "valid.txt"], ["training.txt", "validity.txt"]]
)
def test_other_names_are_no_given_split(names):
    assert given_splits(names) == {}


def test_names_that_say_which_split_they_are():
    names = ["a/pile-train-00.txt", "a/dev.txt", "train_2.txt"]
    assert given_splits(names) == {"a/pile-train-00.txt": "train", "a/dev.txt": "valid", "train_2.txt": "train"}


@pytest.mark.parametrize("count", [3, 10, 400])
def test_every_document_of_a_file_ends_in_one_split(tmp_path, count):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"document {number}" for number in range(count)))
    result = run(file, "--out", tmp_path / "corpus")
    assert result.returncode == 0, result.stderr
    found = texts(tmp_path / "corpus")
    assert all(found.values()) and len(found["train"]) > len(found["valid"]) + len(found["test"]) - 2
    assert sorted(sum(found.values(), [])) == sorted(f"document {number}" for number in range(count))


def test_moving_the_folder_changes_nothing(tmp_path):
    for place in ("here", "there/deep"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "b.txt").write_text("\n\n".join(f"second {number}" for number in range(50)))
        (folder / "a.md").write_text("\n\n".join(f"first {number}" for number in range(50)))
        assert run(folder, "--out", tmp_path / "out" / place).returncode == 0
    assert texts(tmp_path / "out/here") == texts(tmp_path / "out/there/deep")


def refused(tmp_path, path):
    result = run(path, "--out", tmp_path / "corpus")
    assert result.returncode == 1 and not (tmp_path / "corpus").exists()
    assert "Traceback" not in result.stderr
    return result.stderr


def test_bad_input_is_refused_with_a_sentence(tmp_path):
    assert "no such file or folder" in refused(tmp_path, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no text file" in refused(tmp_path, tmp_path / "empty")
    (tmp_path / "void.txt").write_text(" \n\x00\n")
    assert "0 document(s) are too few" in refused(tmp_path, tmp_path / "void.txt")
    (tmp_path / "latin.txt").write_bytes("one\n\ncafé\n".encode("latin-1"))
    assert "latin.txt is not UTF-8 text" in refused(tmp_path, tmp_path / "latin.txt")


def test_the_report_counts(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\n\ntwo\nlines\n\nthree\n\nfour\n")
    lines = run(file, "--out", tmp_path / "corpus").stdout.splitlines()
    assert [line.rsplit(": ", 1)[1] for line in lines][1:] == [
        f"1 document, {len(found)} paragraph{'s' * (len(found) > 1)}, {sum(map(len, found))} characters"
        for split, found in texts(tmp_path / "corpus").items()
        if split != "train"
    ]


def test_order_of_files_is_that_of_their_names(tmp_path):
    for name in ("c.txt", "a.txt", "sub/b.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [Path(file).name for file in text_files(str(tmp_path))] == ["a.txt", "c.txt", "b.txt"]
