"""A training job: one writer to a folder, signals that lose one update at most, half precision that resumes exactly."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import fairseq_implicit.models  # noqa: F401
from fairseq_implicit.compat import training
from fairseq_implicit.compat.checkpoints import MASTERS


def updates(path) -> int:
    return torch.load(path)["optimizer_history"][-1]["num_updates"]


# --- the lock ---------------------------------------------------------------------------------------------------------


def held(folder, ready, release):
    lock = training.own_folder(folder)
    ready.set()
    release.wait(60)
    lock.close()


def test_one_writer_to_a_folder(tmp_path):
    folder = str(tmp_path / "check points")
    ready, release = multiprocessing.Event(), multiprocessing.Event()
    owner = multiprocessing.get_context("fork").Process(target=held, args=(folder, ready, release))
    owner.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=rf"check points \(process {owner.pid} on .* since 20.*another --save-dir"):
        training.own_folder(folder)
    owner.kill()  # the kernel takes the lock from a dead process
    owner.join()
    lock = training.own_folder(folder)
    assert f"process {os.getpid()} " in open(lock.name, encoding="utf-8").read()
    training.own_folder(folder).close()  # the process itself may come back


def test_a_second_training_is_refused_and_the_first_unharmed(toy_flags, fairseq_train, fork, tmp_path):
    ready, release = multiprocessing.Event(), multiprocessing.Event()
    owner = fork(held, str(tmp_path), ready, release)
    assert ready.wait(60)
    with pytest.raises(ValueError, match="another training writes to --save-dir"):
        fairseq_train(*toy_flags, "--max-update", 1, "--save-dir", tmp_path)
    assert os.listdir(tmp_path) == [training.LOCK_FILE]
    fairseq_train(*toy_flags, "--max-update", 1, "--no-save", "--save-dir", tmp_path)  # writes nothing
    release.set()
    owner.result()
    for _ in range(2):  # and the lock of a finished training is free, within one process as well
        fairseq_train(*toy_flags, "--max-update", 1, "--save-dir", tmp_path, "--disable-validation")


# --- signals ----------------------------------------------------------------------------------------------------------


def exit_status(fairseq_train, *flags):
    try:
        fairseq_train(*flags)
    except SystemExit as end:
        return end.code
    return 0


def interrupted(fairseq_train, number, at, *flags):
    """Trains and sends itself a signal during the update ``at``; returns the exit status."""
    from fairseq.trainer import Trainer

    original = Trainer.train_step

    def train_step(trainer, *args, **kwargs):
        if trainer.get_num_updates() == at - 1:
            os.kill(os.getpid(), number)
        return original(trainer, *args, **kwargs)

    Trainer.train_step = train_step
    return exit_status(fairseq_train, *flags)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_after_the_running_update(toy_flags, fairseq_train, fork, tmp_path, number, status):
    flags = toy_flags + "--arch ode_bert_gated_tiny --bf16 --save-on-signal --disable-validation --max-update 7".split()
    stopped = fork(interrupted, fairseq_train, number, 5, *flags, "--save-dir", tmp_path / "stopped")
    assert stopped.result() == status
    assert updates(tmp_path / "stopped" / "checkpoint_last.pt") == 5
    resumed = fairseq_train(*flags, "--save-dir", tmp_path / "stopped")
    whole = fairseq_train(*flags, "--save-dir", tmp_path / "whole")
    assert sorted(resumed.losses()) == [6, 7]
    assert resumed.losses() == {number: whole.losses()[number] for number in (6, 7)}
    one, other = (torch.load(tmp_path / run / "checkpoint_last.pt") for run in ("stopped", "whole"))
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())
    masters = one["last_optimizer_state"][MASTERS], other["last_optimizer_state"][MASTERS]
    assert all(torch.equal(left, right) for left, right in zip(*masters, strict=True))


def in_validation(fairseq_train, *flags):
    from fairseq.trainer import Trainer

    original = Trainer.valid_step
    calls = []

    def valid_step(trainer, *args, **kwargs):
        calls.append(trainer.get_num_updates())
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    Trainer.valid_step = valid_step
    return exit_status(fairseq_train, *flags), calls


def test_a_signal_in_validation_does_not_wait_for_its_end(toy_flags, fairseq_train, fork, tmp_path):
    flags = toy_flags + [
        "--save-on-signal",
        "--validate-interval-updates",
        3,
        "--batch-size",
        1,
        "--save-dir",
        tmp_path,
    ]
    status, calls = fork(in_validation, fairseq_train, *flags).result()
    assert status == 143 and calls[:2] == [3, 3] and len(calls) < 5
    assert updates(tmp_path / "checkpoint_last.pt") == 3


def test_without_the_flag_a_signal_ends_the_process(toy_flags, fairseq_train, fork, tmp_path):
    flags = toy_flags + ["--disable-validation", "--max-update", 7, "--save-dir", tmp_path]
    run = fork(interrupted, fairseq_train, signal.SIGTERM, 5, *flags)
    run.process.join(120)
    assert run.process.exitcode == -signal.SIGTERM and not (tmp_path / "checkpoint_last.pt").exists()


def test_the_command_ends_with_the_documented_status(toy_flags, command_line, checkout, tmp_path):
    """The command itself, twice told: by the first signal it saves, with workers that end with it."""
    process = command_line(
        "fairseq-train", *toy_flags, "--cpu", "--user-dir", checkout / "fairseq_implicit", "--save-on-signal",
        "--save-dir", tmp_path, "--disable-validation", "--num-workers", 1, "--log-format", "simple",
        "--log-interval", 1,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "num_updates=2," in line:
            process.send_signal(signal.SIGTERM)
            break
    output = "".join(lines) + process.communicate(timeout=120)[0]
    assert process.returncode == 143, output[-3000:]
    assert "SIGTERM: a checkpoint is saved after the running update" in output
    ended = re.search(r"ended by SIGTERM after (\d+) updates: the same command goes on", output)
    assert updates(tmp_path / "checkpoint_last.pt") == int(ended.group(1)) >= 2


WAITS = """
import os, signal, sys, time
def run(rank, folder):
    signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(128 + number))
    open(os.path.join(folder, str(rank)), "w").close()
    time.sleep(60)
