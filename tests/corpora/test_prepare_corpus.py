"""What a preparation writes: books that balance, splits by hash, filters, limits, duplicates."""

import json
import random
import tracemalloc
from collections import Counter

import pytest

from fairseq_implicit.corpora import merging, near_duplicates, segments
from fairseq_implicit.corpora.problems import CorpusError, NothingWritten
from fairseq_implicit.corpora.settings import PrepareSettings
from tests.corpora.conftest import COMPONENTS
from tests.corpora.formats import (
    NAUGHTY,
    documents_of,
    made_up_texts,
    oscar_22,
    oscar_23,
    pile_lines,
    prepare,
    run_one,
)


def test_the_books_balance(corpus, reference):
    report = json.loads((reference / "report.json").read_text())
    counts = report["counts"]
    assert counts["documents_read"] == 5 * 300 + 150 + 3 + len(NAUGHTY) + 1 + 464
    assert counts["dropped"] == {"corrupt JSON line": 1, "empty": 3, "exact duplicate": 150}
    assert sum(counts["written"].values()) == counts["documents_read"] - sum(counts["dropped"].values())
    assert counts["bytes_read"] == (
        sum(counts["dropped_bytes"].values()) + counts["bytes_removed"] + sum(counts["written_bytes"].values())
    )
    table = (reference / "report.txt").read_text()
    assert "unaccounted for" in table and "05.jsonl.zst: line" in table


def test_documents_out_are_documents_in(corpus, reference):
    texts = {text for number in range(5) for text in made_up_texts(300, number)} | set(made_up_texts(464, 77))
    written = [text for split in ("train", "valid", "test") for text in documents_of(reference, split)]
    assert max(Counter(written).values()) == 1 and texts <= set(written)
    assert len(written) == len(texts) + len(NAUGHTY)
    assert len(list(reference.glob("train.*.txt"))) >= 4


def test_shards_are_mixed_and_of_the_chosen_size(corpus, reference):
    sizes = [path.stat().st_size for path in sorted(reference.glob("train.*.txt"))]
    assert max(sizes) < 48_000 and min(sizes) > 28_000
    first_file = set(made_up_texts(300, 1))
    shares = [
        sum(d in first_file for d in p.read_text().split("\n\n")) / 300 for p in sorted(reference.glob("train.*.txt"))
    ]
    assert min(shares) > 0.3 / len(sizes)


def test_split_follows_the_document_not_its_place(corpus, flags, reference, tmp_path):
    output = tmp_path / "out"
    prepare(corpus / "train" / "03.jsonl.zst", "--output", output, *flags)
    for split in ("train", "valid", "test"):
        assert set(documents_of(output, split)) <= set(documents_of(reference, split))
    share = len(documents_of(reference, "valid")) / 1976
    assert 0.03 < share < 0.07
    other = tmp_path / "other"
    prepare(corpus / "train" / "03.jsonl.zst", "--output", other, *flags, "--seed", "2")
    assert set(documents_of(other, "valid")) != set(documents_of(output, "valid"))


def test_components_are_chosen_and_weighted(tmp_path, caplog):
    lines = [pile_lines([f"{c} {k}"], c)[0] for c in (*COMPONENTS, "UPSTO Backgrounds") for k in range(100)]
    documents, counts = run_one(tmp_path, lines, "--include-component", "USPTO Backgrounds")
    assert len(documents) == 100 and counts["dropped"] == {"component not included": 300}
    documents, counts = run_one(tmp_path, lines, "--exclude-component", "Github")
    assert len(documents) == 300 and counts["dropped"] == {"component excluded": 100}
    weights = ["--component-weight", "Github=2.5", "--component-weight", "Pile-CC=0.25", "--component-weight"]
    documents, counts = run_one(tmp_path, lines, *weights, "Wikipedia (en)=0")
    kinds = Counter(document.rsplit(" ", 1)[0] for document in documents)
    assert 235 <= kinds["Github"] <= 265 and 12 <= kinds["Pile-CC"] <= 38 and "Wikipedia (en)" not in kinds
    assert max(Counter(documents).values()) == 3 and counts["copies_added"] == kinds["Github"] - 100
    with pytest.raises(NothingWritten):
        run_one(tmp_path, lines, "--include-component", "Gitub")
    assert "The component 'Gitub' is none of The Pile's 22" in caplog.text


