"""The command: wrong flags, exit statuses, finished folders, damaged records, one process to a folder."""

import io
import json
import types

import pytest

from fairseq_implicit.corpora import segments
from fairseq_implicit.corpora.prepare_command import build_parser, byte_size, main, part_from_environment
from fairseq_implicit.corpora.problems import CorpusError
from tests.corpora.formats import checksums, documents_of, pile_lines, prepare


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
    monkeypatch.setattr("logging.basicConfig", lambda **keywords: None)
    assert main([str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("text")
    for error, status, sentence in (
        (OSError(28, "No space left on device", "/data/x"), 1, "/data/x: No space left on device; mend it and run"),
        (KeyboardInterrupt(), 130, "Interrupted; run the same command again"),
    ):

        def failing(writer, key, split, text, error=error):
            raise error

        monkeypatch.setattr(segments.SegmentWriter, "add", failing)
        assert main([str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]) == status
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
    for content in (b"", b'{"raw_content": "RedPajama"}\n', b'[{"text": "an array"}]\n', b"BZh9 not bzip2"):
        path.write_bytes(content)
        for _ in range(2):  # the same again, until the file is mended
            assert main(arguments) == 3
            assert "Nothing was written to" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["files"] == {} and report["problems_total"] == 1
    assert "train shards: 0; problems of input files: 1" in (tmp_path / "out" / "report.txt").read_text()
    path.write_text("\n".join(pile_lines(["some", "text"])))
    assert main([*arguments, "--valid-fraction", "0.0005"]) == 0
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
            build_parser().parse_args(["a", "--output", "b", *wrong])
