"""The recipes from a folder with spaces, with relative paths and a CDPATH; signals, locks, and what they print last."""

import fcntl
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.recipes import Checkout, alive

QUICKSTART = "scripts/quickstart.sh"


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a b")


@pytest.fixture
def text(checkout):
    folder = checkout.work / "my text"
    folder.mkdir()
    (folder / "one.txt").write_text("one\n")
    return "my text"


def paths_of(calls):
    """Everything in the calls that names a place below the test's folder, or looks relative."""
    return [word for _, arguments, _ in calls for word in arguments if "/" in word]


def test_quickstart_with_relative_paths_and_its_last_lines_from_anywhere(checkout, text):
    flags = ["--text", text, "--out", "o ut", "--dictionary", "512", "--arch", "ode_bert_rk4_tiny", "--updates", "7"]
    result = checkout.run(QUICKSTART, *flags)
    assert result.returncode == 0 and "No such file" not in result.stderr, result.stderr
    assert (checkout.work / "o ut" / "own-text" / "data-bin.log").is_file()
    assert all(Path(path).is_absolute() for path in paths_of(checkout.calls()) if not path.startswith("--"))
    last = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()[-5:] if line}
    elsewhere = checkout.work.parent / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "CALLS": str(checkout._calls)}
    for command in (last["try"], last["sweep"], last["more"]):
        done = subprocess.run(["bash", "-c", command], cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    filled, training = [call for call in checkout.calls() if call[0] in ("fill-masks", "fairseq-train")][:2]
    out = checkout.work / "o ut"
    assert filled[1] == [f"{out}/own-text/ode_bert_rk4_tiny", "Return the <mask> of the list."]
    assert training[1][training[1].index("--max-update") + 1] == "14"  # seven more of the very same model
    assert training[1][training[1].index("--save-dir") + 1] == f"{out}/own-text/ode_bert_rk4_tiny"
    assert not list(elsewhere.iterdir()) and "kept from an earlier run" in done.stdout


@pytest.mark.parametrize(
    "family, sweep", [("ode", "depth-sweep"), ("neural-ode", "depth-sweep"), ("deq", "budget-sweep")]
)
def test_each_family_trains_by_its_recipe_and_turns_its_own_dial(checkout, text, family, sweep):
    result = checkout.run(QUICKSTART, "--text", text, "--model", family)
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in checkout.calls()}
    training, (checkpoint, data) = calls["fairseq-train"], calls["score"]
    assert checkpoint == f"{training[training.index('--save-dir') + 1]}/checkpoint_best.pt" and data == training[0]
    assert training[training.index("--valid-mask-prob") + 1] == "0.15" and "--encoder-init-std" in training
    updates = training[training.index("--max-update") + 1]
    assert training[training.index("--total-num-update") + 1] == updates and int(updates) > 0
    assert calls[sweep][:4] == [checkpoint, data, "--out", f"{Path(checkpoint).parent}/dial.png"]
    folder, *asked = calls["fill-masks"]  # the sentences of our own are English
    assert asked == ["--text", str(Path(data).with_name("corpus") / "valid.txt")]


def test_an_unknown_arch_is_refused_before_any_stage(checkout, text):
    result = checkout.run(QUICKSTART, "--text", text, "--arch", "ode_bert_rk5_tiny")
    assert result.returncode == 2
    assert "ode_bert_rk5_tiny is not registered; the nearest names: ode_bert_rk" in result.stderr
    assert checkout.calls() == []


def test_a_failed_training_says_with_what_it_goes_on(checkout, text):
    result = checkout.run(QUICKSTART, "--text", text, "--redo", FAIL="fairseq-train")
    assert result.returncode == 1 and "ValueError: one sentence" in result.stderr
    command = result.stderr.splitlines()[-1].split("goes on: ")[1]
    assert shlex.split(command)[2:] == ["--out", f"{checkout.work}/quickstart", "--text", f"{checkout.work}/{text}"]


RECIPES = {
    "ode_bert_base.sh": ["my text", "o ut"],
    "deq.sh": ["da ta", "o ut"],
    "pile.sh": ["o ut"],
    "oscar.sh": ["o ut"],
}


@pytest.fixture
def inputs(checkout, text):
    (checkout.work / "da ta").mkdir()
    for file in ("dict.txt", "sentencepiece.bpe.model"):
        (checkout.work / "da ta" / file).write_text("")
    return {"CORPUS": "my text"}


@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_trains_in_the_precision_of_the_machine(checkout, inputs, script):
    for precision in ("--bf16", ""):
        result = checkout.run(f"examples/pretraining/{script}", *RECIPES[script], TRAINS_IN=precision, **inputs)
        assert result.returncode == 0, result.stderr
        training = checkout.calls()[-1][1]
        assert ("--bf16" in training) == bool(precision) and "" not in training and "--fp16" not in training


