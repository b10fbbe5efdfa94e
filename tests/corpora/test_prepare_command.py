"""The command: wrong flags, exit statuses, finished folders, damaged records, one process to a folder."""

import gzip
import io
import json
import multiprocessing
import types

import pytest
import zstandard

from fairseq_implicit.commands import main
from fairseq_implicit.commands.values import byte_size, part_from_environment
from fairseq_implicit.corpora import segments
from fairseq_implicit.corpora.binarisation import shards_of_folder
from fairseq_implicit.corpora.corpus_job import LOCK
from fairseq_implicit.corpora.counts import Counts
from fairseq_implicit.corpora.durable import sha256_of
from fairseq_implicit.corpora.ownership import own_folder
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.tokenizer_training import text_files
from tests.corpora.formats import checksums, documents_of, made_up_texts, pile_lines, prepare, write_tar, write_zst


def test_strict_stops_with_the_sentence(corpus, flags, tmp_path):
    with pytest.raises(CorpusError, match=r"05.jsonl.zst: line 166 .*--strict stops here"):
        prepare(corpus, "--output", tmp_path / "out", *flags, "--strict")
    assert not list((tmp_path / "out").rglob("*.part-*"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--valid-fraction", "1.5"], "--valid-fraction 1.5 must lie in"),
        (["--valid-fraction", "0.6", "--test-fraction", "0.5"], "leave no training documents"),
        (["--sample", "0"], "--sample 0.0"),
        (["--held-out-sample", "2"], "--held-out-sample 2.0"),
        (["--buckets", "0"], "--buckets 0"),
        (["--shard-size", "0"], "--shard-size 0"),
        (["--max-line-size", "3"], "--max-line-size 3 is too small"),
        (["--workers", "0"], "--workers 0"),
        (["--component-weight", "Github=-1"], "Github=-1.0 must lie"),
        (["--include-component", "A", "--exclude-component", "A"], "both name A"),
        (["--quality-filter", "c4"], "datatrove"),
        (["--verify"], "is not finished"),
    ],
)
def test_wrong_flags_end_with_one_sentence(tmp_path, flags, sentence):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match=".") as error:
        prepare(tmp_path / "a.txt", "--output", tmp_path / "out", *flags)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_inputs_are_required_and_standard_input_is_whole(tmp_path):
    with pytest.raises(CorpusError, match="No input is given"):
        prepare("--output", tmp_path / "out")
    with pytest.raises(CorpusError, match="standard input cannot be divided into 3 parts"):
        prepare("-", "--output", tmp_path / "out", "--part", "1/3")


def test_exit_status_and_sentence_of_the_command(tmp_path, capsys, monkeypatch):
    assert main(["prepare-corpus", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("text")
    for error, status, sentence in (
        (OSError(28, "No space left on device", "/data/x"), 1, "/data/x: No space left on device; mend it and run"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
    ):

        def failing(writer, key, split, text, error=error):
            raise error

        monkeypatch.setattr(segments.SegmentWriter, "add", failing)
        assert main(["prepare-corpus", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]) == status
        assert sentence in capsys.readouterr().err


def test_finished_folder_is_left_alone_and_verified(corpus, flags, reference, tmp_path, caplog):
    before = checksums(reference)
    with caplog.at_level("INFO"):
        for inputs in ([corpus, *flags], []):
            caplog.clear()
            assert prepare(*inputs, "--output", reference, "--verify") == 0
            assert f"all {len(before)} files are as their checksums say" in caplog.text
    with pytest.raises(CorpusError, match="finished corpus made with valid-fraction = 0.05 instead of 0.1"):
        prepare(corpus, "--output", reference, *flags, "--valid-fraction", "0.1")
    with pytest.raises(CorpusError, match="made from 7 other input files than the 6 given"):
        prepare(corpus / "train", "--output", reference, *flags)
    assert checksums(reference) == before
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in reference.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with open(copy / "train.00001.txt", "ab") as file:
        file.write(b"x")
    with pytest.raises(CorpusError, match="train.00001.txt is missing or differs from its checksum"):
        prepare("--output", copy, "--verify")
    with pytest.raises(CorpusError, match="absent is not finished"):
        prepare("--output", tmp_path / "absent", "--verify")


def test_empty_corpus_gives_an_empty_result(tmp_path, capsys, caplog):
    path, arguments = tmp_path / "a.jsonl", [str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    for content in (b"", b'{"title": "no text"}\n', b'[{"text": "an array"}]\n', b"BZh9 not bzip2"):
        path.write_bytes(content)
        for _ in range(2):  # the same again, until the file is mended
            assert main(["prepare-corpus", *arguments]) == 3
            assert "Nothing was written to" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["files"] == {} and report["problems_total"] == 1
    assert "train shards: 0; problems of input files: 1" in (tmp_path / "out" / "report.txt").read_text()
    path.write_text("\n".join(pile_lines(["some", "text"])))
    assert main(["prepare-corpus", *arguments, "--valid-fraction", "0.0005"]) == 0
    assert "train shards: 1; problems of input files: 0" in capsys.readouterr().out


def test_finished_folder_without_a_document_is_made_again(tmp_path):
    """Such folders were made when an empty result passed for a complete one."""
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["some", "text"])))
    assert prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out", "--valid-fraction", 0) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    assert prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out", "--valid-fraction", 0) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_standard_input_of_every_run_is_read(tmp_path, monkeypatch, caplog):
    def stdin(text):
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))

    flags = ["-", "--output", tmp_path / "out", "--valid-fraction", "0"]
    stdin(b"first\n\ntext\n")
    with pytest.raises(CorpusError, match="not read yet"):
        prepare(*flags, "--merge")
    prepare(*flags)
    assert sorted(documents_of(tmp_path / "out")) == ["first", "text"]
    stdin(b"second\n")
    prepare(*flags)
    assert "the standard input was not read; give another --output" in caplog.text