def test_oscar_filters(tmp_path):
    lines = [
        oscar_22("kept null"),
        oscar_22("kept short", ["short_sentences", "footer"]),
        oscar_22("dropped tiny", ["tiny", "footer"]),
        oscar_22("dropped noisy", ["noisy"]),
        oscar_23("dropped adult", ["adult"]),
        oscar_23("german", language="de", probability=0.4),
        oscar_23("harmful", perplexity=5.0),
        oscar_23("listed", categories=["gambling"]),
    ]
    documents, counts = run_one(tmp_path, lines)
    assert documents == ["german", "harmful", "kept null", "kept short", "listed"]
    assert counts["dropped"] == {"annotation tiny": 1, "annotation noisy": 1, "annotation adult": 1}
    assert run_one(tmp_path, lines, "--only-unannotated")[0] == ["german", "harmful", "kept null", "listed"]
    assert len(run_one(tmp_path, lines, "--drop-annotation", "none")[0]) == 8
    assert "german" not in run_one(tmp_path, lines, "--language", "en")[0]
    documents, counts = run_one(
        tmp_path,
        lines,
        *("--min-language-probability", "0.5", "--min-harmful-perplexity", "25", "--drop-category", "gambling"),
    )
    assert documents == ["kept null", "kept short"]
    assert counts["dropped"]["language probability"] == 1
    assert counts["dropped"]["harmful perplexity"] == 1 and counts["dropped"]["category gambling"] == 1


def test_limits_of_size_split_and_wrap(tmp_path):
    long = "\n".join(f"line {k} of a long document" for k in range(40))
    wide = "word " * 40
    documents, counts = run_one(
        tmp_path,
        pile_lines([long, wide, "tiny", "a whole document"]),
        *("--max-document-size", "200", "--max-line-size", "50", "--min-document-size", "10"),
    )
    assert all(len(document.encode()) <= 200 for document in documents)
    assert sorted(line.strip() for document in documents for line in document.split("\n")) == sorted(
        long.split("\n") + ["a whole document"] + ["word word word word word word word word word word"] * 4
    )
    assert counts["dropped"] == {"shorter than --min-document-size": 1}
    assert counts["pieces_added"] == len(documents) - 3 and counts["lines_wrapped"] > 0
    assert counts["changed"]["split at --max-document-size"] == 1 and counts["changed"]["long lines wrapped"] == 1


def test_sample_duplicates_and_limits_of_files(tmp_path):
    texts = made_up_texts(400, 8)
    documents, counts = run_one(tmp_path, pile_lines(texts), "--sample", "0.25")
    assert 70 < len(documents) < 130 and counts["dropped"] == {"not sampled": 400 - len(documents)}
    assert set(run_one(tmp_path, pile_lines(texts), "--sample", "0.5")[0]) >= set(documents)
    assert len(run_one(tmp_path, pile_lines(["same"] * 3 + ["other"]), "--keep-duplicates")[0]) == 4
    documents, _ = run_one(tmp_path, pile_lines(texts), "--documents-per-file", "7")
    assert documents == sorted(texts[:7])


def test_near_duplicates(tmp_path):
    texts = made_up_texts(60, 11, words=400)
    texts = [text for text in texts if len(text.split()) > 150]
    near = [text + " and one more word" for text in texts[:10]]
    far = [" ".join(reversed(text.split())) for text in texts[:10]]
    lines = pile_lines(texts + near + far + texts[:5])
    documents, counts = run_one(tmp_path, lines, "--drop-near-duplicates")
    assert counts["dropped"] == {"exact duplicate": 5, "near duplicate": 10}
    kept = set(documents)
    assert all((a in kept) != (b in kept) for a, b in zip(texts[:10], near, strict=True))
    assert set(texts[10:]) | set(far) <= kept
    again, _ = run_one(tmp_path, list(reversed(lines)), "--drop-near-duplicates")
    assert again == documents
    weighted = ["--drop-near-duplicates", "--component-weight", "Pile-CC=2"]
    documents, counts = run_one(tmp_path, lines, *weighted)
    assert documents == sorted(again * 2) and counts["dropped"]["near duplicate"] == 20


