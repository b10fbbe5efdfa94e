"""The corpus that every machine carries: which text it takes, and that it is the same text every time."""

import pytest

from scripts.corpus_splits import Document, clean_paragraph, deduplicated, split_of, write_splits
from scripts.embedded_corpus import docstrings, document_of, embedded_documents, prose, source_files

MODULE = '''
"""The module's own text, two lines
that form one paragraph."""

def add_docstr(*_): ...

class Parser:
    """Reads a stream of tokens.

    Example::

        parser = Parser(1)
        parser.feed("not a word of prose in here")

    After the example comes a sentence again.

    >>> Parser(2).feed("nor is this")
    True

    Args:
        stream (file): where the tokens come from
        limit: how many of them are read at most, and
            what follows on a second line
    """

    async def read(self):
        "Return the :class:`~package.Token` that was read, *never* ``None``."

add_docstr(Parser.read, """
Attached from outside, as compiled functions
are documented.
""")

notes = """An ordinary string constant is no documentation at all."""
'''


def paragraphs_of(source):
    return [paragraph for text in docstrings(source) for paragraph in prose(text)]


def test_takes_documentation_and_nothing_else():
    assert paragraphs_of(MODULE) == [
        "The module's own text, two lines that form one paragraph.",
        "Reads a stream of tokens.",
        "After the example comes a sentence again.",
        "stream (file): where the tokens come from",
        "limit: how many of them are read at most, and what follows on a second line",
        "Return the package.Token that was read, never None.",
        "Attached from outside, as compiled functions are documented.",
    ]


def test_sources_are_parsed_not_run(tmp_path):
    ran = tmp_path / "ran"
    source = tmp_path / "module.py"
    source.write_text(f'"""A module with a side effect."""\nopen({str(ran)!r}, "w")\n')
    (file,) = source_files(str(tmp_path), "root")
    assert document_of(file) == Document("root/module.py", ["A module with a side effect."])
    assert not ran.exists()


def test_a_file_that_is_no_python_has_no_text(tmp_path):
    (tmp_path / "old.py").write_text('"""Some prose in here."""\nprint "python two"\n')
    (tmp_path / "bytes.py").write_bytes(b'"""caf\xe9"""\n')
    assert [document_of(file).paragraphs for file in source_files(str(tmp_path), "r")] == [[], []]


def make_package(folder, modules=120):
    for number in range(modules):
        path = folder / f"part{number % 7}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""Module {number} does the work of {number * 17} people.\n\nA common last paragraph.\n"""\n')
    return source_files(str(folder), "package")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_whatever_the_number_of_processes(tmp_path):
    files = make_package(tmp_path)
    for processes in (1, 2):
        out = tmp_path / f"corpus{processes}"
        write_splits(str(out), deduplicated(embedded_documents(files, processes)))
    assert contents(tmp_path / "corpus1") == contents(tmp_path / "corpus2")


def test_splits_share_no_paragraph_and_lose_none(tmp_path):
    files = make_package(tmp_path)
    counts = write_splits(str(tmp_path / "corpus"), deduplicated(map(document_of, files)))
    lines = {split: (tmp_path / "corpus" / f"{split}.txt").read_text().splitlines() for split in counts}
    texts = {split: {line for line in found if line} for split, found in lines.items()}
    assert (
        not texts["train"] & texts["valid"]
        and not texts["train"] & texts["test"]
        and not texts["valid"] & texts["test"]
    )
    assert set.union(*texts.values()) == {paragraph for file in files for paragraph in document_of(file).paragraphs}
    for split, count in counts.items():
        assert count.paragraphs == sum(map(bool, lines[split])) == len(texts[split])
        assert lines[split].count("") == count.documents - 1  # one blank line between documents, none at the ends


def test_split_follows_from_the_name_alone():
    names = [f"python/{number}.py" for number in range(20000)]
    shares = {
        split: sum(split_of(name) == split for name in names) / len(names) for split in ("train", "valid", "test")
    }
    assert shares["valid"] == pytest.approx(0.04, abs=0.005) and shares["test"] == pytest.approx(0.04, abs=0.005)
    assert [split_of(name) for name in reversed(names)] == [split_of(name) for name in names][::-1]


@pytest.mark.parametrize("separator", ["\r", "\n", "\x0b", "\x1c", "\x85", "\u2028", "\u00a0", "\u3000", "\t"])
def test_white_space_of_every_kind_becomes_a_space(separator):
    assert clean_paragraph(f" one{separator}{separator}two ") == "one two"


def test_control_and_format_characters_go():
    assert clean_paragraph("a\x00b\x1bc\u200bd\ufeffe\x9ff\U000e0001g é 漢 😀") == "abcdefg é 漢 😀"
    assert clean_paragraph("\x00\x01 \u200b") == ""


def test_an_interrupted_run_leaves_the_old_corpus_in_place(tmp_path):
    folder = str(tmp_path / "corpus")
    documents = [Document(f"d{number}", [f"paragraph number {number}"]) for number in range(200)]
    write_splits(folder, documents)
    before = contents(tmp_path / "corpus")

    def broken():
        yield documents[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_splits(folder, broken())
    assert contents(tmp_path / "corpus") == before


def test_no_text_for_a_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text for the valid split"):
        write_splits(str(tmp_path / "corpus"), [Document("a", ["text"])], assign=lambda name: "train")
    assert not (tmp_path / "corpus").exists()
