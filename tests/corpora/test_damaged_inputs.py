"""Damage costs what it touches, is reported with its place, and never ends the job: archives, records, folders."""

import io
import json
import os
import random
import tarfile

import pytest

from fairseq_implicit.corpora import preparation, readers, records
from fairseq_implicit.corpora.counts import Counts
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.sources import find_sources
from tests.corpora.formats import documents_of, oscar_22, pile_lines, prepare, read, write_tar

MEMBERS = {f"d/{number:02}.jsonl": "\n".join(pile_lines([f"{number} {k}" for k in range(10)])) for number in range(20)}


@pytest.fixture
def archive(tmp_path):
    """An archive of 20 members with 10 documents each, 1,536 bytes apart."""
    path = write_tar(tmp_path / "a.tar", {name: text.encode() for name, text in MEMBERS.items()})
    assert path.read_bytes()[1536 * 7 :].startswith(b"d/07.jsonl")
    return path


def numbers(documents):
    return sorted({int(document.text.split()[0]) for document in documents})


@pytest.mark.parametrize(
    "damage, lost, reasons",
    [
        (lambda data: data[: 1536 * 2 + 5] + b"~" + data[1536 * 2 + 6 :], {2}, ["damaged archive member"]),
        (
            lambda data: data[: 1536 * 2] + random.Random(0).randbytes(1536 * 3) + data[1536 * 5 :],
            {2, 3, 4},
            ["damaged archive member"],
        ),
        (lambda data: data[: 1536 * 12 + 100], set(range(12, 20)), ["damaged archive member"]),
        (lambda data: data[: 1536 * 12], set(range(12, 20)), ["truncated file"]),
        (lambda data: data[: 1536 * 12 + 512], set(range(12, 20)), ["truncated file"]),
        (lambda data: data[: 1536 * 20], set(), ["truncated file"]),
        (lambda data: data[: 1536 * 20 + 512], set(), []),
        (lambda data: b"", set(range(20)), ["truncated file"]),
    ],
    ids=[
        "a bit in a header",
        "three members of noise",
        "cut inside a header",
        "cut between members",
        "cut behind a header",
        "no end mark",
        "half an end mark",
        "nothing",
    ],
)
def test_damaged_archive_loses_the_members_it_must(archive, damage, lost, reasons):
    archive.write_bytes(damage(archive.read_bytes()))
    documents, problems = read(archive)
    assert numbers(documents) == sorted(set(range(20)) - lost) and len(documents) == 10 * (20 - len(lost))
    assert [problem.reason for problem in problems] == reasons
    assert all(str(archive) in problem.sentence for problem in problems)


def test_damaged_archive_is_counted_and_strict_stops_at_it(archive, tmp_path):
    data = bytearray(archive.read_bytes())
    data[1536 * 2 + 5] ^= 1
    archive.write_bytes(data)
    prepare(archive, "--output", tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert counts["dropped"] == {"damaged archive member": 1} and counts["dropped_bytes"]["damaged archive member"] > 0
    with pytest.raises(CorpusError, match="header at byte 3072 cannot be read .bad checksum., and the 1536 bytes"):
        prepare(archive, "--output", tmp_path / "strict", "--strict")


def test_archives_one_after_the_other(archive):
    data = archive.read_bytes()
    archive.write_bytes(data + data)
    documents, problems = read(archive)
    assert len(documents) == 400 and problems == []


def with_header(data, member, field, value):
    """The archive with one field of a member's header changed and its checksum mended."""
    data, start = bytearray(data), 1536 * member
    data[start + field : start + field + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def test_negative_size_in_an_archive(archive):
    archive.write_bytes(with_header(archive.read_bytes(), 3, 124, b"\xff" * 12))
    documents, [problem] = read(archive)
    assert numbers(documents) == [0, 1, 2, *range(4, 20)] and "its size is -1" in problem.sentence


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"?"])
def test_members_without_text_are_reported(archive, kind):
    archive.write_bytes(with_header(archive.read_bytes(), 3, 156, kind))
    documents, problems = read(archive)
    assert 3 not in numbers(documents) and problems[0].reason == "archive member without text"
    assert f"{archive}!d/03.jsonl is " in problems[0].sentence


