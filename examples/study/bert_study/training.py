"""Prepares the data once and trains what is missing, several runs at a time, each in a folder of its own."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bert_study.logs import last_sentence
from bert_study.plan import Plan, Run, StudyError, arguments

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
PLUGIN = ["--user-dir", os.path.join(ROOT, "fairseq_implicit"), "--task", "implicit_masked_lm"]
INTERVALS = 20  # log lines per run

logger = logging.getLogger(__name__)


def environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
    }


def prepare(plan: Plan, text: str | None, out: str) -> str:
    """Corpus, tokenizer and data folder below ``out``, made where they are missing; returns the data folder.

    Args:
        text: a file or folder of text, or None for the documentation strings of the Python installation.

    Raises:
        StudyError: the text is missing, a step failed, or ``out`` holds other data.
    """
    if text is not None and not os.path.exists(text):
        raise StudyError(f"--text {text} does not exist")
    try:
        key = {"text": _fingerprint(text), "dictionary": plan.dictionary}
    except OSError as error:
        raise StudyError(f"--text {text} cannot be read: {error}") from error
    stamp, data = os.path.join(out, "data.json"), os.path.join(out, "data-bin")
    if os.path.isfile(stamp):
        with open(stamp, encoding="utf-8") as file:
            if json.load(file) != key:
                raise StudyError(f"{out} holds a study of another text or dictionary: choose another --out")
        return data
    work = os.path.join(out, "data.partial")
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)
    corpus, tokenizer = os.path.join(work, "corpus"), os.path.join(work, "sentencepiece.bpe.model")
    ours = [sys.executable, "-m", "fairseq_implicit"]
    source = "--docstrings" if text is None else os.path.abspath(text)
    _step("corpus", [*ours, "text-corpus", source, "--out", corpus], plan.jobs)
    train, valid = (os.path.join(corpus, f"{split}.txt") for split in ("train", "valid"))
    size = ["--dictionary-size", str(plan.dictionary)]
    _step("tokenizer", [*ours, "train-tokenizer", train, "--out", tokenizer, *size], plan.jobs)
    splits = ["--only-source", "--srcdict", tokenizer, "--trainpref", train, "--validpref", valid]
    made = os.path.join(work, "data-bin")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", *PLUGIN, *splits, "--destdir", made]
    _step("data", [*command, "--workers", str(plan.jobs)], plan.jobs)
    os.rename(made, data)
    shutil.copy(tokenizer, data)
    shutil.rmtree(work)
    write_json(stamp, key)
    return data


def _fingerprint(text: str | None) -> str:
    """Of the names and the contents of the files."""
    if text is None:
        return "embedded"
    paths = [text]
    if os.path.isdir(text):
        paths = sorted(os.path.join(top, name) for top, _, names in os.walk(text) for name in names)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.path.relpath(path, text).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _step(name: str, command: list[str], threads: int) -> None:
    logger.info("preparing: %s", name)
    finished = subprocess.run(command, env=environment(threads), cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        said = [line.strip() for line in (finished.stderr or finished.stdout).splitlines() if line.strip()]
        raise StudyError(f"preparing the {name} failed: {said[-1] if said else 'it said nothing'}")


def command(plan: Plan, run: Run, data: str, folder: str) -> list[str]:
    """The words of ``fairseq-train`` for a run."""
    every = run.updates if run.trial else run.updates // plan.validations
    bookkeeping = {
        "criterion": "implicit_masked_lm",
        "save-dir": folder,
        "no-epoch-checkpoints": True,
        "save-interval-updates": every,
        "keep-interval-updates": 1,
        "validate-interval-updates": every,
        "log-interval": max(1, run.updates // INTERVALS),
        "log-format": "json",
        "distributed-world-size": 1,
        "num-workers": 0,
    }
    flags = {**bookkeeping, **plan.flags(run)}
    return [sys.executable, "-m", "fairseq_cli.train", data, *PLUGIN, *arguments(flags)]


def run_folder(out: str, run: Run) -> str:
    return os.path.join(out, "runs", run.name)


def is_finished(out: str, run: Run) -> bool:
    return os.path.isfile(os.path.join(run_folder(out, run), "finished"))


def failure(out: str, run: Run) -> str | None:
    """The sentence with which the last attempt at a run ended, None where it did not fail."""
    try:
        with open(os.path.join(run_folder(out, run), "failed"), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


@dataclass
class Trainer:
    """Trains runs, ``jobs`` at a time.

    A run that ended is not run again, one that was interrupted goes on from its last checkpoint, and one that failed
    is tried again when the study is called again. The failure of one run leaves the others alone.

    Attributes:
        lock: a file descriptor that trainings keep open.
    """

    plan: Plan
    data: str
    out: str
    lock: int

    def __post_init__(self):
        self._children: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, runs: list[Run]) -> None:
        """Runs what is missing of ``runs``, in their order.

        Raises:
            StudyError: a run's folder was made with other flags.
        """
        missing = [run for run in runs if not is_finished(self.out, run)]
        for run in runs:
            self._check_flags(run)
        if not missing:
            return
        logger.info("%d of %d runs are missing", len(missing), len(runs))
        with ThreadPoolExecutor(self.plan.jobs) as pool:
            futures = [pool.submit(self._run, run) for run in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _check_flags(self, run: Run) -> None:
        path = os.path.join(run_folder(self.out, run), "flags.json")
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                if json.load(file) != json.loads(json.dumps(self.plan.flags(run))):
                    raise StudyError(
                        f"{os.path.dirname(path)} was trained with other flags than {self.plan.size}.yaml and "
                        "models.yaml name now: remove it, or choose another --out"
                    )

    def _run(self, run: Run) -> None:
        folder = run_folder(self.out, run)
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, "flags.json"), self.plan.flags(run))
        log, failed = os.path.join(folder, "train.log"), os.path.join(folder, "failed")
        if os.path.exists(failed):
            os.remove(failed)
        with open(log, "a", encoding="utf-8") as output:
            with self._lock:
                if self._stopped:
                    return
                child = subprocess.Popen(
                    command(self.plan, run, self.data, folder),
                    env=environment(self.plan.threads),
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(self.lock,),
                    start_new_session=True,  # an interrupt from the keyboard reaches it through us alone
                )
                self._children.append(child)
            status = child.wait()
        with self._lock:
            self._children.remove(child)
            if self._stopped:
                return
        if status:
            sentence = last_sentence(log)
            with open(failed, "w", encoding="utf-8") as file:
                file.write(sentence)
            logger.warning("%s failed: %s", run.name, sentence)
            return
        with open(os.path.join(folder, "finished"), "w", encoding="utf-8"):
            pass
        logger.info("%s finished", run.name)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.send_signal(signal.SIGTERM)


def write_json(path: str, values) -> None:
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
    os.replace(f"{path}.partial", path)
