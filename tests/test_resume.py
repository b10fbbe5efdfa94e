"""Train, kill -9 in mid-training, resume: the same run, digit for digit."""

import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch


def updates(path) -> int:
    return torch.load(path)["optimizer_history"][-1]["num_updates"]


def test_killed_and_resumed_equals_uninterrupted(toy_flags, fairseq_train, fork, tmp_path):
    # dropout on, two batches per update, learned coefficients, blocks of unequal length, more than one epoch
    flags = (
        toy_flags
        + (
            "--arch ode_bert_gated_tiny --sample-break-mode complete --update-freq 2 --batch-size 64 --dropout 0.1 "
            "--save-interval-updates 7 --disable-validation"
        ).split()
    )
    killed = tmp_path / "killed"
    last = killed / "checkpoint_last.pt"
    run = fork(fairseq_train, *flags, "--save-dir", killed, "--max-update", 10**6)
    deadline = time.monotonic() + 120
    while not last.exists():
        assert run.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    run.process.kill()
    run.process.join()
    assert run.process.exitcode == -signal.SIGKILL
    stopped_at = updates(last)
    end = stopped_at + 9

    # another way to load the data: what is masked depends on seed, epoch and index alone
    loading = ["--num-workers", 1, "--data-buffer-size", 2]
    resumed = fairseq_train(*flags, *loading, "--save-dir", killed, "--max-update", end)
    whole = fairseq_train(*flags, "--save-dir", tmp_path / "whole", "--max-update", end)
    assert min(resumed.losses()) == stopped_at + 1
    expected = {number: loss for number, loss in whole.losses().items() if number > stopped_at}
    assert resumed.losses() == expected
    assert len(resumed.metrics("train")) > 1, "the resumed run must cross the end of an epoch"
    one, other = (torch.load(folder / "checkpoint_last.pt") for folder in (killed, tmp_path / "whole"))
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())
    moments = one["last_optimizer_state"]["state"], other["last_optimizer_state"]["state"]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[1])


def test_restore_with_a_new_optimizer_starts_counting_again(toy_flags, fairseq_train, tmp_path):
    fairseq_train(*toy_flags, "--max-update", 4, "--save-dir", tmp_path / "first", "--disable-validation")
    run = fairseq_train(
        *toy_flags, "--max-update", 2, "--save-dir", tmp_path / "second", "--disable-validation",
        "--restore-file", tmp_path / "first" / "checkpoint_last.pt", "--reset-optimizer", "--reset-lr-scheduler",
        "--reset-dataloader", "--reset-meters",
    )  # fmt: skip
    assert sorted(run.losses()) == [1, 2]
    assert "Loaded checkpoint" in run.text


def test_a_checkpoint_of_a_legacy_optimizer_resumes(toy_flags, fairseq_train, tmp_path):
    flags = toy_flags + ["--optimizer", "sgd", "--save-dir", tmp_path, "--disable-validation"]
    fairseq_train(*flags, "--max-update", 2)
    assert sorted(fairseq_train(*flags, "--max-update", 3).losses()) == [3]


@pytest.fixture
def reordered(toy_data, tmp_path):
    """The toy data with a dictionary of the same symbols in another order."""
    other = tmp_path / "bin"
    shutil.copytree(toy_data, other)
    os.remove(other / "sentencepiece.bpe.model")
    lines = (other / "dict.txt").read_text(encoding="utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    return other


def test_a_checkpoint_of_another_dictionary_is_refused(
    toy_flags, toy_data, reordered, fairseq_train, fairseq_validate, tmp_path
):
    flags = toy_flags[1:] + ["--save-dir", tmp_path / "ck", "--disable-validation"]
    fairseq_train(toy_data, *flags, "--max-update", 2)
    last, anew = tmp_path / "ck" / "checkpoint_last.pt", [*flags[:-3], "--save-dir", tmp_path / "new"]
    resets = "--reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler".split()
    for start in (flags, [*anew, "--finetune-from-model", last], [*anew, "--restore-file", last, *resets]):
        with pytest.raises(ValueError, match="trained with another dictionary"):
            fairseq_train(reordered, *start, "--max-update", 3)
    with pytest.raises(ValueError, match="trained with another dictionary"):
        fairseq_validate(reordered, "--task", "implicit_masked_lm", "--path", last, "--batch-size", 4)
    state = torch.load(last)
    state["task_state"] = {}  # as earlier versions wrote it
    torch.save(state, last)
    fairseq_validate(toy_data, "--task", "implicit_masked_lm", "--path", last, "--batch-size", 4)


def interrupted_at_random(fairseq_train, number, seed, *flags):
    """Trains until a signal that comes at a random moment of a random update."""
    from fairseq.trainer import Trainer

    chance = random.Random(seed)
    original, left = Trainer.train_step, [chance.randint(1, 6)]

    def train_step(trainer, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            moment = threading.Timer(chance.uniform(0.0, 0.05), os.kill, (os.getpid(), number))
            moment.daemon = True  # the last updates may be over before it
            moment.start()
        return original(trainer, *args, **kwargs)

    Trainer.train_step = train_step
    try:
        fairseq_train(*flags)
    except SystemExit as end:
        return end.code
    return 0


def logged_losses(path):
    """``(update, loss)`` of all training lines of a log file, in order."""
    lines = (line.split("train_inner | ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    stats = [json.loads(parts[1]) for parts in lines if len(parts) == 2]
    return [(int(one["num_updates"]), one["loss"]) for one in stats]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_half_precision_interrupted_at_random(toy_flags, fairseq_train, fork, tmp_path, number):
    """As often as INTERRUPTIONS says (2): ``INTERRUPTIONS=10 bash scripts/test.sh tests/test_resume.py``."""
    times, end = int(os.environ.get("INTERRUPTIONS", "2")), 60
    flags = toy_flags + (
        "--arch ode_bert_gated_tiny --bf16 --dropout 0.1 --batch-size 16 --save-interval-updates 2 "
        "--disable-validation --keep-interval-updates 1 --save-on-signal"
    ).split() + ["--max-update", end]  # fmt: skip
    folder, log = tmp_path / "interrupted", tmp_path / "log"
    for seed in range(times):
        run = fork(interrupted_at_random, fairseq_train, number, seed, *flags, "--save-dir", folder, "--log-file", log)
        run.process.join(240)
        if number == signal.SIGTERM:
            assert run.result() == 143
        else:
            assert run.process.exitcode == -number
    fairseq_train(*flags, "--save-dir", folder, "--log-file", log)
    whole = fairseq_train(*flags, "--save-dir", tmp_path / "whole", "--log-file", tmp_path / "expected")
    assert len(whole.metrics("train")) > 1, "the run must cross the end of an epoch"
    found, expected = logged_losses(log), logged_losses(tmp_path / "expected")
    assert dict(found) == dict(expected) and set(found) == set(expected)
    repeated = len(found) - len(expected)
    assert repeated == 0 if number == signal.SIGTERM else repeated <= 2 * times
    one, other = (torch.load(run / "checkpoint_last.pt") for run in (folder, tmp_path / "whole"))
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())