def test_name_that_is_neither_a_path_nor_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CorpusError, match="There is no local file or folder data/pile, and on the hub: http://127.0"):
        prepare("data/pile", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "environment, part",
    [
        ({}, (0, 1)),
        ({"SLURM_JOB_ID": "7"}, (0, 1)),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "4",
            },
            (1, 3),
        ),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "3",
            },
            (7, 12),
        ),
        ({"RANK": "2", "WORLD_SIZE": "8"}, (2, 8)),
    ],
)
def test_part_from_the_scheduler(environment, part):
    assert part_from_environment(environment) == part


def test_scheduler_variables_and_sizes_are_checked():
    with pytest.raises(CorpusError, match="RANK=x"):
        part_from_environment({"RANK": "x", "WORLD_SIZE": "2"})
    assert [byte_size(text) for text in ("7", "4GB", "1.5MiB", "2k")] == [7, 4 * 10**9, 3 * 2**19, 2000]
    for wrong in (["--part", "3/3"], ["--shard-size", "many"], ["--component-weight", "x"]):
        with pytest.raises(SystemExit):
            main(["prepare-corpus", "a", "--output", "b", *wrong])


def test_mended_input_of_a_finished_folder_is_read_again(tmp_path, caplog):
    lines = pile_lines([f"document {number}" for number in range(60)])
    whole = write_zst(tmp_path / "a.jsonl.zst", lines, frames=4).read_bytes()
    write_zst(tmp_path / "b.jsonl.zst", pile_lines(["another"]))
    inputs = [tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]
    small = ["--shard-size", "300", "--valid-fraction", "0.2"]
    assert prepare(*inputs, "--output", tmp_path / "reference", *small) == 0
    for content in (whole + whole[:100], whole[: len(whole) // 2], b"<html>"):
        inputs[0].write_bytes(content)
        out = tmp_path / f"out-{len(content)}"
        assert prepare(*inputs, "--output", out, *small) == 0
        assert json.loads((out / "report.json").read_text())["problems_total"]
        finished = {path.name: path.read_bytes() for path in out.iterdir()}
        assert prepare(*inputs, "--output", out, *small) == 0  # as long as nothing is mended nothing happens
        assert {path.name: path.read_bytes() for path in out.iterdir()} == finished
        inputs[0].write_bytes(whole)
        assert prepare(*inputs, "--output", out, *small) == 0
        assert checksums(out) == checksums(tmp_path / "reference")
    # a change of a file that was read in full is no reason to make hours of work again
    caplog.clear()
    inputs[1].write_bytes(inputs[1].read_bytes() + write_zst(tmp_path / "c", pile_lines(["more"])).read_bytes())
    assert prepare(*inputs, "--output", out, *small) == 0
    assert "b.jsonl.zst changed after" in caplog.text and checksums(out) == checksums(tmp_path / "reference")


def test_fewer_shards_of_a_mended_corpus_leave_no_old_ones(tmp_path):
    path, arguments = tmp_path / "a.jsonl", ["--output", tmp_path / "out", "--shard-size", "200"]
    path.write_text("\n".join([*pile_lines([f"document {number}" for number in range(300)]), "{"]))
    prepare(path, *arguments, "--valid-fraction", "0.1")
    assert len(list((tmp_path / "out").glob("train.*.txt"))) > 5
    path.write_text("\n".join(pile_lines(["one left"])))
    prepare(path, *arguments, "--valid-fraction", "0.1")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.txt")) == ["report.txt", "train.00000.txt"]


def test_strict_refuses_a_finished_folder_and_read_parts_with_problems(tmp_path):
    path, arguments = tmp_path / "a.jsonl", [tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    path.write_text("\n".join([*pile_lines(["some", "text"]), "{"]))
    prepare(*arguments, "--part", "0/2")
    with pytest.raises(CorpusError, match="--strict: .* the first of 1 problems: .*a.jsonl: .*line 3"):
        prepare(*arguments, "--merge", "--strict")
    prepare(*arguments, "--merge")
    assert prepare(*arguments) == 0
    with pytest.raises(CorpusError, match="--strict: .* the first of 1 problems: .*a.jsonl: .*line 3"):
        prepare(*arguments, "--strict")


@pytest.mark.parametrize(
    "lost, share, what",
    [
        ("records", 0.25, "documents"),
        ("long record", 0.8, "bytes of text"),
        ("half of a file", 0.25, "bytes of the input files"),
    ],
)
def test_largest_loss(tmp_path, lost, share, what, capsys, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "a.jsonl"
    lines = pile_lines([f"document number {number}" for number in range(60)])
    if lost == "records":
        path.write_text("\n".join([*lines, *["{" * 6] * 20]))
    elif lost == "long record":
        path.write_text("\n".join([*lines, "{" * 50_000]))
    else:
        path = write_zst(tmp_path / "a.jsonl.zst", pile_lines(made_up_texts(9000, 3)), frames=9)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :: 7] = bytes(len(data[len(data) // 2 :: 7]))
        path.write_bytes(data)
    arguments = [str(path), "--output", str(tmp_path / "out"), "--max-loss"]
    assert main(["prepare-corpus", *arguments, str(share - 0.02)]) == 4
    error = capsys.readouterr().err
    assert f"of the {what} could not be read, the first of " in error and str(path) in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(["prepare-corpus", *arguments, "1"]) == 0  # nothing is read again for that
    assert "1 files, 1 of them already read" in caplog.text
    assert main(["prepare-corpus", *arguments, str(share - 0.02)]) == 4  # a finished folder is no excuse
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert max(Counts.from_dict(counts).losses(), key=Counts.from_dict(counts).losses().get) == what


@pytest.fixture
def half_lost(tmp_path):
    """Makes inputs of which half of the bytes, but few or no documents, cannot be read."""
    text = ("\n".join(pile_lines(made_up_texts(1500, 1))) + "\n").encode()
    packed = zstandard.compress(text)

    def make(what):
        array = b"[{}]".ljust(len(packed if "member" in what else text))
        if what == "refused file":
            (tmp_path / "a.jsonl").write_bytes(text)
            (tmp_path / "b.jsonl").write_bytes(array)
            return tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        other = {"refused member": array, "corrupt member": packed[:18].ljust(len(packed), b"\xff")}.get(what, packed)
        name = "b.jsonl" if other is array else "b.jsonl.zst"
        members = {"a.jsonl.zst": packed, name: other}
        data = bytearray(write_tar(tmp_path / "a.tar", members).read_bytes())
        if "header" in what:
            data[data.index(b"b.jsonl")] ^= 1
        path = tmp_path / "archive.tar"
        path.write_bytes(gzip.compress(data) if "compressed" in what else data)
        return (path,)

    return make


@pytest.mark.parametrize(
    "what",
    [
        "refused file",
        "refused member",
        "corrupt member",
        "member with a damaged header",
        "member with a damaged header in a compressed archive",
    ],
)
def test_refused_files_and_lost_members_count_with_their_bytes(half_lost, tmp_path, what):
    inputs = half_lost(what)
    arguments = [*inputs, "--output", tmp_path / "out", "--valid-fraction", "0", "--max-loss"]
    with pytest.raises(
        CorpusError, match="--max-loss 0.45: 0.(4|5).* of the bytes of the input files could not be"
    ) as error:
        prepare(*arguments, "0.45")
    assert error.value.status == 4
    assert prepare(*arguments, "0.55") == 0
    counts = Counts.from_dict(json.loads((tmp_path / "out" / "report.json").read_text())["counts"])
    assert counts.losses()["bytes of the input files"] == pytest.approx(0.5, abs=0.05)
    assert counts.documents_missing() == counts.bytes_missing() == 0


DAMAGED = {
    "empty": b"",
    "cut": b'{"job": {"set',
    "array": b"[]",
    "object": b"{}",
    "nested": b"[" * 10**5,
    "binary": b"\xff\0",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_records_end_with_one_sentence(tmp_path, capsys, damage):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(pile_lines([f"document {number}" for number in range(50)])))
    arguments = [str(path), "--output", str(tmp_path / "out")]
    main(["prepare-corpus", *arguments, "--part", "0/2"])
    main(["prepare-corpus", *arguments, "--merge", "--part", "0/2"])
    work = tmp_path / "out" / "work"
    records = [path for path in work.rglob("*") if path.suffix in (".json", ".verified")]
    assert len(records) == 4  # the job, the source, its verification, one shard
    for record in records:
        content = record.read_bytes()
        record.write_bytes(DAMAGED[damage])
        assert main(["prepare-corpus", *arguments, "--merge"]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"fairseq-implicit prepare-corpus: {record} is damaged (")
        record.write_bytes(content)
    assert main(["prepare-corpus", *arguments, "--merge"]) == 0
    (tmp_path / "out" / "manifest.json").write_bytes(DAMAGED[damage])
    for command in (arguments, [*arguments, "--verify"], ["--verify", *arguments[1:]]):
        assert main(["prepare-corpus", *command]) == 1
        assert "manifest.json is damaged (" in capsys.readouterr().err.splitlines()[-1]


def test_manifest_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["some", "text"])))
    prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out")
    (tmp_path / "secret.txt").write_text("secret")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    elsewhere = ["train.x/../../secret.txt", "../secret.txt", str(tmp_path / "secret.txt"), "train.x\\..\\secret", ".."]
    for name in elsewhere:
        facts = {name: {"sha256": sha256_of(tmp_path / "secret.txt"), "bytes": 6}}
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"files": facts}))
        for use in (
            lambda: prepare("--verify", "--output", tmp_path / "out"),
            lambda: shards_of_folder(tmp_path / "out"),
            lambda: text_files([tmp_path / "out"]),
        ):
            with pytest.raises(CorpusError, match="manifest.json names the file .* does not lie in its folder"):
                use()


def test_one_process_to_a_folder(tmp_path):
    """Whole runs exclude each other and the parts; different parts do not."""
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines(["some", "text"])))
    arguments = [tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    ready, release = multiprocessing.Event(), multiprocessing.Event()

    def held(part, parts):
        with own_folder(tmp_path / "out", LOCK, part, parts):
            ready.set()
            release.wait(60)

    for owned, refused, free in (
        ((0, 1), [[], ["--part", "0/2"], ["--merge"]], None),
        ((1, 2), [[], ["--part", "1/2"], ["--merge"]], ["--part", "0/2"]),
    ):
        ready.clear()
        owner = multiprocessing.get_context("fork").Process(target=held, args=owned)
        owner.start()
        assert ready.wait(60)
        for extra in refused:
            with pytest.raises(CorpusError, match=rf"Another process works in .* \(process {owner.pid} on .* since 20"):
                prepare(*arguments, *extra)
        if free:
            assert prepare(*arguments, *free) == 0
        owner.kill()  # the kernel takes the lock from a dead process
        owner.join()
    assert prepare(*arguments) == 0
    assert not list((tmp_path / "out").glob(".*"))
