"""No document of a held-out split stands in another one, whatever copies or samples."""

import json
from collections import Counter

import pytest

from tests.corpora.formats import documents_of, made_up_texts, pile_lines, prepare, write_zst


def test_held_out_files_keep_their_documents_from_training(tmp_path):
    texts = made_up_texts(40, 5)
    write_zst(tmp_path / "pile" / "train" / "00.jsonl.zst", pile_lines(texts))
    write_zst(tmp_path / "pile" / "val.jsonl.zst", pile_lines([*texts[:3], "valid only"]))
    write_zst(tmp_path / "pile" / "test.jsonl.zst", pile_lines([texts[0], texts[9]]))
    pile, output = tmp_path / "pile", tmp_path / "out"
    prepare(pile, "--valid-input", pile / "val.jsonl.zst", "--test-input", pile / "test.jsonl.zst", "--output", output)
    assert set(documents_of(output, "test")) == {texts[0], texts[9]}
    assert set(documents_of(output, "valid")) == {texts[1], texts[2], "valid only"}
    assert set(documents_of(output)) == set(texts) - {texts[0], texts[1], texts[2], texts[9]}
    dropped = json.loads((output / "report.json").read_text())["counts"]["dropped"]
    assert dropped == {"exact duplicate of a held-out document": 5}
    flags = ["--valid-input", pile / "val.jsonl.zst", "--held-out-sample", 0.5]
    prepare(pile / "train", *flags, "--output", tmp_path / "s")
    assert len(documents_of(tmp_path / "s", "valid")) < 4
    assert set(texts) <= {text for split in ("train", "valid") for text in documents_of(tmp_path / "s", split)}


TWICE = ["--component-weight", "Pile-CC=3", "--component-weight", "Github=2.5"]


@pytest.mark.parametrize("held_out", ["files", "hash", "files and hash"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        TWICE,
        ["--pile-epochs"],
        [*TWICE, "--drop-near-duplicates"],
        ["--keep-duplicates"],
        [*TWICE, "--keep-duplicates"],
        [*TWICE, "--sample", 0.6],
        [*TWICE, "--held-out-sample", 0.5],
        [*TWICE, "--max-document-size", 120],
        ["--keep-duplicates", "--max-document-size", 120, "--max-line-size", 40],
        [*TWICE, "--max-line-size", 30, "--drop-near-duplicates", "--keep-duplicates"],
        [*TWICE, "--documents-per-file", 150],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_no_held_out_document_is_in_train(tmp_path, held_out, flags):
    """Every document stands several times in two files for training; some of them stand in the held-out files, too."""
    lines = []
    for number, component in enumerate(("Pile-CC", "Github", "PubMed Central")):
        for text in made_up_texts(60, number, words=40):
            # of several lines, so that pieces of one document can be those of another
            words = text.split()
            text = "\n".join(" ".join(words[k : k + 8]) for k in range(0, len(words), 8))
            lines += pile_lines([text, text + "\nwith one more line", text.split("\n")[0]], component)
    write_zst(tmp_path / "a.jsonl.zst", lines + lines[:50])
    write_zst(tmp_path / "b.jsonl.zst", lines[::2])
    write_zst(tmp_path / "valid.jsonl.zst", lines[::9] + lines[:9])
    write_zst(tmp_path / "test.jsonl.zst", lines[::14])
    split = []
    if "files" in held_out:
        split += ["--valid-input", tmp_path / "valid.jsonl.zst", "--test-input", tmp_path / "test.jsonl.zst"]
    if "hash" in held_out:
        split += ["--valid-fraction", 0.1, "--test-fraction", 0.1]
    inputs = [tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]
    prepare(*inputs, "--output", tmp_path / "out", "--workers", 1, *split, *flags)
    documents = {split: documents_of(tmp_path / "out", split) for split in ("train", "valid", "test")}
    assert all(documents.values())
    leaked = [text for text in documents["train"] if text in {*documents["valid"], *documents["test"]}]
    assert leaked == [] and not set(documents["valid"]) & set(documents["test"])
    if "--component-weight" in flags:
        assert max(Counter(documents["train"]).values()) >= 3
