"""The corpus that every machine carries: which text it takes, and that it is the same text every time."""

from fairseq_implicit.corpora.docstrings import docstring_documents, docstrings, paragraphs_of, prose, source_files
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.small_corpus import HashSplit, cleaned, write_splits

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


def test_takes_documentation_and_nothing_else():
    assert [paragraph for text in docstrings(MODULE) for paragraph in prose(text)] == [
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
    files = source_files(str(tmp_path), "root")
    assert list(docstring_documents(files, 1)) == [Document("A module with a side effect.", "root/module.py", 0)]
    assert not ran.exists()


def test_a_file_that_is_no_python_has_no_text(tmp_path):
    (tmp_path / "old.py").write_text('"""Some prose in here."""\nprint "python two"\n')
    (tmp_path / "bytes.py").write_bytes(b'"""caf\xe9"""\n')
    assert list(docstring_documents(source_files(str(tmp_path), "r"), 1)) == []


def make_package(folder, modules=120):
    for number in range(modules):
        path = folder / f"part{number % 7}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""Module {number} does the work of {number * 17} people.\n\nA common last paragraph.\n"""\n')
    return source_files(str(folder), "package")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, files, workers):
    documents = list(cleaned(docstring_documents(files, workers)))
    assign = HashSplit(text for _, text in documents)
    return write_splits(folder, ((assign(text), text) for _, text in documents))


def test_same_bytes_whatever_the_number_of_processes(tmp_path):
    files = make_package(tmp_path)
    for workers in (1, 2):
        write(tmp_path / f"corpus{workers}", files, workers)
    assert contents(tmp_path / "corpus1") == contents(tmp_path / "corpus2")


def test_splits_share_no_paragraph_and_lose_none(tmp_path):
    files = make_package(tmp_path)
    counts = write(tmp_path / "corpus", files, 1)
    lines = {split: (tmp_path / "corpus" / f"{split}.txt").read_text().splitlines() for split in counts}
    texts = {split: {line for line in found if line} for split, found in lines.items()}
    assert (
        not texts["train"] & texts["valid"]
        and not texts["train"] & texts["test"]
        and not texts["valid"] & texts["test"]
    )
    assert set.union(*texts.values()) == {paragraph for file in files for paragraph in paragraphs_of(file.path)}
    for split, count in counts.items():
        assert count.paragraphs == sum(map(bool, lines[split])) == len(texts[split])
        assert lines[split].count("") == count.documents - 1  # one blank line between documents, none at the ends
