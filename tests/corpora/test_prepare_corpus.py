"""The preparation: books that balance, splits by hash, one result for every way of running it."""

import hashlib
import io
import json
import os
import random
import signal
import time
import types
from collections import Counter

import pytest

from fairseq_implicit.corpora import merging, near_duplicates, segments, workers
from fairseq_implicit.corpora.durable import sha256_of
from fairseq_implicit.corpora.prepare_command import build_parser, byte_size, main, part_from_environment
from fairseq_implicit.corpora.problems import CorpusError
from tests.corpora.formats import (
    NAUGHTY,
    documents_of,
    kill_group,
    oscar_22,
    oscar_23,
    pile_lines,
    prepare,
    start_in_own_group,
    write_gz,
    write_zst,
)

COMPONENTS = ["Pile-CC", "Github", "Wikipedia (en)"]


def made_up_texts(number, seed, words=30):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(rng.randrange(5, words))) for _ in range(number)]


@pytest.fixture(scope="module")
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


def checksums(folder):
    assert not (folder / "work").exists()
    names = [path.name for path in folder.iterdir() if path.suffix == ".txt" and path.name != "report.txt"]
    return {name: sha256_of(folder / name) for name in names}


FLAGS = ["--shard-size", "40KB", "--valid-fraction", "0.05", "--test-fraction", "0.02"]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "out"
    assert prepare(corpus, "--output", output, *FLAGS) == 0
    return output


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


@pytest.mark.parametrize("how", ["two workers", "three parts", "parts of the merge", "other names and order"])
def test_one_result_for_every_way(corpus, reference, tmp_path, how):
    output = tmp_path / "out"
    if how == "two workers":
        prepare(corpus, "--output", output, *FLAGS, "--workers", 2)
    elif how == "three parts":
        for part in (2, 0, 1):
            prepare(corpus, "--output", output, *FLAGS, "--part", f"{part}/3")
        prepare(corpus, "--output", output, *FLAGS, "--merge")
    elif how == "parts of the merge":
        prepare(corpus, "--output", output, *FLAGS, "--part", "0/2")
        with pytest.raises(CorpusError, match="--merge: 3 of 7 input files are not read yet"):
            prepare(corpus, "--output", output, *FLAGS, "--merge")
        prepare(corpus, "--output", output, *FLAGS, "--part", "1/2")
        for part in (1, 0):
            prepare(corpus, "--output", output, *FLAGS, "--merge", "--part", f"{part}/2")
        prepare(corpus, "--output", output, *FLAGS, "--merge")
    else:
        for number, file in enumerate(sorted(corpus.rglob("*.*z*"))):
            # a text file keeps its name's meaning: .txt.gz stays .txt.gz
            ending = ".txt.gz" if file.name.endswith(".txt.gz") else ".jsonl.zst"
            os.link(file, tmp_path / f"{9 - number}{ending}")
        prepare(*sorted(tmp_path.glob("*z*"), reverse=True), "--output", output, *FLAGS)
    assert checksums(output) == checksums(reference)
    assert (output / "SHA256SUMS").read_bytes() == (reference / "SHA256SUMS").read_bytes()


def test_ten_kills_and_a_rerun_give_the_same_bytes(corpus, reference, tmp_path):
    """Each run goes on from the one that was killed; the moments are drawn among all calls that the program makes."""
    rng = random.Random(3)
    output = tmp_path / "out"
    arguments = [corpus, "--output", output, *FLAGS]
    killed = 0
    for _ in range(10):
        process = start_in_own_group(arguments, calls=rng.randrange(250_000))  # of 1.2 million in an undisturbed run
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 8
    assert prepare(*arguments) == 0
    assert checksums(output) == checksums(reference)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in reference.iterdir())


def test_kills_of_a_group_of_workers(corpus, reference, tmp_path):
    rng = random.Random(4)
    arguments = [corpus, "--output", tmp_path / "out", *FLAGS, "--workers", 2]
    for _ in range(4):
        process = start_in_own_group(arguments)
        time.sleep(rng.uniform(0.02, 0.35))
        kill_group(process)
    assert prepare(*arguments) == 0
    assert checksums(tmp_path / "out") == checksums(reference)


def test_workers_end_with_a_killed_parent(corpus, tmp_path):
    process = start_in_own_group([corpus, "--output", tmp_path / "out", *FLAGS, "--workers", 2])
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    workers = []
    for _ in range(200):
        if os.path.exists(children) and len(workers := open(children).read().split()) >= 2:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 20
    while any(_is_running(int(pid)) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(_is_running(int(pid)) for pid in workers)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_finished_folder_is_left_alone_and_verified(corpus, reference, tmp_path, caplog):
    before = checksums(reference)
    with caplog.at_level("INFO"):
        for inputs in ([corpus, *FLAGS], []):
            caplog.clear()
            assert prepare(*inputs, "--output", reference, "--verify") == 0
            assert f"all {len(before)} files are as their checksums say" in caplog.text
    with pytest.raises(CorpusError, match="finished corpus made with valid-fraction = 0.05 instead of 0.1"):
        prepare(corpus, "--output", reference, *FLAGS, "--valid-fraction", "0.1")
    with pytest.raises(CorpusError, match="made from 7 other input files than the 6 given"):
        prepare(corpus / "train", "--output", reference, *FLAGS)
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


def test_damaged_intermediate_file_is_found_by_the_merge(corpus, tmp_path):
    output = tmp_path / "out"
    prepare(corpus, "--output", output, *FLAGS, "--part", "0/2")
    prepare(corpus, "--output", output, *FLAGS, "--part", "1/2")
    path = sorted((output / "work").glob("*.segments"))[0]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="does not match its checksum; remove .* and prepare its part again"):
        prepare(corpus, "--output", output, *FLAGS, "--merge")