"""


def test_signals_reach_the_processes_that_fairseq_starts_for_gpus(tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text(WAITS, encoding="utf-8")
    script = (
        "if __name__ == '__main__':\n"  # the processes that it starts import this file again
        "    import sys, torch; from types import SimpleNamespace; from omegaconf import OmegaConf; import waits\n"
        "    from fairseq_implicit.compat import training\n"
        "    def original(cfg, main): torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)\n"
        "    cfg = SimpleNamespace(model=OmegaConf.create({'save_on_signal': True}))\n"
        "    training.call_main(original, cfg, waits.run)\n"
    )
    (tmp_path / "parent.py").write_text(script, encoding="utf-8")
    ready = tmp_path / "ready"
    ready.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(ready)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(os.listdir(ready)) < 2:
        assert parent.poll() is None and time.monotonic() < deadline, parent.stderr.read()
        time.sleep(0.05)
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(60) == 138, parent.stderr.read()


def test_a_finished_training_trains_no_further(toy_flags, fairseq_train, tmp_path):
    flags = [*toy_flags, "--save-dir", tmp_path]
    fairseq_train(*flags, "--max-update", 4)
    before = torch.load(tmp_path / "checkpoint_last.pt")
    again = fairseq_train(*flags, "--max-update", 4)
    after = torch.load(tmp_path / "checkpoint_last.pt")
    assert again.losses() == {} and "nothing to train: 4 updates are done" in again.text
    assert len(again.metrics("valid")) == 1  # a signal may have come during the last one
    assert after["extra_state"]["train_iterator"] == before["extra_state"]["train_iterator"]
    assert all(torch.equal(after["model"][name], weight) for name, weight in before["model"].items())
    assert sorted(fairseq_train(*flags, "--max-update", 6).losses()) == [5, 6]


def test_a_checkpoint_names_its_data_for_any_working_directory(toy_flags, fairseq_train, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(toy_flags[0]))
    relative = [os.path.basename(toy_flags[0]), *toy_flags[1:]]
    fairseq_train(*relative, "--max-update", 1, "--disable-validation", "--save-dir", tmp_path)
    assert torch.load(tmp_path / "checkpoint_last.pt")["cfg"]["task"]["data"] == toy_flags[0]


def test_models_of_others_have_no_such_flag():
    for model in (None, SimpleNamespace(arch="roberta"), OmegaConf.create({"_name": "roberta"})):
        assert not training.saves_on_signal(SimpleNamespace(model=model))


# --- half precision ---------------------------------------------------------------------------------------------------


def test_older_checkpoints_of_half_precision_open(toy_flags, fairseq_train, tmp_path):
    flags = toy_flags + ["--bf16", "--disable-validation", "--save-dir", tmp_path]
    fairseq_train(*flags, "--max-update", 2)
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path)
    masters = state["last_optimizer_state"].pop(MASTERS)
    assert [weights.dtype for weights in masters] == [torch.float32] * len(masters)
    torch.save(state, path)
    run = fairseq_train(*flags, "--max-update", 3)
    assert sorted(run.losses()) == [3] and "holds no float32 weights" in run.text


def optimizer(flat, start):
    """fairseq's half-precision optimiser as far as its weights go; flat ones need a GPU to be built."""
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    fp32 = SimpleNamespace(state_dict=lambda: {"state": {}}, load_state_dict=lambda state, overrides: None)
    made = object.__new__(FP16Optimizer)
    made.scaler, made.fp32_optimizer = None, fp32
    weights = [torch.arange(6.0).view(2, 3) + start, torch.arange(4.0) - start]
    made.fp32_params = {0: torch.cat([weight.flatten() for weight in weights])} if flat else weights
    return made


@pytest.mark.parametrize("saved_flat", [False, True])
@pytest.mark.parametrize("loaded_flat", [False, True])
def test_masters_fit_however_they_are_stored(saved_flat, loaded_flat):
    state = optimizer(saved_flat, 0.25).state_dict()
    resumed = optimizer(loaded_flat, 7.0)
    resumed.load_state_dict(state)
    expected = optimizer(loaded_flat, 0.25).fp32_params
    pairs = (
        zip(resumed.fp32_params.values(), expected.values(), strict=True)
        if loaded_flat
        else zip(resumed.fp32_params, expected, strict=True)
    )
    assert all(torch.equal(found, wanted) for found, wanted in pairs)
    assert MASTERS in state  # the caller's state is left as it was
    state[MASTERS] = state[MASTERS][:1] if not saved_flat else [state[MASTERS][0][:3]]
    with pytest.raises(ValueError, match="--reset-optimizer"):
        resumed.load_state_dict(state)


def test_a_training_that_diverges_says_what_to_change(toy_flags, fairseq_train, tmp_path):
    flags = [*toy_flags, "--lr", "1e30", "--clip-norm", "1", "--max-update", 9, "--disable-validation", "--no-save"]
    with pytest.raises(FloatingPointError, match=r"diverged at update [2-4] \(.*\): lower --lr, lengthen --warmup"):
        fairseq_train(*flags, "--save-dir", tmp_path)
