"""A checkout whose programs are stand-ins, for what the recipes do themselves: paths, quoting, order, signals, locks.

The recipes are copied into a folder with spaces in its name, and with them an environment whose `python` and fairseq
commands note their arguments and make what the next step looks for. Nothing is imported, so that a recipe takes a
fraction of a second from its first step to its last.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Through the shell, because the line that names an interpreter has no room for blanks.
PROGRAM = '''#!/bin/sh
""":"
exec "{python}" "$0" "$@"
"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
if name == "python":
    if arguments[0] == "-c":
        os.execv(sys.executable, [sys.executable, *arguments])
    if arguments[0] == "-V":
        sys.exit(print("Python 3.11.0"))
    if arguments[:2] == ["-m", "fairseq_implicit"]:
        arguments = arguments[2:]
    name, arguments = Path(arguments[0]).name, arguments[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, arguments, os.getcwd()]) + "\\n")
if name == os.environ.get("HANG"):
    # like a training: the signal is noted at the end of an update that is under way
    def told(number, frame):
        time.sleep(0.1)
        Path(os.environ["CALLS"]).with_name("told").write_text(str(number))
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGUSR1, told)
    subprocess.Popen(["sleep", "60"])  # a worker
    Path(os.environ["CALLS"]).with_name("running").write_text(str(os.getpid()))
    time.sleep(60)
if name == os.environ.get("FAIL"):
    sys.exit("ValueError: one sentence with the reason")

def value(flag):
    return Path(arguments[arguments.index(flag) + 1])

def make(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

if name == "text-corpus":
    for split in ("train", "valid", "test"):
        make(value("--out") / (split + ".txt"), "text\\n")
elif name == "train-tokenizer":
    make(value("--out"))
    make(value("--out").with_name("dict.txt"))
elif name == "fairseq-preprocess":
    for file in ("dict.txt", "sentencepiece.bpe.model", "valid.idx"):
        make(value("--destdir") / file)
elif name == "binarise":
    for file in ("dict.txt", "sentencepiece.bpe.model"):
        make(value("--output") / "shard0" / file)
    make(value("--output") / "data-bin.txt", str(value("--output") / "shard0") + "\\n")
elif name == "fairseq-train":
    make(value("--save-dir") / "checkpoint_best.pt")
elif name == "precision":
    print(os.environ.get("TRAINS_IN", ""))
'''


class Checkout:
    """A copy of the recipes with stand-ins for what they call.

    Attributes:
        root: its folder, ``<folder>/check out``.
        work: a folder beside it, where the commands are started and relative paths begin.
    """

    def __init__(self, folder: Path):
        self.root, self.work = folder / "check out", folder / "work"
        self.work.mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "examples/pretraining", self.root / "examples/pretraining")
        for name in ("commands", "corpora", "data", "models", "text"):
            (self.root / "fairseq_implicit" / name).mkdir(parents=True)
        for file in ("requirements.txt", "fairseq_implicit/data/dictionary.py", "fairseq_implicit/text/vocabulary.py",
                     "fairseq_implicit/commands/train_tokenizer.py", "fairseq_implicit/corpora/docstrings.py",
                     "fairseq_implicit/corpora/small_corpus.py",
                     "fairseq_implicit/corpora/tokenizer_training.py"):  # fmt: skip
            shutil.copy(ROOT / file, self.root / file)
        (self.root / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 0)\n")
        (self.root / "fairseq_implicit/__init__.py").write_text("")
        (self.root / "fairseq").mkdir()
        (self.root / "fairseq/__init__.py").write_text("")
        archs = 'ARCH_MODEL_REGISTRY = ["ode_bert_rk2_tiny", "ode_bert_rk4_tiny"]\n'
        (self.root / "fairseq/models.py").write_text(archs)
        programs = self.root / ".venv/bin"
        programs.mkdir(parents=True)
        for name in ("python", "fairseq-preprocess", "fairseq-train"):
            (programs / name).write_text(PROGRAM.replace("{python}", sys.executable))
            (programs / name).chmod(0o755)
        stamp = subprocess.run(["cksum"], stdin=open(self.root / "requirements.txt"), capture_output=True, text=True)
        (self.root / ".venv/set-up-complete").write_text(stamp.stdout)
        self._calls = folder / "calls"

    def start(self, script, *arguments, path="", **environment):
        """Starts a recipe; ``path`` comes before the PATH, the other keywords are environment variables."""
        return subprocess.Popen(
            ["bash", str(self.root / script), *map(str, arguments)],
            cwd=self.work,
            env={
                **os.environ,
                "CALLS": str(self._calls),
                "CDPATH": str(self.root),  # with which `cd` prints
                "PATH": f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"],
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *arguments, **environment):
        """Runs a recipe to its end."""
        process = self.start(script, *arguments, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self):
        """[(program, arguments, folder)] since the last question."""
        found = [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return found

    def wait_for(self, name):
        """The content of a file that a stand-in with ``HANG`` leaves: ``running`` or ``told``."""
        file = self._calls.with_name(name)
        for _ in range(1000):
            if file.exists() and file.read_text():
                return int(file.read_text())
            time.sleep(0.01)
        raise TimeoutError(f"no file {file}")


def alive(group: int):
    """Processes of a process group that still run, after a second at most for what has been told to end."""
    for _ in range(100):
        if not (found := _members(group)):
            break
        time.sleep(0.01)
    return found


def _members(group: int):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
