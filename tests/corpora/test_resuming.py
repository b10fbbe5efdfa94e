"""One result for every way of running a preparation: workers, parts, kills, changed and damaged files."""

import json
import os
import random
import signal
import time

import pytest

from fairseq_implicit.corpora import merging, near_duplicates, preparation, workers
from fairseq_implicit.corpora.problems import CorpusError
from tests.corpora.formats import (
    checksums,
    documents_of,
    kill_group,
    made_up_texts,
    pile_lines,
    prepare,
    start_in_own_group,
)


@pytest.mark.parametrize("how", ["two workers", "three parts", "parts of the merge", "other names and order"])
def test_one_result_for_every_way(corpus, flags, reference, tmp_path, how):
    output = tmp_path / "out"
    if how == "two workers":
        prepare(corpus, "--output", output, *flags, "--workers", 2)
    elif how == "three parts":
        for part in (2, 0, 1):
            prepare(corpus, "--output", output, *flags, "--part", f"{part}/3")
        prepare(corpus, "--output", output, *flags, "--merge")
    elif how == "parts of the merge":
        prepare(corpus, "--output", output, *flags, "--part", "0/2")
        with pytest.raises(CorpusError, match="--merge: 3 of 7 input files are not read yet"):
            prepare(corpus, "--output", output, *flags, "--merge")
        prepare(corpus, "--output", output, *flags, "--part", "1/2")
        for part in (1, 0):
            prepare(corpus, "--output", output, *flags, "--merge", "--part", f"{part}/2")
        prepare(corpus, "--output", output, *flags, "--merge")
    else:
        for number, file in enumerate(sorted(corpus.rglob("*.*z*"))):
            # a text file keeps its name's meaning: .txt.gz stays .txt.gz
            ending = ".txt.gz" if file.name.endswith(".txt.gz") else ".jsonl.zst"
            os.link(file, tmp_path / f"{9 - number}{ending}")
        prepare(*sorted(tmp_path.glob("*z*"), reverse=True), "--output", output, *flags)
    assert checksums(output) == checksums(reference)
    assert (output / "SHA256SUMS").read_bytes() == (reference / "SHA256SUMS").read_bytes()


def test_compressed_work_is_smaller_and_may_be_chosen_at_any_time(corpus, flags, reference, tmp_path):
    sizes = []
    for part, choice in (("0/2", []), ("1/2", ["--compress-work"])):
        prepare(corpus, "--output", tmp_path, *flags, "--part", part, *choice)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "work").glob("*.segments")) - sum(sizes))
    prepare(corpus, "--output", tmp_path, *flags, "--merge", "--compress-work")
    assert checksums(tmp_path) == checksums(reference)
    assert sizes[1] < 0.8 * sizes[0]
    assert prepare(corpus, "--output", tmp_path, *flags) == 0  # finished, and no other corpus


def test_ten_kills_and_a_rerun_give_the_same_bytes(corpus, flags, reference, tmp_path):
    """Each run goes on from the one that was killed; the moments are drawn among all calls that the program makes."""
    rng = random.Random(3)
    output = tmp_path / "out"
    arguments = [corpus, "--output", output, *flags]
    killed = 0
    for _ in range(10):
        process = start_in_own_group(arguments, calls=rng.randrange(250_000))  # of 1.2 million in an undisturbed run
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 8
    assert prepare(*arguments) == 0
    assert checksums(output) == checksums(reference)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in reference.iterdir())


def test_pieces_of_a_shard_are_kept_and_joined_in_order(corpus, tmp_path, monkeypatch):
    """One shard for two workers; the merge fails in one of its pieces and goes on with those that are there."""
    arguments = [corpus, "--valid-fraction", "0.05", "--test-fraction", "0.02", "--output"]
    prepare(*arguments, tmp_path / "one")
    assert len(checksums(tmp_path / "one")) == 3
    documents_of_bucket = merging.documents_of_bucket

    def failing(bucket, *others):
        if bucket == 2000:
            raise CorpusError("no more")
        if bucket < 512:
            time.sleep(0.0002)  # the first piece is the last one to come
        return documents_of_bucket(bucket, *others)

    monkeypatch.setattr(merging, "documents_of_bucket", failing)
    with pytest.raises(CorpusError, match="no more"):
        prepare(*arguments, tmp_path / "two", "--workers", 2)
    pieces = list((tmp_path / "two" / "work").glob("merge-*/piece.*.json"))
    assert 0 < len(pieces) < 8 and not list((tmp_path / "two").glob("*.part-*"))

    def once(bucket, *others):
        assert not any(first <= bucket < last for first, last in done), "a piece is written again"
        return documents_of_bucket(bucket, *others)

    done = [tuple(map(int, path.name.split(".")[1].split("-"))) for path in pieces]
    monkeypatch.setattr(merging, "documents_of_bucket", once)
    prepare(*arguments, tmp_path / "two", "--workers", 2)
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]


