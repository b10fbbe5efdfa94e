"""Every format is read byte-exactly, and every defect gets one sentence with file and offset."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random

import pytest
import zstandard

from fairseq_implicit.corpora import readers
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.records import RecordError, document_from_record
from fairseq_implicit.corpora.sources import find_sources
from tests.corpora.formats import NAUGHTY, oscar_22, oscar_23, pile_lines, read, write_gz, write_tar, write_zst

TEXTS = [f"{text}\nsecond line of {number}" for number, text in enumerate(NAUGHTY)]


def texts(path, boundary="auto"):
    documents, problems = read(path, boundary)
    assert problems == []
    return [document.text for document in documents]


@pytest.mark.parametrize("frames", [1, 3])
def test_pile_zst_reads_every_frame(tmp_path, frames):
    path = write_zst(tmp_path / "00.jsonl.zst", pile_lines(TEXTS), frames)
    documents, problems = read(path)
    assert [document.text for document in documents] == TEXTS and not problems
    assert {document.component for document in documents} == {"Pile-CC"}


@pytest.mark.parametrize(
    "name, compress",
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.json.gz", lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]) + b"\0" * 512),
        ("no_extension", zstandard.ZstdCompressor().compress),
    ],
)
def test_jsonl_in_every_compression(tmp_path, name, compress):
    # `ensure_ascii=False` leaves U+0085 and U+2028 raw in the file, where str.splitlines would cut
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    (tmp_path / name).write_bytes(compress(data))
    assert texts(tmp_path / name) == TEXTS


def test_tar_of_compressed_members(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    members = {
        f"dir/{k}.zst": compress("\n".join(pile_lines(part)).encode()) for k, part in enumerate((TEXTS[:5], TEXTS[5:]))
    }
    path = write_tar(tmp_path / "blns.jsonl.zst.tar", members)
    assert texts(path) == TEXTS
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert texts(tmp_path / "b.tar.gz") == TEXTS


def test_field_variants_of_the_pile(tmp_path):
    records = [
        {"text": "no meta"},
        {"text": ["first", "second"], "meta": {"pile_set_name": "Github"}},
        {"text": "string meta", "meta": '{"pile_set_name": "ArXiv"}'},
        {"text": "bare name", "meta": "FreeLaw"},
        {"text": "null meta", "meta": None},
        "a bare JSON string",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    documents, problems = read(path)
    assert [document.text for document in documents] == [
        "no meta",
        "first\n\nsecond",
        "string meta",
        "bare name",
        "null meta",
        "a bare JSON string",
    ]
    assert [document.component for document in documents] == [None, "Github", "ArXiv", "FreeLaw", None, None]
    assert problems == []


def test_oscar_versions(tmp_path):
    path = write_gz(tmp_path / "en_meta_part_1.jsonl.gz", "\n".join([oscar_22("a\nb", ["tiny"]), oscar_22("c")]) + "\n")
    documents, _ = read(path)
    assert [(d.text, d.annotations, d.language, d.language_probability) for d in documents] == [
        ("a\nb", ("tiny",), "en", 0.9),
        ("c", (), "en", 0.9),
    ]
    path = write_zst(tmp_path / "en_meta.jsonl.zst", [oscar_23("d", ["adult"], "gsw", 0.5, 12.5, ["press"])])
    [document] = read(path)[0]
    assert (document.annotations, document.harmful_perplexity, document.categories) == (("adult",), 12.5, ("press",))
    assert (document.language, document.language_probability) == ("gsw", 0.5)
    hub_spelling = {
        "id": 1,
        "text": "e",
        "meta": {"annotations": ["noisy"], "identification": {"label": "de", "prob": 1.0}},
    }
    (tmp_path / "h.jsonl").write_text(json.dumps(hub_spelling))
    [document] = read(tmp_path / "h.jsonl")[0]
    assert (document.text, document.annotations, document.language) == ("e", ("noisy",), "de")


def test_oscar_2019_lines_and_documents(tmp_path):
    assert texts(write_gz(tmp_path / "fr_part_1.txt.gz", "un\ndeux\ntrois\n")) == ["un", "deux", "trois"]
    assert texts(write_gz(tmp_path / "fr.txt.gz", "un\ndeux\n\n\ntrois\n")) == ["un\ndeux", "trois"]
    # the choice can be forced either way
    assert texts(tmp_path / "fr.txt.gz", "line") == ["un", "deux", "trois"]
    assert texts(tmp_path / "fr_part_1.txt.gz", "file") == ["un\ndeux\ntrois"]


def test_oscar_2109_text_is_checked_against_its_side_file(tmp_path):
    text = write_gz(tmp_path / "fr" / "fr_part_1.txt.gz", "a\nb\n\nc\n")
    meta = [{"headers": {}, "offset": 0, "nb_sentences": 2}, {"headers": {}, "offset": 3, "nb_sentences": 1}]
    side = write_gz(tmp_path / "fr" / "fr_meta_part_1.jsonl.gz", "\n".join(map(json.dumps, meta)))
    sources, passed_over = find_sources([str(tmp_path / "fr")])
    assert [source.name for source in sources] == [str(text)] and passed_over == [str(side)]
    assert texts(text) == ["a\nb", "c"]

    meta[0]["nb_sentences"] = 3
    write_gz(side, "\n".join(map(json.dumps, meta)))
    documents, problems = read(text)
    assert [document.text for document in documents] == ["a\nb", "c"]
    assert [problem.reason for problem in problems] == ["metadata disagree"]
    assert "document 1 (byte 0) has 2 lines" in problems[0].sentence and "3" in problems[0].sentence


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": TEXTS + [None], "meta": [{"pile_set_name": "ArXiv"}] * (len(TEXTS) + 1)})
    parquet.write_table(table, tmp_path / "0000.parquet", row_group_size=5)
    documents, problems = read(tmp_path / "0000.parquet")
    assert [document.text for document in documents] == TEXTS
    assert {document.component for document in documents} == {"ArXiv"}
    assert [(p.reason, p.offset, p.lost_documents) for p in problems] == [("record without text", len(TEXTS), 1)]

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    [problem] = read(tmp_path / "other.parquet")[1]
    assert "no column 'text', 'content' or 'raw_content' (its columns: body)" in problem.sentence

    whole = (tmp_path / "0000.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    [problem] = read(tmp_path / "cut.parquet")[1]
    assert problem.reason == "corrupt parquet data" and str(tmp_path / "cut.parquet") in problem.sentence


def test_plain_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("one\r\ntwo\r\n\r\nthree \u0085 four\r\n".encode())
    assert texts(path) == ["one\r\ntwo\r", "three \u0085 four\r"]
    path.write_bytes(b"no boundary\nat all")
    assert texts(path) == ["no boundary\nat all"]
    path.write_bytes(b"bad \xff byte\n\ngood\n")
    documents, _ = read(path)
    assert [(d.text, d.repairs) for d in documents] == [("bad \ufffd byte", ("invalid UTF-8",)), ("good", ())]


def test_endless_text_without_boundary_is_cut_into_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_TEXT_PIECE", 100)
    lines = [f"line {number:03d}" for number in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents, _ = read(tmp_path / "a.txt")
    assert "\n".join(document.text for document in documents) == "\n".join(lines)
    assert len(documents) == 5 and all(len(d.text) <= 100 for d in documents)


def test_standard_input(tmp_path, monkeypatch):
    import io
    import types

    for data, expected in (
        (gzip.compress("\n".join(pile_lines(TEXTS)).encode()), TEXTS),
        (b"a\n\nb\n", ["a", "b"]),
        (b"", []),
    ):
        monkeypatch.setattr(readers.sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
        items = list(readers.read_source(readers.Source("-")))
        assert [item.text for item in items] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz"])
def test_empty_file_is_an_empty_corpus(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == ([], [])


def test_fifty_megabyte_line(tmp_path):
    text = "lorem ipsum " * (50 * 2**20 // 12)
    path = write_zst(tmp_path / "long.jsonl.zst", pile_lines(["before", text, "after"]))
    assert [len(t) for t in texts(path)] == [6, len(text), 5]
    path = write_gz(tmp_path / "long.txt.gz", f"before\n\n{text}\n\nafter\n")
    assert [len(t) for t in texts(path)] == [6, len(text), 5]


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_truncated_file_keeps_what_is_before_the_cut(tmp_path, kind):
    lines = pile_lines([f"{k} " + os.urandom(3000).hex() for k in range(60)])
    if kind == "zst":
        path = write_zst(tmp_path / "a.jsonl.zst", lines)
    else:
        path = write_gz(tmp_path / "a.jsonl.gz", "\n".join(lines))
    path.write_bytes(path.read_bytes()[:150_000])
    documents, problems = read(path)
    assert 20 < len(documents) < 60 and [int(d.text.split()[0]) for d in documents] == list(range(len(documents)))
    assert [problem.reason for problem in problems] == ["truncated record", "truncated file"]
    assert [problem.lost_documents for problem in problems] == [1, 0]
    assert f"{path}: the {kind} data end in the middle of a frame after byte 150000" in problems[1].sentence


@pytest.mark.parametrize("boundary, expected", [("blank-line", ["a\nb"]), ("line", ["a", "b"])])
def test_truncated_text_loses_only_the_open_document(tmp_path, boundary, expected):
    filler = "\n".join(os.urandom(40).hex() for _ in range(3000))
    path = write_gz(tmp_path / "a.txt.gz", f"a\nb\n\n{filler}")
    path.write_bytes(path.read_bytes()[:-2000])
    documents, problems = read(path, boundary)
    assert [document.text for document in documents][: len(expected)] == expected
    assert [problem.reason for problem in problems] == ["truncated record", "truncated file"]
    if boundary == "line":  # only whole lines passed
        assert all(len(document.text) == 80 for document in documents[2:])


def test_corrupt_compressed_data(tmp_path):
    lines = pile_lines([os.urandom(3000).hex() for _ in range(200)])
    frames = [zstandard.ZstdCompressor(write_checksum=True).compress((line + "\n").encode()) for line in lines]
    data = bytearray(b"".join(frames))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    documents, problems = read(tmp_path / "a.jsonl.zst")
    assert len(documents) > 50
    assert problems[-1].reason == "corrupt compressed data" and problems[-1].offset > 0


def test_corrupt_json_line_names_line_and_byte(tmp_path):
    lines = pile_lines(["first", "second", "third"])
    lines[1] = lines[1][:-5]
    lines.insert(2, '{"title": "no text"}')
    lines.insert(3, '{"text": 7}')
    lines.insert(4, "[1, 2]")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    documents, problems = read(path)
    assert [document.text for document in documents] == ["first", "third"]
    assert [p.reason for p in problems] == ["corrupt JSON line"] + ["record without text"] * 3
    assert f"{path}: line 2 (byte {len(lines[0]) + 1}) is no valid JSON" in problems[0].sentence
    assert "no field 'text', 'content' or 'raw_content' (its fields: title)" in problems[1].sentence
    assert "'text' holds a int" in problems[2].sentence and "JSON list" in problems[3].sentence


def test_records_are_read_as_pythons_json_reads_them(tmp_path):
    """Whatever the faster parser refuses or the damage makes of a line, the document is the one of `json`."""
    rng, lines = random.Random(5), []
    odd = '{"text": "\\ud83d\\ude00 \\ud83d \\u0000\\/ é 語 \\"", "meta": {"n": NaN, "b": 99999999999999999999}}'
    nested = '{"text": "deep", "meta": ' + "[" * 3000 + "]" * 3000 + "}"
    for line in [
        odd,
        nested,
        '{"text": "first", "text": "last"}',
        ' \t{"text": "white"}\r',
        '"bare"',
        '{"text": ["a", "b"]}',
    ]:
        lines.append(line.encode())
    for _ in range(3000):
        line = bytearray(odd.encode())
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.choice(b'"\\{}[]:,u0dn \xff\xc3e')
        lines.append(bytes(line))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, problems = read(tmp_path / "a.jsonl")
    expected = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError, RecordError):
            expected.append(document_from_record(json.loads(line.decode("utf-8", "replace")), "", 0).text)
    assert len(expected) > 300 and len(documents) + len(problems) == len(lines)
    assert [document.text for document in documents] == expected


def test_crlf_json_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(pile_lines(TEXTS)).encode())
    assert texts(tmp_path / "a.jsonl") == TEXTS


def test_overlong_line_is_skipped_without_keeping_it(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["a", "x" * 5000, "b"])))
    documents, problems = read(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == ["a", "b"]
    assert problems[0].reason == "line too long" and problems[0].lost_bytes > 5000


def test_unreadable_and_misnamed_files(tmp_path, monkeypatch):
    (tmp_path / "page.jsonl.zst").write_text("404: not found")
    [problem] = read(tmp_path / "page.jsonl.zst")[1]
    assert "named like a zst file but does not begin like one" in problem.sentence

    (tmp_path / "locked.jsonl").write_text("{}")
    (tmp_path / "locked.jsonl").chmod(0)
    if os.geteuid() == 0:  # root may read everything, so the refusal is played
        real = open

        def refusing(path, *arguments, **keywords):
            if str(path).endswith("locked.jsonl"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **keywords)

        monkeypatch.setattr("builtins.open", refusing)
    [problem] = read(tmp_path / "locked.jsonl")[1]
    assert f"{tmp_path / 'locked.jsonl'} cannot be read (Permission denied)" in problem.sentence


def test_damaged_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jsonl": "\n".join(pile_lines(TEXTS * 500)).encode()})
    path.write_bytes(path.read_bytes()[:200_000])
    documents, problems = read(path)
    assert len(documents) > 1000 and {problem.reason for problem in problems} == {"truncated record", "truncated file"}
    assert f"{path}!0.jsonl: the archive ends inside this member" in problems[1].sentence


def test_folders_are_searched_and_wrong_paths_named(tmp_path):
    write_zst(tmp_path / "train" / "00.jsonl.zst", pile_lines(["a"]))
    (tmp_path / "README.md").write_text("no corpus")
    (tmp_path / "checksum.sha256").write_text("0")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.jsonl").write_text("{}")
    sources, passed_over = find_sources([str(tmp_path)])
    assert [os.path.basename(source.name) for source in sources] == ["00.jsonl.zst"]
    assert sorted(map(os.path.basename, passed_over)) == ["README.md", "checksum.sha256"]
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        find_sources(["nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no corpus file"):
        find_sources([str(tmp_path / "empty")])