def pax_archive(path, headers):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            data = MEMBERS[f"d/{number:02}.jsonl"].encode()
            info = tarfile.TarInfo(f"{number}.jsonl")
            info.size, info.pax_headers = len(data), headers if number == 1 else {}
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "headers", [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"}, {"size": "-1"}, {"size": "x"}]
)
def test_odd_pax_headers_cost_their_member(tmp_path, headers):
    pax_archive(tmp_path / "a.tar", headers)
    documents, problems = read(tmp_path / "a.tar")
    assert {0, 2} <= set(numbers(documents)) and len(problems) >= 1


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_members_in_every_format(tmp_path, format):
    names = ["./a.jsonl", "é/" + "long" * 20 + "/b.jsonl", "." + "/x" * 20 + "/c.jsonl"]
    if format != tarfile.USTAR_FORMAT:
        names += ["long" * 100 + ".jsonl", "not\udcff.jsonl"]
    with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for name in names:
            data = json.dumps({"text": name}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    documents, problems = read(tmp_path / "a.tar")
    assert problems == [] and [(d.path, d.text) for d in documents] == [(f"{tmp_path / 'a.tar'}!{n}", n) for n in names]


def test_fuzzed_archives_never_raise_and_lose_little(archive):
    data, rng = archive.read_bytes(), random.Random(0)
    for _ in range(150):
        fuzzed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            fuzzed[rng.randrange(1536 * 20)] = rng.randrange(256)
        archive.write_bytes(fuzzed)
        documents, problems = read(archive)
        assert len(documents) >= 150 and (problems or len(documents) == 200)


def prepared(tmp_path, *lines):
    """(documents, report) of JSON lines that are given as strings."""
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out", "--valid-fraction", 0) == 0
    return sorted(documents_of(tmp_path / "out")), json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    "meta",
    [
        {"metadata": {"identification": {"label": "en", "prob": "high"}}},
        {"metadata": {"identification": {"label": ["en"], "prob": [1]}, "harmful_pp": float("nan")}},
        {"metadata": {"identification": {"label": "en", "prob": 10**400}}},
        {"meta": {"pile_set_name": "\ud800 alone"}},
        {"meta": "[" * 100_000},
        {"meta": '{"pile_set_name": "cut'},
        {"metadata": {"annotation": [["x"] * 3, None], "categories": [{}]}},
        {"\ud800": 1},
    ],
    ids=["prob", "label", "huge", "surrogate", "nesting", "cut meta", "labels", "field"],
)
def test_odd_metadata_never_cost_the_text(tmp_path, meta):
    documents, report = prepared(tmp_path, json.dumps({"text": "odd"} | meta), oscar_22("good"))
    assert documents == ["good", "odd"] and report["problems_total"] == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"\\ud800": "no text"}',
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '{"text": {"\\udfff": 1}}',
        "\x00\x00",
        "7" * 5000,
    ],
    ids=["field name", "nesting", "nested text", "text is no string", "NUL", "digits"],
)
def test_odd_records_are_counted(tmp_path, line):
    documents, report = prepared(tmp_path, oscar_22("good"), line)
    assert documents == ["good"] and report["problems_total"] == 1 == sum(report["counts"]["dropped"].values())
    assert len(report["problems"][0]["sentence"]) < 1000


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    with open(folder + b"/\xff\xfe.jsonl", "w") as file:
        file.write("\n".join([*pile_lines(["text"]), "{broken"]))
    assert prepare(tmp_path / "in", "--output", tmp_path / "out", "--valid-fraction", 0) == 0
    assert documents_of(tmp_path / "out") == ["text"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert os.fsencode(report["problems"][0]["path"]).endswith(b"/\xff\xfe.jsonl")
    assert prepare(tmp_path / "in", "--output", tmp_path / "out", "--valid-fraction", 0) == 0  # the same sources


def test_unexpected_fault_of_a_reader_is_a_problem(tmp_path, monkeypatch):
    """The boundary for what nobody thought of: the file's problem, not the job's end."""
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["a", "b"])))
    (tmp_path / "b.jsonl").write_text("\n".join(pile_lines(["c"])))

    def failing(record, path, offset, fields):
        if record["text"] == "b":
            raise ZeroDivisionError("nobody thought of it")
        return real(record, path, offset, fields)

    real = records._document
    monkeypatch.setattr(records, "_document", failing)
    documents, [problem] = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == ["a"] and problem.lost_documents == 1
    assert "line 2 (byte" in problem.sentence and "ZeroDivisionError: nobody thought of it" in problem.sentence
    monkeypatch.setattr(readers, "lines_of", lambda *arguments: 1 / 0)
    documents, [problem] = read(tmp_path / "b.jsonl")
    assert (
        problem.reason == "unexpected content" and f"{tmp_path / 'b.jsonl'} cannot be read further" in problem.sentence
    )