@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_with_relative_paths(checkout, inputs, script):
    """Every path that a command gets is absolute and below the folder where the recipe was started."""
    result = checkout.run(f"examples/pretraining/{script}", *RECIPES[script], "--max-update", 3, **inputs)
    assert result.returncode == 0, result.stderr
    calls = checkout.calls()
    assert calls[-1][0] == "fairseq-train" and calls[-1][1][-2:] == ["--max-update", "3"]
    assert all(Path(path).is_absolute() for path in paths_of(calls)), calls
    assert f"{checkout.work}/o ut/checkpoints" in calls[-1][1] and "--fp16" not in calls[-1][1]
    assert sorted(path.name for path in checkout.work.iterdir()) == ["da ta", "my text", "o ut"]
    tune = [line for line in result.stdout.splitlines() if line.startswith("tune ")]
    assert shlex.split(tune[0])[-2:] == [f"{checkout.work}/o ut/checkpoints", f"{checkout.work}/o ut/rte"]


@pytest.mark.parametrize("script", ["ode_bert_base.sh", "pile.sh", "oscar.sh", "deq.sh"])
def test_an_input_that_is_not_there_is_one_sentence(checkout, script):
    result = checkout.run(f"examples/pretraining/{script}", *["no ne", "o ut"][: len(RECIPES[script])], CORPUS="no ne")
    assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1 and "no ne" in result.stderr
    assert list(checkout.work.iterdir()) == []


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1"])
def test_a_signal_ends_the_training_and_all_its_processes(checkout, text, name):
    process = checkout.start(QUICKSTART, "--text", text, HANG="fairseq-train")
    training = checkout.wait_for("running")
    for _ in range(2):  # as `timeout` does
        process.send_signal(getattr(signal, f"SIG{name}"))
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, f"SIG{name}")
    assert checkout.wait_for("told") == (signal.SIGUSR1 if name == "USR1" else signal.SIGTERM)
    assert alive(training) == []
    assert stderr.splitlines()[-1].startswith(f"quickstart: stopped by SIG{name}; from there goes on: bash ")


@pytest.mark.parametrize(
    "script, program", [("ode_bert_base.sh", "text-corpus"), ("pile.sh", "binarise"),
                        ("oscar.sh", "prepare-corpus"), ("deq.sh", "fairseq-train")]
)  # fmt: skip
def test_a_signal_ends_every_recipe_at_any_stage(checkout, inputs, script, program):
    process = checkout.start(f"examples/pretraining/{script}", *RECIPES[script], HANG=program, **inputs)
    running = checkout.wait_for("running")
    process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143 and alive(running) == []
    assert stderr.splitlines()[-1] == f"{script[:-3]}: stopped by SIGTERM; from there goes on: the same command"


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_second_of_two_ends_at_once_and_names_the_first(checkout, text):
    first = checkout.start(QUICKSTART, "--text", text, HANG="fairseq-train")
    training = checkout.wait_for("running")
    checkout.calls()
    before = tree(checkout.work)
    second = checkout.run(QUICKSTART, "--text", text)
    assert second.returncode == 1 and second.stdout == "" and len(second.stderr.splitlines()) == 1
    assert f"quickstart is in use by process {first.pid} on {os.uname().nodename} since 20" in second.stderr
    assert tree(checkout.work) == before and checkout.calls() == []
    # The script is killed, its training is not: the folder stays in use until that has ended, too.
    first.kill()
    first.wait()
    third = checkout.run(QUICKSTART, "--text", text)
    assert third.returncode == 1 and f"in use by process {training}, " in third.stderr and tree(checkout.work) == before
    os.killpg(training, signal.SIGKILL)
    first.communicate(timeout=20)
    assert checkout.run(QUICKSTART, "--text", text).returncode == 0


