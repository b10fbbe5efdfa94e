"""The command of the study on two tiny models: stopped in the middle, continued, and left alone when finished."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bert_study.logs import read_curve

from tests.conftest import ROOT

SCRIPT = os.path.join(ROOT, "examples", "study", "study.py")


def study(*words, folder=None, **environment):
    command = [sys.executable, SCRIPT, *map(str, words)]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, **output)


def finish(*words):
    process = study(*words)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of made-up language with words enough for the smoke size's dictionary."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 6))) for _ in range(600)]
    for split, lines in (("train", 600), ("valid", 60)):
        text = "\n".join(" ".join(rng.choice(words, 20)) for _ in range(lines)) + "\n"
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """Options, output folder, what the interrupted call said, the runs finished by then, what the next call said."""
    out = tmp_path_factory.mktemp("study")
    options = ("smoke", "--text", text, "--out", out)
    # A relative path, seen from another folder than the project's.
    process = study("smoke", "--text", text.name, "--out", out, folder=text.parent)
    while not list(out.glob("runs/*/*/finished")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stopped, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    early = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/finished")}
    status, output = finish(*options)
    assert status == 0, output
    return options, out, stopped, early, output


def test_a_stopped_study_goes_on(finished):
    _, out, stopped, early, output = finished
    assert "study: ended; the same command goes on from here" in stopped
    assert "DEBUG" not in output and "Profiler" not in output  # of matplotlib and of torch's profiler
    assert 0 < len(early) < 4 and all(path.stat().st_mtime_ns == then for path, then in early.items())
    names = sorted(str(path.parent.relative_to(out / "runs")) for path in out.glob("runs/*/*/finished"))
    assert names == [f"{model}/{kind}-lr0.001" for model in ("deq", "euler") for kind in ("grid", "seed1")]
    assert "report:" in output


def test_the_report_holds_what_the_logs_say(finished):
    _, out, _, _, _ = finished
    report = (out / "report" / "report.md").read_text(encoding="utf-8")
    for name, label in (("euler", "Euler (the ordinary transformer)"), ("deq", "DEQ, implicit gradient")):
        loss = read_curve(str(out / "runs" / name / "seed1-lr0.001" / "train.log")).last["loss"]
        assert any(row.startswith(f"| {label} |") and f"| {loss:.3f} |" in row for row in report.splitlines())
    measured = json.loads((out / "measured.json").read_text())["models"]
    # Equal parameters: the cell's matrices are those of two layers; injection, norms and biases come on top.
    assert measured["deq"]["depth_parameters"] == pytest.approx(measured["euler"]["depth_parameters"], rel=0.1)
    for axis in ("tokens", "operations", "time"):
        assert f"(curves-{axis}.png)" in report and (out / "report" / f"curves-{axis}.png").stat().st_size > 10_000
    assert str(out) not in report  # no path of this machine


def test_a_finished_study_is_left_alone(finished):
    options, out, _, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
    report = (out / "report" / "report.md").read_bytes()
    status, output = finish(*options)
    assert status == 0 and "missing" not in output and "measuring" not in output
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")} == before
    assert (out / "report" / "report.md").read_bytes() == report


def test_refusals_of_a_folder(finished, text, tmp_path):
    options, out, _, _, _ = finished
    status, output = finish("smoke", "--text", text / "valid.txt", "--out", out)
    assert status == 1 and f"study: {out} holds a study of another text or dictionary: choose another --out" in output
    flags = out / "runs" / "deq" / "seed1-lr0.001" / "flags.json"
    kept = flags.read_text()
    flags.write_text(kept.replace("deq_bert", "ode_bert"))
    status, output = finish(*options)
    flags.write_text(kept)
    assert status == 1 and "was trained with other flags than smoke.yaml and models.yaml name now" in output
    holder = study(*options)
    deadline = time.time() + 60
    while time.time() < deadline:  # until the first call has the lock, the second one may win it
        status, output = finish(*options)
        if "another study" in output:
            break
        if holder.poll() is not None:
            holder = study(*options)
    holder.communicate(timeout=120)
    assert status == 1 and "another study, or a run that a killed one left behind, still works in" in output
    status, output = finish("smoke", "--text", tmp_path / "absent", "--out", tmp_path / "new")
    assert status == 1 and f"study: --text {tmp_path / 'absent'} does not exist" in output


def test_a_study_that_cannot_draw_says_so_before_it_trains(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')\n")
    process = study("smoke", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and output.splitlines() == [
        "study: pictures need matplotlib: pip install 'fairseq_implicit[plots]', or pip install matplotlib"
    ]
