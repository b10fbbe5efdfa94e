"""The command line: ``fairseq-implicit NAME …``, which is ``python -m fairseq_implicit NAME …``.

A command is a module of this folder with ``add_arguments(parser)`` and ``run(arguments)``, which returns an exit status
or None for 0; its docstring is its help. It is imported when it runs, so that those which need no fairseq work without
and the others do not slow them down. Wrong arguments are an ``argparse.ArgumentError``, everything else that may go
wrong an OSError, ValueError or ArithmeticError of one sentence, or a CorpusError with a status of its own.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.open_mp import spin_briefly

COMMANDS = {
    "prepare-corpus": "clean The Pile, OSCAR or plain text into numbered shards",
    "text-corpus": "clean a text of your own, or documentation strings, into train, valid and test",
    "train-tokenizer": "train a sentencepiece model and write its dictionary",
    "binarise": "text shards to data folders of fairseq",
    "entropy": "the entropies of a data folder, which a model must beat",
    "score": "how well a checkpoint fills the masks of a data folder",
    "fill-masks": "fill the masks of sentences",
    "checkpoint-flags": "the fairseq-train flags that rebuild a checkpoint's model",
    "average-checkpoints": "the mean of the weights of several checkpoints",
    "convert": "RoBERTa, BERT, ELECTRA and ode_bert into each other; ode_bert to deq_bert and back",
    "export": "a checkpoint as a folder that transformers opens",
    "import": "such a folder as a checkpoint",
    "depth-sweep": "one checkpoint under other schemes, steps and tolerances",
    "budget-sweep": "one deq_bert under other solvers and budgets",
    "plot-losses": "the loss curves of a training as a picture",
    "plot-trajectory": "what a model does along its depth",
    "precision": "the precision flag for fairseq-train that pays on this machine",
    "user-dir": "the folder for fairseq's --user-dir (without a NAME, too)",
}
#: Loggers that tell on stderr how a command gets on; all others say only what is wrong.
TALKING = ("fairseq_implicit.corpora", __name__)


def usage() -> str:
    """The list of all commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    return "usage: fairseq-implicit NAME ...\n\n" + "\n".join(lines) + "\n\nNAME --help explains a command.\n"


def load(name: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """The module of a command, imported now, and the parser of its arguments."""
    command = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        f"fairseq-implicit {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return command, parser


def main(argv: Sequence[str]) -> int:
    """Runs one command and turns what goes wrong into one sentence on stderr.

    Args:
        argv: its name and its arguments.

    Returns:
        the exit status.

    Raises:
        SystemExit: of argparse, for ``--help`` and wrong arguments (2).
    """
    name, *arguments = argv or ["user-dir"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"fairseq-implicit: there is no command {name!r}; fairseq-implicit --help lists them\n")
        return 2
    status = 1
    try:
        command, parser = load(name)
        parsed = parser.parse_intermixed_args(arguments)  # options may stand between a folder and its sentences
        try:
            return command.run(parsed) or 0
        except argparse.ArgumentError as error:
            parser.error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fairseq_implicit"):
            raise
        sentence = f"it needs the package {package}, which is not installed"
    except KeyboardInterrupt:
        sentence, status = "interrupted; run the same command again", 130
    except CorpusError as error:
        sentence, status = str(error), error.status
    except OSError as error:
        sentence = str(error)
        if error.strerror is not None:  # of the system, which says where or not
            place = f"{error.filename}: " if error.filename else ""
            sentence = f"{place}{error.strerror}; mend it and run the same command again"
    except (ArithmeticError, ValueError) as error:
        sentence = str(error)
    sys.stderr.write(f"fairseq-implicit {name}: {sentence}\n")
    return status


def command_line() -> None:
    """Entry point of ``fairseq-implicit``."""
    spin_briefly()
    # fairseq announces optional packages when it is imported.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    for name in TALKING:
        logging.getLogger(name).setLevel(logging.INFO)
    sys.exit(main(sys.argv[1:]))