def test_without_flock_the_owner_is_known_by_its_number(checkout, tmp_path, text):
    """A dead owner on this machine is followed, another machine's is not."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            if program.name not in ("flock", "setsid") and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    lock = checkout.work / "quickstart/.lock"
    lock.parent.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner, host, status in ((gone.pid, "elsewhere", 1), (os.getpid(), os.uname().nodename, 1),
                                (gone.pid, os.uname().nodename, 0)):  # fmt: skip
        lock.write_text(f"{owner} {host} 2026-01-02 03:04:05\n")
        result = checkout.run(QUICKSTART, "--text", text, PATH=str(programs))
        assert result.returncode == status, result.stderr
        if status:
            assert f"in use by process {owner} on {host} since 2026-01-02 03:04:05" in result.stderr
    assert lock.read_text() == ""


def test_a_lock_that_another_machine_holds_is_respected(checkout, text):
    """Over a network file system the kernel tells that there is a holder, and the file who it is."""
    lock = checkout.work / "quickstart/.lock"
    lock.parent.mkdir()
    with open(lock, "w") as held:
        held.write("17 node7 2026-01-02 03:04:05\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        result = checkout.run(QUICKSTART, "--text", text)
    assert result.returncode == 1 and "process 17 on node7 since 2026-01-02 03:04:05" in result.stderr


SLURM = "examples/pretraining/slurm_array.sh"


@pytest.fixture
def cluster(checkout):
    """A folder with `sbatch` and `scontrol` that note what they are asked."""
    programs = checkout.work.parent / "slurm"
    programs.mkdir()
    for name in ("sbatch", "scontrol"):
        (programs / name).write_text(
            f'#!/bin/bash\n{{ echo "{name}"; printf "%s\\n" "$@" "CORPUS=${{CORPUS-}}" "OUT=${{OUT-}}"; echo; }} '
            f'>>"{programs}/asked"\necho 4711\n'
        )
        (programs / name).chmod(0o755)
    return programs


def asked(cluster):
    return (cluster / "asked").read_text().strip().split("\n\n")


@pytest.mark.parametrize("corpus", [["my text"], ["one.txt", "two.txt"]])
def test_slurm_jobs_get_absolute_paths_and_run_from_a_copy(checkout, cluster, corpus):
    for name in corpus:
        (checkout.work / name).write_text("text\n")
    result = checkout.run(SLURM, "submit", CORPUS=" ".join(corpus), OUT="o ut", TASKS="3", path=cluster)
    assert result.returncode == 0, result.stderr
    jobs = asked(cluster)
    assert len(jobs) == 4 and "data-bin.txt" in result.stdout
    found = jobs[0].split("CORPUS=")[1].split("\nOUT=")
    assert found == ["\n".join(f"{checkout.work}/{name}" for name in corpus), f"{checkout.work}/o ut"]
    # SLURM runs a copy of the script, with the arguments behind its name
    words = jobs[0].split("\nCORPUS=")[0].split("\n")
    assert words[-3:] == [f"{checkout.root}/{SLURM}", "read", str(checkout.root)]
    copy = checkout.work.parent / "spool/slurm_script"
    copy.parent.mkdir()
    copy.write_bytes((checkout.root / SLURM).read_bytes())
    variables = {"CORPUS": found[0], "OUT": found[1], "SLURM_JOB_ID": "1", "FLAGS": "--strict -v"}
    result = checkout.run(copy, "read", checkout.root, **variables)
    assert result.returncode == 0, result.stderr
    (name, arguments, _), *_ = checkout.calls()
    assert name == "prepare-corpus" and arguments[: len(corpus)] == found[0].split("\n")
    assert arguments[-2:] == ["--strict", "-v"] and f"{checkout.work}/o ut/prepared" in arguments


def test_submit_without_an_environment_makes_it_first(checkout, cluster):
    (checkout.work / "my text").write_text("text\n")
    (checkout.root / ".venv/set-up-complete").unlink()
    (checkout.root / "scripts/environment.sh").write_text("fail 'environment: no Python'\n")
    result = checkout.run(SLURM, "submit", CORPUS="my text", OUT="o ut", path=cluster)
    assert result.returncode == 1 and "environment: no Python" in result.stderr and not (cluster / "asked").exists()


def test_a_slurm_task_at_the_end_of_its_time_goes_back_into_the_queue(checkout, cluster, text):
    slurm = {"SLURM_JOB_ID": "812", "SLURM_ARRAY_JOB_ID": "800", "SLURM_ARRAY_TASK_ID": "5"}
    process = checkout.start(SLURM, "read", CORPUS=text, OUT="o ut", HANG="prepare-corpus", path=cluster, **slurm)
    running = checkout.wait_for("running")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 138 and alive(running) == []
    assert asked(cluster)[0].split("\n")[:3] == ["scontrol", "requeue", "800_5"]  # 812 would be the whole array


def test_suspending_suspends_the_command(checkout, text):
    process = checkout.start(QUICKSTART, "--text", text, HANG="fairseq-train")
    training = checkout.wait_for("running")

    def state(pid):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def becomes(*states):
        for _ in range(500):
            if (state(process.pid) == "T", state(training) == "T") == states:
                return True
            time.sleep(0.01)
        return False

    process.send_signal(signal.SIGTSTP)
    assert becomes(True, True)
    process.send_signal(signal.SIGCONT)
    assert becomes(False, False)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143 and alive(training) == []
