"""One corpus of several files and its preparation, which many tests compare theirs with."""

import sys
import types

import pytest

from tests.corpora.formats import NAUGHTY, made_up_texts, pile_lines, prepare, write_gz, write_zst

COMPONENTS = ["Pile-CC", "Github", "Wikipedia (en)"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Seven files: 1,500 + 165 + 464 documents, of which 150 repeat others and 3 are empty, and a broken record."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(5):
        texts = made_up_texts(300, number)
        lines = [pile_lines([text], COMPONENTS[k % 3])[0] for k, text in enumerate(texts)]
        write_zst(folder / "train" / f"{number:02}.jsonl.zst", lines, frames=2)
    lines = pile_lines(made_up_texts(300, 0)[:150] + ["", "\n \r\n", "\u200b"] + NAUGHTY, "Pile-CC")
    write_zst(folder / "train" / "05.jsonl.zst", [*lines, '{"text": "cut'])
    write_gz(folder / "fr.txt.gz", "\n\n".join(made_up_texts(464, 77)) + "\n")
    return folder


@pytest.fixture(scope="session")
def flags():
    """Several shards, and all three splits."""
    return ["--shard-size", "40KB", "--valid-fraction", "0.05", "--test-fraction", "0.02"]


@pytest.fixture(scope="session")
def reference(corpus, flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "out"
    assert prepare(corpus, "--output", output, *flags) == 0
    return output


@pytest.fixture
def datatrove(monkeypatch):
    """Stands in for datatrove, whose filters are the classes that it is given by their names there."""

    def install(**filters):
        data = types.ModuleType("datatrove.data")
        data.Document = lambda text, id: types.SimpleNamespace(text=text, id=id)
        room = types.ModuleType("datatrove.pipeline.filters")
        vars(room).update(filters)
        for module in (types.ModuleType("datatrove"), types.ModuleType("datatrove.pipeline"), room, data):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install