def test_run_that_was_killed_after_its_end_leaves_nothing(corpus, flags, reference, tmp_path):
    prepare(corpus, "--output", tmp_path / "out", *flags)
    (tmp_path / "out" / "work").mkdir()
    prepare(corpus, "--output", tmp_path / "out", *flags)
    assert checksums(tmp_path / "out") == checksums(reference)


WEIGHTS = ["--component-weight", "Github=2.5", "--component-weight", "Pile-CC=0.5", "--drop-near-duplicates"]


def test_one_result_with_copies_near_duplicates_and_kills(corpus, flags, tmp_path):
    arguments = [corpus, *flags, *WEIGHTS, "--shard-size", "150KB", "--valid-input", corpus / "fr.txt.gz", "--output"]
    prepare(*arguments, tmp_path / "reference")
    for number in (2, 4):
        prepare(*arguments, tmp_path / str(number), "--workers", number)
        assert checksums(tmp_path / str(number)) == checksums(tmp_path / "reference")
    for part in (1, 0):
        prepare(*arguments, tmp_path / "parts", "--part", f"{part}/2")
    for part in (0, 1):
        prepare(*arguments, tmp_path / "parts", "--merge", "--part", f"{part}/2")
    prepare(*arguments, tmp_path / "parts", "--merge")
    assert checksums(tmp_path / "parts") == checksums(tmp_path / "reference")
    reports = [(tmp_path / name / "report.json").read_bytes() for name in ("reference", "2", "4", "parts")]
    assert len(set(reports)) == 1
    rng = random.Random(6)
    for _ in range(3):
        start_in_own_group([*arguments, tmp_path / "killed"], calls=rng.randrange(300_000)).join()
    prepare(*arguments, tmp_path / "killed")
    assert (tmp_path / "killed" / "report.json").read_bytes() == reports[0]
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "reference")


def test_kills_of_a_group_of_workers(corpus, flags, reference, tmp_path):
    rng = random.Random(4)
    arguments = [corpus, "--output", tmp_path / "out", *flags, "--workers", 2]
    for _ in range(4):
        process = start_in_own_group(arguments)
        time.sleep(rng.uniform(0.02, 0.35))
        kill_group(process)
    assert prepare(*arguments) == 0
    assert checksums(tmp_path / "out") == checksums(reference)


def test_workers_end_with_a_killed_parent(corpus, flags, tmp_path):
    process = start_in_own_group([corpus, "--output", tmp_path / "out", *flags, "--workers", 2])
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


@pytest.mark.parametrize("choice", [[], ["--compress-work"]], ids=["plain", "compressed"])
def test_damaged_intermediate_file_is_found_by_the_merge(corpus, flags, tmp_path, choice):
    output = tmp_path / "out"
    flags = flags + choice
    prepare(corpus, "--output", output, *flags, "--part", "0/2")
    prepare(corpus, "--output", output, *flags, "--part", "1/2")
    path = sorted((output / "work").glob("*.segments"))[0]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="does not match its checksum; remove .* and prepare its part again"):
        prepare(corpus, "--output", output, *flags, "--merge")


def test_parts_come_from_the_environment(corpus, flags, reference, tmp_path, monkeypatch):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        prepare(corpus, "--output", tmp_path / "out", *flags)
    prepare(corpus, "--output", tmp_path / "out", *flags, "--merge")
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


def test_signatures_of_an_older_version_are_made_again_and_finished_folders_are_left(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    words = made_up_texts(2, 8, words=200)
    (tmp_path / "a.jsonl").write_text("\n".join(pile_lines([words[0], words[0] + " end", words[1]])))
    arguments = [tmp_path / "a.jsonl", "--valid-fraction", "0", "--drop-near-duplicates", "--output"]
    with monkeypatch.context() as older:
        older.setattr(near_duplicates, "VERSION", near_duplicates.VERSION - 1)
        older.setattr(preparation, "band_hashes", lambda text: None)
        prepare(*arguments, tmp_path / "finished")
        prepare(*arguments, tmp_path / "begun", "--part", "0/2")
        prepare(*arguments, tmp_path / "begun", "--merge", "--part", "0/2")
    assert len(documents_of(tmp_path / "finished")) == len(documents_of(tmp_path / "begun")) == 3
    caplog.clear()
    prepare(*arguments, tmp_path / "finished")
    assert "is complete, nothing to do" in caplog.text
    prepare(*arguments, tmp_path / "begun")
    assert "1 files, 0 of them already read" in caplog.text
    assert len(documents_of(tmp_path / "begun")) == 2
