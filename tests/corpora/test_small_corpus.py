"""Text of the user's own: files, folders, given splits, the split by hash, and what is refused."""

from pathlib import Path

import pytest

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.settings import SPLITS
from fairseq_implicit.corpora.small_corpus import (
    HashSplit,
    cleaned,
    documents_of,
    given_splits,
    text_files,
    write_splits,
)


def texts(folder):
    return {split: [line for line in (folder / f"{split}.txt").read_text().splitlines() if line] for split in SPLITS}


def test_blank_lines_separate_documents_and_long_ones_are_cut(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\ufeffone\r\ntwo\r\n\r\n\r\nthree\r\n \t\r\n" + "line\n" * 7, encoding="utf-8")
    documents = [text.split("\n") for _, text in cleaned(documents_of([file]), longest=5)]
    assert documents == [["one", "two"], ["three"], ["line"] * 5, ["line"] * 2]


def test_a_folder_with_its_own_split_keeps_it(tmp_path, command):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"wiki.{split}.tokens").write_text(f"this is {split}\n\nmore of {split}\n")
    status, _, said = command("text-corpus", folder, "--out", tmp_path / "corpus")
    assert status == 0, said
    assert texts(tmp_path / "corpus") == {split: [f"this is {split}", f"more of {split}"] for split in SPLITS}


@pytest.mark.parametrize(
    "names", [["train.txt", "test.txt"], ["train.txt", "notes.txt", "valid.txt"], ["training.txt", "validity.txt"]]
)
def test_other_names_are_no_given_split(names):
    assert given_splits(map(Path, names)) == {}


def test_names_that_say_which_split_they_are():
    names = {"a/pile-train-00.txt": "train", "a/dev.txt": "valid", "train_2.txt": "train"}
    assert given_splits(map(Path, names)) == {Path(name): split for name, split in names.items()}


@pytest.mark.parametrize("count", [3, 10, 400])
def test_every_document_of_a_file_ends_in_one_split(tmp_path, command, count):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"document {number}" for number in range(count)))
    status, _, said = command("text-corpus", file, "--out", tmp_path / "corpus")
    assert status == 0, said
    found = texts(tmp_path / "corpus")
    assert all(found.values()) and len(found["train"]) > len(found["valid"]) + len(found["test"]) - 2
    assert sorted(sum(found.values(), [])) == sorted(f"document {number}" for number in range(count))


def test_moving_the_folder_changes_nothing(tmp_path, command):
    for place in ("here", "there/deep"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "b.txt").write_text("\n\n".join(f"second {number}" for number in range(50)))
        (folder / "a.md").write_text("\n\n".join(f"first {number}" for number in range(50)))
        assert command("text-corpus", folder, "--out", tmp_path / "out" / place)[0] == 0
    assert texts(tmp_path / "out/here") == texts(tmp_path / "out/there/deep")


def test_bad_input_is_refused_with_a_sentence(tmp_path, command):
    def refused(path):
        status, _, said = command("text-corpus", path, "--out", tmp_path / "corpus")
        assert status == 1 and not (tmp_path / "corpus").exists() and len(said.splitlines()) == 1
        return said

    assert "no such file or folder" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no text file" in refused(tmp_path / "empty")
    (tmp_path / "void.txt").write_text(" \n\x00\n")
    assert "0 document(s) are too few" in refused(tmp_path / "void.txt")
    (tmp_path / "latin.txt").write_bytes("one\n\ncafé\n".encode("latin-1"))
    assert "latin.txt is not UTF-8 text" in refused(tmp_path / "latin.txt")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9)
    assert "picture.txt" in refused(tmp_path / "picture.txt")


def test_text_or_docstrings(command):
    for wrong in ([], ["text", "--docstrings"]):
        status, _, said = command("text-corpus", *wrong, "--out", "corpus")
        assert status == 2 and "--docstrings" in said


def test_the_report_counts(tmp_path, command):
    file = tmp_path / "book.txt"
    file.write_text("one\n\ntwo\nlines\n\nthree\n\nfour\n")
    lines = command("text-corpus", file, "--out", tmp_path / "corpus")[1].splitlines()
    assert [line.rsplit(": ", 1)[1] for line in lines][1:] == [
        f"1 document, {len(found)} paragraph{'s' * (len(found) > 1)}, {sum(map(len, found))} characters"
        for split, found in texts(tmp_path / "corpus").items()
        if split != "train"
    ]


def test_order_of_files_is_that_of_their_names(tmp_path):
    for name in ("c.txt", "a.txt", "sub/b.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in text_files(tmp_path)] == ["a.txt", "c.txt", "b.txt"]


def test_split_follows_from_the_text_alone():
    documents = [f"document {number}" for number in range(20000)]
    split = HashSplit(documents)
    found = [split(text) for text in documents]
    for held_out in ("valid", "test"):
        assert found.count(held_out) / len(found) == pytest.approx(0.04, abs=0.005)
    assert list(map(HashSplit(documents[::-1]), documents)) == found


@pytest.mark.parametrize("separator", ["\r", "\n", "\x0b", "\x1c", "\x85", "\u2028", "\u00a0", "\u3000", "\t"])
def test_white_space_of_every_kind_leaves_words_and_lines(separator):
    """Those of fairseq, which cuts words at white space and lines at ``\\r``; none of them is blank."""
    ((_, text),) = cleaned([Document(f" one{separator}{separator}two ", "name", 0)])
    assert text.split() == ["one", "two"] and text.splitlines() == text.split("\n")
    assert all(line.strip() for line in text.split("\n"))


def test_control_characters_go():
    ((_, text),) = cleaned([Document("a\x00b\x1bc\x9fd é 漢 😀", "name", 0)])
    assert text == "abcd é 漢 😀"
    assert list(cleaned([Document("\x00\x01 \u200b", "name", 0)])) == []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_leaves_the_old_corpus_in_place(tmp_path):
    folder = tmp_path / "corpus"
    write_splits(folder, [(split, f"paragraph of {split}") for split in SPLITS])
    before = contents(folder)

    def broken():
        yield "train", "another paragraph"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_splits(folder, broken())
    assert contents(folder) == before
    write_splits(folder, [("train", "another"), ("valid", "one")])
    assert contents(folder) == {"train.txt": b"another\n", "valid.txt": b"one\n", "test.txt": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_no_text_for_a_split_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no text for the valid split"):
        write_splits(tmp_path / "corpus", [("train", "text")])
    assert not (tmp_path / "corpus").exists()