def test_probability_of_a_shared_band_follows_the_resemblance():
    """P = 1 − (1 − s⁸)¹⁴ (Mining of Massive Datasets, section 3.4.2), checked on texts of known resemblance."""
    rng = random.Random(0)
    for share, low, high in ((0.95, 0.97, 1.0), (0.72, 0.4, 0.8), (0.4, 0.0, 0.06)):
        hits = 0
        for _ in range(60):
            # disjoint 5-word units: resemblance = common units / all units up to the borders between units
            words = [f"u{rng.randrange(10**9)}" for _ in range(600)]
            common = round(600 * 2 * share / (1 + share))
            tail = [f"v{rng.randrange(10**9)}" for _ in range(600 - common)]
            one = near_duplicates.band_hashes(" ".join(words))
            two = near_duplicates.band_hashes(" ".join(words[:common] + tail))
            hits += bool((one == two).any())
        assert low <= hits / 60 <= high, (share, hits)
    assert near_duplicates.band_hashes("too short") is None


def test_books_that_do_not_balance_are_an_error():
    counts = merging.Counts(documents_read=2, bytes_read=10)
    counts.drop("empty", 10)
    with pytest.raises(CorpusError, match="1 documents and 0 bytes are unaccounted for"):
        merging.add_up(counts)


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """The documents that are held at once are bounded by the block size, whatever the corpus' size."""
    held = []
    flush = segments.SegmentWriter._flush

    def spying(writer):
        held.append(sum(len(text) for _, text in writer._documents.values()))
        flush(writer)

    monkeypatch.setattr(segments, "BLOCK_SIZE", 100_000)
    monkeypatch.setattr(segments.SegmentWriter, "_flush", spying)
    lines = pile_lines(made_up_texts(6000, 21))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert len(held) > 5 and max(held) <= 100_000


@pytest.mark.parametrize("flags", [[], ["--keep-duplicates"]])
def test_equal_documents_are_held_once(tmp_path, monkeypatch, flags):
    """Neither the block of one source nor a bucket of the merge grows with the number of equal documents."""
    held, flush = [], segments.SegmentWriter._flush

    def spying(writer):
        held.append(len(writer._documents))
        flush(writer)

    monkeypatch.setattr(segments.SegmentWriter, "_flush", spying)
    texts = ["much the same " * 20, "another"]
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(pile_lines(texts * 50)))
    prepare(*sorted(tmp_path.glob("*.jsonl")), "--output", tmp_path / "out", "--valid-fraction", 0, *flags)
    assert held == [2, 2, 2]
    expected = Counter({text.strip(): 150 if flags else 1 for text in texts})
    assert Counter(text.strip() for text in documents_of(tmp_path / "out")) == expected
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert counts["dropped"] == ({} if flags else {"exact duplicate": 298})


def test_merge_holds_one_of_equal_documents(tmp_path):
    """Twelve files with one and the same document of 4 MB need no more memory in the merge than two."""

    def peak(number):
        writers = []
        for source in range(number):
            writer = segments.SegmentWriter(tmp_path / f"{number}-{source}", 1)
            writer.add(b"k" * 16, segments.TRAIN, random.Random(0).randbytes(2**22))
            writer.close()
            writers.append(segments.SegmentFile(tmp_path / f"{number}-{source}"))
        tracemalloc.start()
        counts = merging.Counts()
        documents = list(merging.documents_of_bucket(0, writers, PrepareSettings(buckets=1), (), (), counts))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(documents) == 1 and counts.dropped == {"exact duplicate": number - 1}
        return size

    assert peak(12) < 2 * peak(2)
