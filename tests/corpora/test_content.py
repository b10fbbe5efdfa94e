"""What is no corpus is named and refused, other encodings are decoded or reported, never kept as garbage."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zlib

import pytest
import zstandard

from fairseq_implicit.corpora import readers
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.readers import ReadOptions, read_source
from fairseq_implicit.corpora.sources import Source
from fairseq_implicit.corpora.streams import StreamDamage, uncompressed_blocks
from tests.corpora.formats import NAUGHTY, documents_of, pile_lines, prepare, read, write_gz, write_tar

FOREIGN = {
    "page.txt": (b"\n <!DOCTYPE html>\n<html><body>404</body></html>", "an HTML or XML page"),
    "page.jsonl": (b"<html>", "an HTML or XML page"),
    "error.parquet": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "an HTML or XML page"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-LFS pointer"),
    "pointer.jsonl.zst": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-LFS pointer"),
    "a.zip": (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
    "a.jsonl.lz4": (b"\x04\x22\x4d\x18abc", "lz4 data"),
    "a.warc": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "a WARC file"),
    "a.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"), "a WARC file"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF document"),
    "a.txt": (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
    "program": (b"\x7fELF\x02\x01", "a program"),
    "a.parquet.gz": (gzip.compress(b"PAR1...PAR1"), "a compressed parquet file"),
    "a.jsonl.gz": (gzip.compress(gzip.compress(b"{}")), "compressed twice"),
    "text.parquet": (b"plain text", "named like a parquet file but does not begin like one"),
    "empty.parquet": (b"", "named like a parquet file but does not begin like one"),
    "array.json": (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "an array of JSON"),
    "line.json": (b'[{"text": "a"}, {"text": "b"}]', "an array of JSON"),
    "pretty.json": (b'{\n  "text": "a"\n}\n', "an object over several lines of JSON"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_corpus_is_named(tmp_path, name):
    content, what = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    documents, [problem] = read(tmp_path / name)
    assert documents == [] and what in problem.sentence and str(tmp_path / name) in problem.sentence
    with pytest.raises(CorpusError, match="--strict stops here"):
        prepare(tmp_path / name, "--output", tmp_path / "out", "--strict")


def test_members_of_an_archive_are_chosen_like_files_of_a_folder(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", {"a.jsonl": b'{"text": "inner"}'}).read_bytes()
    members = {
        "./README": b"read me",
        "LICENSE": b"free",
        "x/SHA256SUMS": b"00",
        "x/picture.png": b"\x89PNG\r\n\x1a\n",
        ".git/a.txt": b"hidden",
        "x/data.jsonl": b'{"text": "data"}',
        "./x/more.zst": zstandard.compress(b'{"text": "more"}'),
        "x/inner.tar": inner,
        "x/table.parquet": b"PAR1",
        "x/page.txt": b"<html>",
        "x/mis.jsonl.gz": b"not gzip",
    }
    path = write_tar(tmp_path / "a.tar", members)
    documents, problems = read(path)
    assert [document.text for document in documents] == ["data", "more"]
    assert [problem.path.partition("!")[2] for problem in problems] == list(members)[7:]
    assert "archive inside an archive" in problems[0].sentence and "out of an archive or a pipe" in problems[1].sentence
    prepare(path, "--output", tmp_path / "out", "--valid-fraction", 0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["changed"] == {"archive member passed over": 5}
    [problem] = read(write_tar(tmp_path / "b.tar", {"README": b"read me", "data": b"text"}))[1]
    assert "None of the 2 members of the archive" in problem.sentence


TEXTS = {
    "gb18030": "我们在这里写一些中文。",
    "utf-16-le": "plain English text",
    "latin-1": "Été à la forêt",
    "cp1251": "Текст",
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.tar"])
def test_other_encodings_are_decoded_when_named_and_refused_when_not(tmp_path, encoding, name):
    texts = [f"{TEXTS[encoding]} {number}" for number in range(20)]
    if name == "a.jsonl":
        data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(encoding)
    else:
        data = "\n\n".join(texts).encode(encoding)
    if name == "a.tar":
        write_tar(tmp_path / name, {"a.txt": data})
    else:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, problems = read(tmp_path / name, encoding=encoding)
    assert [document.text for document in documents] == texts and problems == []
    documents, [problem] = read(tmp_path / name)
    assert documents == [] and "is not UTF-8 text" in problem.sentence and "--encoding" in problem.sentence


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_recognised(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("one\n\nzwei ä 語".encode(encoding))
    documents, problems = read(tmp_path / "a.txt")
    assert [d.text.removeprefix("\ufeff") for d in documents] == ["one", "zwei ä 語"] and problems == []
    (tmp_path / "a.jsonl").write_bytes("\n".join(pile_lines(NAUGHTY)).encode(encoding))
    assert [document.text for document in read(tmp_path / "a.jsonl")[0]] == NAUGHTY


def test_encoding_is_an_option_of_the_command(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n\n".join(["Été", "déjà vu"]).encode("latin-1"))
    prepare(tmp_path / "a.txt", "--output", tmp_path / "out", "--encoding", "Latin-1", "--valid-fraction", 0)
    assert sorted(documents_of(tmp_path / "out")) == ["déjà vu", "Été"]
    for unknown in ("klingon", "base64"):
        with pytest.raises(CorpusError, match=f"--encoding {unknown} is unknown"):
            prepare(tmp_path / "a.txt", "--output", tmp_path / "o2", "--encoding", unknown)


def test_single_damaged_characters_pass_and_damaged_documents_do_not(tmp_path):
    """One document in another encoding costs itself; a stray byte costs a character."""
    good = "une phrase assez longue, déjà écrite en UTF-8. " * 40
    parts = [good.encode(), b"stray \xff byte", "des mots étrangers, à côté, déjà".encode("latin-1"), b"end"]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(parts))
    documents, [problem] = read(tmp_path / "a.txt")
    assert [document.text for document in documents] == [good.rstrip(" ") + " ", "stray \ufffd byte", "end"]
    assert documents[1].repairs == ("invalid UTF-8",)
    assert (problem.reason, problem.offset, problem.lost_documents) == (
        "text in another encoding",
        len(parts[0]) + len(parts[1]) + 4,
        1,
    )
    documents, problems = read(tmp_path / "a.txt", encoding="ascii")
    assert [d.text for d in documents] == ["stray \ufffd byte", "end"] and len(problems) == 2
    assert documents[0].repairs == ("invalid ASCII",)


def test_boundary_does_not_hang_on_the_first_megabyte(tmp_path):
    """A first blank line at 1.7 MB, in plain and in compressed text."""
    front = "\n".join(f"line {number} of the long first document" for number in range(46_000))
    text = "\n\n".join([front, *(f"document {number}\nsecond line" for number in range(100))])
    assert text.index("\n\n") > 1.7e6
    (tmp_path / "a.txt").write_text(text)
    for path in (tmp_path / "a.txt", write_gz(tmp_path / "a.txt.gz", text)):
        documents, problems = read(path)
        assert "\n\n".join(document.text for document in documents) == text and problems == []
        assert len(documents) == 101


def test_boundary_that_later_text_contradicts_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LOOK_AHEAD", 1000)
    text = "".join(f"line {number:06} of {'many ' * 20}\n" for number in range(15_000))
    path = write_gz(tmp_path / "a.txt.gz", f"{text}\nafter the blank line\n\nand another\n")
    documents, [problem] = read(path)
    assert len(documents) == 15_002 and (problem.reason, problem.offset) == (
        "document boundary contradicted",
        len(text),
    )
    assert f"at byte {len(text)}" in problem.sentence and "--document-boundary blank-line" in problem.sentence
    # white space before the first and after the last line separates nothing
    documents, problems = read(write_gz(path, f" \n\n{text}\n \n\n"))
    assert len(documents) == 15_000 and problems == []
    prepare(path, "--output", tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert counts["changed"] == {"compressed text read line by line": 1}


def compressed(compressor, chunk, repeats):
    return b"".join([*(compressor.compress(chunk) for _ in range(repeats)), compressor.flush()])


BOMBS = {
    "zst": lambda: zstandard.ZstdCompressor(level=19).compressobj(),
    "bz2": lambda: bz2.BZ2Compressor(),
    "xz": lambda: lzma.LZMACompressor(preset=0),
    "gz": lambda: zlib.compressobj(wbits=31),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_expansion_is_bounded_by_piece(kind):
    """What one step returns is bounded, and nothing is lost at the borders of steps."""
    data = compressed(BOMBS[kind](), bytes(2**20), 64 if kind != "zst" else 256)
    lengths = [len(block) for block in uncompressed_blocks(io.BytesIO(data), kind)]
    assert sum(lengths) == (64 if kind != "zst" else 256) * 2**20 and max(lengths) <= 33 * 2**20
    text = bytes(range(256)) * 6_000
    data = compressed(BOMBS[kind](), text, 1)
    assert b"".join(uncompressed_blocks(io.BytesIO(data * 2), kind)) == text * 2
    with pytest.raises(StreamDamage) as damage:
        list(uncompressed_blocks(io.BytesIO(data + data[:-3]), kind))
    assert damage.value.truncated


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    """400 MB in one JSON line that is too long, out of 12 kB; what may still be a record is kept compressed."""
    monkeypatch.setattr(readers, "LONGEST_LINE", 300 * 2**20)
    bomb = zstandard.ZstdCompressor().compressobj()
    data = bomb.compress(b'{"text": "') + compressed(bomb, b"a" * 2**20, 400)
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    tracemalloc.start()
    [problem] = read_source(Source(str(tmp_path / "a.jsonl.zst")), ReadOptions())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem.reason == "line too long" and problem.lost_bytes == 400 * 2**20 + 10 and peak < 200 * 2**20


def test_long_line_of_text_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_TEXT_PIECE", 1000)
    text = "語" * 2_000_000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    documents, problems = read(tmp_path / "a.txt.gz", "blank-line")
    assert "".join(document.text for document in documents) == text and problems == [] and len(documents) > 3
    assert {document.repairs for document in documents[:-1]} == {("cut at 64 MiB",)}


def test_many_frames_of_one_byte_are_read_in_linear_time(tmp_path):
    """20,000 frames in the head, over which a sum of the lengths so far took ten seconds."""
    frame = zstandard.ZstdCompressor().compress(b"a")
    (tmp_path / "a.txt.zst").write_bytes(frame * 20_000)
    [document] = read(tmp_path / "a.txt.zst", "file")[0]
    assert document.text == "a" * 20_000


def test_fields_of_other_corpora(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"raw_content": "red pajama"}\n{"body": "other"}\n')
    documents, [problem] = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == ["red pajama"] and "its fields: body" in problem.sentence
    documents, [problem] = read(tmp_path / "a.jsonl", text_fields=("body",))
    assert [d.text for d in documents] == ["other"] and "no field 'body'" in problem.sentence
    flags = ["--text-field", "title", "--text-field", "body", "--valid-fraction", 0]
    prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out", *flags)
    assert documents_of(tmp_path / "out") == ["other"]


def test_settings_of_earlier_releases_still_go_on(tmp_path):
    """Folders whose settings knew no encoding and no text fields: unfinished ones are read again, finished ones not."""
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["a"])))
    flags = [tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    prepare(*flags, "--part", "0/2")
    for name in ("work/job.json", "manifest.json"):
        path = tmp_path / "out" / name
        values = json.loads(path.read_text())
        settings = values.get("job", values)["settings"]
        assert settings.pop("encoding") == "" and settings.pop("text_fields") == []
        path.write_text(json.dumps(values))
        assert prepare(*flags) == 0
    with pytest.raises(CorpusError, match="made with encoding = '' instead of 'latin-1'"):
        prepare(*flags, "--encoding", "latin-1")
