"""Shared fixtures: a toy corpus, its sentencepiece model and data folder, and fairseq's commands in this process.

Everything is made once per session in a temporary folder; fairseq is imported only by tests that ask for it.
"""

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Trainings of a few updates in bfloat16, whatever the CPU.
os.environ["FAIRSEQ_IMPLICIT_EMULATED_BF16"] = "1"

NOUNS = "encoder solver field block state step scheme order residual gradient tableau stage token mask corpus".split()
VERBS = "integrates bounds repeats follows corrects predicts shortens measures divides restores".split()
ADJECTIVES = "implicit explicit stable learned fixed embedded continuous deep shallow exact".split()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed goes from process to process as UTF-8, and some print names that are none."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def _sentence(rng: np.random.Generator) -> str:
    noun, other = rng.choice(NOUNS, 2)
    text = f"the {rng.choice(ADJECTIVES)} {noun} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {other}"
    return text + (f" in {rng.integers(1, 100)} steps." if rng.random() < 0.3 else ".")


def _document(rng: np.random.Generator) -> str:
    lines = [" ".join(_sentence(rng) for _ in range(rng.integers(1, 5))) for _ in range(rng.integers(1, 8))]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory):
    """Files ``train``, ``valid``, ``test`` of made-up English: a paragraph per line, blank lines between documents."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    files = {}
    for split, documents in (("train", 60), ("valid", 10), ("test", 5)):
        files[split] = folder / f"{split}.txt"
        text = "\n".join(_document(rng) for _ in range(documents))
        if split == "train":  # a paragraph much longer than any block
            text += "\n" + " ".join(_sentence(rng) for _ in range(60)) + "\n"
        files[split].write_text(text, encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def toy_model(toy_text):
    """Path of a unigram sentencepiece model of 180 pieces."""
    import sentencepiece

    prefix = toy_text["train"].with_name("toy")
    sentencepiece.SentencePieceTrainer.train(
        input=str(toy_text["train"]),
        model_prefix=str(prefix),
        vocab_size=180,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return str(prefix) + ".model"


@pytest.fixture(scope="session")
def fairseq_preprocess():
    """``fairseq-preprocess`` in this process: takes the command's arguments."""

    def preprocess(*argv):
        import fairseq_cli.preprocess as command
        from fairseq import options

        import fairseq_implicit.tasks  # noqa: F401  (registers the task)

        try:
            command.main(options.get_preprocessing_parser().parse_args([str(arg) for arg in argv]))
        finally:
            for handler in list(command.logger.handlers):
                handler.close()
                command.logger.removeHandler(handler)

    return preprocess


@pytest.fixture(scope="session")
def toy_data(toy_text, toy_model, fairseq_preprocess, tmp_path_factory):
    """Data folder binarised from raw text in one step."""
    folder = tmp_path_factory.mktemp("data") / "bin"
    fairseq_preprocess(
        *("--task", "implicit_masked_lm", "--only-source", "--srcdict", toy_model, "--destdir", folder),
        *("--trainpref", toy_text["train"], "--validpref", toy_text["valid"], "--testpref", toy_text["test"]),
    )
    return str(folder)


class _Records(logging.Handler):
    """Collects the JSON lines of fairseq's progress bars as ``(tag, dict of numbers)``."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.text = []

    def emit(self, record):
        message = record.getMessage()
        self.text.append(message)
        if message.startswith("{") and record.name in ("train_inner", "train", "valid", "test"):
            stats = {key: float(value) for key, value in json.loads(message).items() if value not in (None, [])}
            self.found.append((record.name, stats))


class Run(list):
    """``(tag, metrics)`` of every line that a command logged, in order; ``text`` has all log messages."""

    def __init__(self, records: _Records):
        super().__init__(records.found)
        self.text = "\n".join(records.text)

    def metrics(self, tag: str):
        """The metrics of all lines of one tag (``train_inner``, ``train``, ``valid``)."""
        return [stats for name, stats in self if name == tag]

    def losses(self, tag: str = "train_inner"):
        """Losses of one tag, by number of updates."""
        prefix = "" if tag == "train_inner" else tag + "_"
        return {int(stats[prefix + "num_updates"]): stats[prefix + "loss"] for stats in self.metrics(tag)}


def _reset_fairseq():
    """Forgets what fairseq keeps in function attributes and module globals between runs of one process."""
    import fairseq_cli.train as train
    from fairseq import checkpoint_utils
    from fairseq.logging import metrics, progress_bar

    metrics.reset()
    for function, names in (
        (checkpoint_utils.save_checkpoint, ["best"]),
        (train.should_stop_early, ["best", "num_runs"]),
    ):
        for name in names:
            if hasattr(function, name):
                delattr(function, name)
    progress_bar._tensorboard_writers.clear()


def _recorded(command):
    """Runs ``command`` and returns what it logged as a ``Run``."""
    records = _Records()
    root = logging.getLogger()
    level, silenced = root.level, root.manager.disable
    logging.disable(logging.NOTSET)  # benchmarks that a test imports silence what fairseq announces
    root.setLevel(logging.INFO)
    root.addHandler(records)
    try:
        command()
    finally:
        root.removeHandler(records)
        root.setLevel(level)
        logging.disable(silenced)
    return Run(records)


@pytest.fixture(scope="session")
def fairseq_train():
    """``fairseq-train`` in this process: takes the command's arguments, returns a ``Run``.

    Runs on the CPU with one thread (as the processes of ``command_line`` do: sums then agree to the last bit) and
    JSON logs. Later flags win, so a caller may repeat those of ``toy_flags``.
    """

    def train(*argv):
        import fairseq_cli.train as command
        import torch
        from fairseq import options
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

        import fairseq_implicit.models  # noqa: F401  (get_parser reads sys.argv, not argv, to find --user-dir)

        from fairseq.distributed.utils import call_main  # isort: skip  (as the plugin leaves it)

        _reset_fairseq()
        threads = torch.get_num_threads()
        common = "--cpu --num-workers 0 --data-buffer-size 0 --log-format json --log-interval 1 --no-epoch-checkpoints"
        arguments = common.split() + [str(arg) for arg in argv]
        parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
        torch.set_num_threads(1)
        try:
            return _recorded(lambda: call_main(convert_namespace_to_omegaconf(parsed), command.main))
        finally:
            torch.set_num_threads(threads)

    return train


@pytest.fixture(scope="session")
def fairseq_validate():
    """``fairseq-validate`` in this process: takes the command's arguments, returns the metrics of the subset."""

    def validate(*argv):
        import fairseq_cli.validate as command
        from fairseq import options
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

        import fairseq_implicit.models  # noqa: F401

        _reset_fairseq()
        arguments = [str(arg) for arg in argv] + ["--cpu", "--num-workers", "0", "--log-format", "json"]
        parsed = options.parse_args_and_arch(options.get_validation_parser(), arguments)
        given = options.parse_args_and_arch(options.get_validation_parser(), arguments, suppress_defaults=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "reset_logging", lambda: None)  # it would remove the handler that records
            run = _recorded(lambda: command.main(convert_namespace_to_omegaconf(parsed), override_args=given))
        return run.metrics("valid")[-1]

    return validate