def test_split_follows_the_document_not_its_place(corpus, reference, tmp_path):
    output = tmp_path / "out"
    prepare(corpus / "train" / "03.jsonl.zst", "--output", output, *FLAGS)
    for split in ("train", "valid", "test"):
        assert set(documents_of(output, split)) <= set(documents_of(reference, split))
    share = len(documents_of(reference, "valid")) / 1976
    assert 0.03 < share < 0.07
    other = tmp_path / "other"
    prepare(corpus / "train" / "03.jsonl.zst", "--output", other, *FLAGS, "--seed", "2")
    assert set(documents_of(other, "valid")) != set(documents_of(output, "valid"))


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


def run_one(tmp_path, lines, *flags):
    """(documents, counts) of one JSON lines file."""
    folder = tmp_path / hashlib.md5(repr((lines, flags)).encode()).hexdigest()
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    prepare(folder / "a.jsonl", "--output", folder / "out", "--valid-fraction", "0", *flags)
    counts = json.loads((folder / "out" / "report.json").read_text())["counts"]
    return sorted(documents_of(folder / "out")), counts


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
    assert all((a in kept) != (b in kept) for a, b in zip(texts, near)) and set(texts[10:]) | set(far) <= kept
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


def test_strict_stops_with_the_sentence(corpus, tmp_path):
    with pytest.raises(CorpusError, match=r"05.jsonl.zst: line 166 .*--strict stops here"):
        prepare(corpus, "--output", tmp_path / "out", *FLAGS, "--strict")
    assert not list((tmp_path / "out").rglob("*.part-*"))


def test_books_that_do_not_balance_are_an_error():
    counts = merging.Counts(documents_read=2, bytes_read=10)
    counts.drop("empty", 10)
    with pytest.raises(CorpusError, match="1 documents and 0 bytes are unaccounted for"):
        merging.add_up(counts)


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


def test_worker_that_dies_or_fails_ends_the_others():
    with pytest.raises(CorpusError, match="worker process ended abruptly while testing; when memory ran out"):
        list(workers.run_tasks(_act, [("die",), ("sleep",)], 2, 0, "testing"))
    # the sleeper is ended, not waited for: waiting would take ten minutes
    with pytest.raises(CorpusError, match="a sentence"):
        list(workers.run_tasks(_act, [("fail",), ("sleep",)], 2, 0, "testing"))


def _act(what):
    if what == "die":
        os._exit(9)
    if what == "fail":
        raise CorpusError("a sentence")
    time.sleep(600)


def test_empty_corpus_gives_an_empty_result(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["files"] == {} and report["counts"]["documents_read"] == 0


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


def test_parts_come_from_the_environment(corpus, reference, tmp_path, monkeypatch):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        prepare(corpus, "--output", tmp_path / "out", *FLAGS)
    prepare(corpus, "--output", tmp_path / "out", *FLAGS, "--merge")
    assert checksums(tmp_path / "out") == checksums(reference)


def test_shards_of_an_interrupted_merge_are_not_reused_for_other_text(tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join(pile_lines(["old"])))
    prepare(path, "--output", output, "--part", "0/2", "--valid-fraction", "0")
    prepare(path, "--output", output, "--merge", "--part", "0/2", "--valid-fraction", "0")
    assert documents_of(output) == ["old"]
    path.write_text("\n".join(pile_lines(["new"])))
    prepare(path, "--output", output, "--part", "0/1", "--valid-fraction", "0")
    assert documents_of(output) == ["new"]


def test_changed_input_is_read_again(tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join(pile_lines(["old"])))
    prepare(path, "--output", output, "--part", "0/2")
    path.write_text("\n".join(pile_lines(["new", "text"])))
    with pytest.raises(CorpusError, match="have changed since"):
        prepare(path, "--output", output, "--merge")
    prepare(path, "--output", output)
    assert sorted(documents_of(output)) == ["new", "text"]


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """The documents that are held at once are bounded by the block size, whatever the corpus' size."""
    held = []
    flush = segments.SegmentWriter._flush

    def spying(writer):
        held.append(sum(len(text) for *_, text in writer._documents))
        flush(writer)

    monkeypatch.setattr(segments, "BLOCK_SIZE", 100_000)
    monkeypatch.setattr(segments.SegmentWriter, "_flush", spying)
    lines = pile_lines(made_up_texts(6000, 21))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert len(held) > 5 and max(held) <= 100_000