def test_damaged_input_is_passed_over_on_resume_with_its_count(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join([*pile_lines(["a"]), "{broken", "{broken too", ""]))
    (tmp_path / "b.jsonl").write_text("\n".join(pile_lines(["b"])))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    prepare(*files, "--output", tmp_path / "out", "--part", "0/2", "--valid-fraction", 0)
    [record] = (path for path in (tmp_path / "out" / "work").glob("*.json") if path.name != "job.json")
    read_once = []
    monkeypatch.setattr(preparation, "read_source", lambda source, options: read_once.append(source.name) or [])
    prepare(files[0], files[1], "--output", tmp_path / "out", "--part", "0/2", "--valid-fraction", 0)
    assert read_once == [] and json.loads(record.read_text())["problems_total"] == 2
    monkeypatch.undo()
    prepare(*files, "--output", tmp_path / "out", "--part", "0/1", "--valid-fraction", 0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["dropped"] == {"corrupt JSON line": 2} and report["problems_total"] == 2
    assert sorted(documents_of(tmp_path / "out")) == ["a", "b"]


def test_linked_and_unreadable_folders(tmp_path, monkeypatch):
    for name in ("in/real", "elsewhere/deep", "in/locked"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in" / "real" / "a.jsonl").write_text("\n".join(pile_lines(["a"])))
    (tmp_path / "elsewhere" / "deep" / "b.jsonl").write_text("\n".join(pile_lines(["b"])))
    (tmp_path / "in" / "locked" / "c.jsonl").write_text("\n".join(pile_lines(["c"])))
    (tmp_path / "in" / "a link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "real" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    sources, _ = find_sources([str(tmp_path / "in")])
    names = [os.path.relpath(source.name, tmp_path / "in") for source in sources]
    assert names == ["a link/deep/b.jsonl", "gone.jsonl", "locked", "real/a.jsonl"]
    prepare(tmp_path / "in", "--output", tmp_path / "out", "--valid-fraction", 0)
    assert sorted(documents_of(tmp_path / "out")) == ["a", "b"]
    sentences = [p["sentence"] for p in json.loads((tmp_path / "out" / "report.json").read_text())["problems"]]
    assert f"{tmp_path / 'in' / 'locked'} cannot be read (Permission denied)" in sentences[1]
    assert f"{tmp_path / 'in' / 'gone.jsonl'} cannot be read (No such file or directory)" in sentences[0]
    with pytest.raises(CorpusError, match="cannot be read .*--strict"):
        prepare(tmp_path / "in", "--output", tmp_path / "strict", "--strict")


def test_unreadable_side_file_does_not_cost_the_text(tmp_path, monkeypatch):
    (tmp_path / "fr_part_1.txt").write_text("a\nb\n\nc\n")
    side = tmp_path / "fr_meta_part_1.jsonl"
    side.write_text("not JSON")
    documents, [problem] = read(tmp_path / "fr_part_1.txt")
    assert [d.text for d in documents] == ["a\nb", "c"] and "the side file cannot be read there" in problem.sentence
    real = open

    def refusing(path, *arguments, **keywords):
        if str(path) == str(side):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", refusing)
    documents, [problem] = read(tmp_path / "fr_part_1.txt")
    assert [d.text for d in documents] == ["a\nb", "c"]
    assert (problem.reason, problem.path) == ("unreadable side file", str(side))


def test_parquet_damage_costs_its_row_group_and_cells_their_characters(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, rng = tmp_path / "a.parquet", random.Random(1)
    texts = [f"{k} {rng.getrandbits(400):x}" for k in range(2000)]
    options = {"row_group_size": 200, "use_dictionary": False, "data_page_size": 4000, "write_page_checksum": True}
    parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    column = parquet.ParquetFile(path).metadata.row_group(3).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle] ^= 1
    path.write_bytes(data)
    documents, [problem] = read(path)
    assert len(documents) + problem.lost_documents == 2000 and 0 < problem.lost_documents <= 200
    assert 600 <= problem.offset < 800 and {int(d.text.split()[0]) for d in documents} >= {0, 599, 800, 1999}

    offsets, cells = pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\x09\0\0\0\x0d\0\0\0"), pyarrow.py_buffer(b"goodba\xffd!last")
    parquet.write_table(pyarrow.table({"text": pyarrow.StringArray.from_buffers(3, offsets, cells)}), path)
    documents, problems = read(path)
    assert [d.text for d in documents] == ["good", "ba\ufffdd!", "last"] and problems == []
    assert [d.repairs for d in documents] == [(), ("invalid UTF-8",), ()]


def test_fuzzed_parquet_never_raises(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, rng = tmp_path / "a.parquet", random.Random(2)
    table = pyarrow.table({"text": [f"text {k}" for k in range(60)], "meta": ['{"pile_set_name": "ArXiv"}'] * 60})
    parquet.write_table(table, path, row_group_size=20)
    data = path.read_bytes()
    for _ in range(60):
        fuzzed = bytearray(data)
        for _ in range(3):
            fuzzed[rng.randrange(4, len(data) - 300)] = rng.randrange(256)
        path.write_bytes(fuzzed)
        documents, problems = read(path)
        assert len(documents) == 60 or problems


def test_document_on_which_a_quality_filter_fails_is_lost_alone(tmp_path, datatrove):
    class ShortTexts:
        def filter(self, document):
            return len(document.text) / (0 if "zero" in document.text else 1) < 20

    datatrove(FineWebQualityFilter=ShortTexts)
    texts = ["one", "zero", "two", "much too long for this filter"]
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(texts)))
    arguments = [tmp_path / "a.jsonl", "--quality-filter", "fineweb", "--valid-fraction", "0", "--output"]
    assert prepare(*arguments, tmp_path / "out") == 0
    assert sorted(documents_of(tmp_path / "out")) == ["one", "two"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    counts = Counts.from_dict(report["counts"])
    assert counts.dropped == {"quality filter failed": 1, "quality fineweb": 1}
    assert (counts.documents_read, counts.documents_lost, counts.bytes_lost) == (4, 1, len("zero"))
    assert counts.documents_missing() == counts.bytes_missing() == 0
    [problem] = report["problems"]
    assert (
        "a.jsonl: the document at byte 54 is not kept: --quality-filter fineweb failed on it (Zero"
        in problem["sentence"]
    )
    with pytest.raises(CorpusError, match="--quality-filter fineweb failed .*--strict stops here"):
        prepare(*arguments, tmp_path / "strict", "--strict")