@pytest.fixture(scope="session")
def toy_flags(toy_data):
    """Flags of a tiny pretraining run on the toy data, without its end (``--max-update``) and ``--save-dir``."""
    return (
        f"{toy_data} --task implicit_masked_lm --criterion implicit_masked_lm --arch ode_bert_rk2_tiny "
        "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --tokens-per-sample 32 --batch-size 4 "
        "--optimizer adam --lr 2e-3 --lr-scheduler fixed --peak-tflops 0.1"
    ).split()


@pytest.fixture
def command(capsys):
    """``fairseq-implicit`` in this process: ``command(name, *arguments)`` returns exit status, output and errors."""

    def run(*arguments):
        from fairseq_implicit.commands import main

        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # of argparse
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def depth_checkpoints(toy_flags, fairseq_train, tmp_path_factory):
    """Paths of an ``ode`` bert, a ``neural`` one and a ``deq`` one, trained with everything that must not stand in the
    way of evaluating them under other settings."""
    found = {}
    for name, flags in (
        ("ode", "--arch ode_bert_rk2_tiny --ode-random-steps 1,2 --ode-gradient checkpoint-step"),
        ("neural", "--arch neural_ode_bert_tiny --ode-scheme bosh3 --ode-local-error 0.1"),
        ("deq", "--arch deq_bert_tiny --deq-ramp-updates 2 --deq-start-max-iter 10 --deq-correction 4"),
    ):
        folder = tmp_path_factory.mktemp(name)
        fairseq_train(*toy_flags, *flags.split(), "--max-update", 3, "--disable-validation", "--save-dir", folder)
        found[name] = str(folder / "checkpoint_last.pt")
    return found


@pytest.fixture(scope="session")
def checkout():
    """Root of the checkout."""
    return ROOT


class Fork:
    """A function at work in a forked process, which spares the seconds that importing fairseq takes.

    Attributes:
        process: the process, to wait for or to kill.
    """

    def __init__(self, function, *args, **environment):
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=self._work, args=(sender, function, args, environment)
        )
        self.process.start()
        sender.close()

    @staticmethod
    def _work(sender, function, args, environment):
        import torch

        os.environ.update(environment)
        torch.set_num_threads(1)  # the parent's pool of OpenMP threads does not exist in a fork
        try:
            sender.send((True, function(*args)))
        except BaseException:
            sender.send((False, traceback.format_exc()))

    def result(self, timeout: float = 240.0):
        """What the function returned; fails the test with its traceback if it raised."""
        if not self._receiver.poll(timeout):
            self.process.kill()
            pytest.fail(f"no result after {timeout} seconds")
        well, value = self._receiver.recv()
        self.process.join()
        if not well:
            pytest.fail(value)
        return value


@pytest.fixture(scope="session")
def fork():
    """Starts ``function(*args)`` in a forked process: ``fork(function, *args, **environment)`` returns a ``Fork``."""
    return Fork


@pytest.fixture(scope="session")
def free_port():
    """A function that finds a free port of this machine."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def command_line():
    """Starts a command of fairseq as a process of its own: ``command_line("fairseq-train", *argv, **environment)``."""

    def start(name, *argv, **environment):
        module = name.replace("fairseq-", "fairseq_cli.", 1).replace("-", "_")
        script = f"import sys; from {module} import cli_main; sys.argv[0] = {name!r}; cli_main()"
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        )

    return start
