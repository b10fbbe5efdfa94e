"""The command line itself: its list, its help, what needs no fairseq, and when the package registers with fairseq."""

import ast
import subprocess
import sys

import pytest

from fairseq_implicit import commands
from fairseq_implicit.commands import COMMANDS, load
from tests.conftest import ROOT

FOLDER = ROOT / "fairseq_implicit" / "commands"
#: What every other command needs fairseq for: checkpoints.
WITHOUT_FAIRSEQ = ["prepare-corpus", "text-corpus", "train-tokenizer", "binarise", "entropy", "user-dir"]


def python(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def test_every_module_with_a_run_is_a_command():
    found = set()
    for path in FOLDER.glob("*.py"):
        names = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        if {"add_arguments", "run"} <= names:
            found.add(path.stem.replace("_", "-"))
    assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_a_command_is_for(name, command):
    status, output, _ = command(name, "--help")
    assert status == 0 and output.startswith(f"usage: fairseq-implicit {name} ")
    assert load(name)[0].__doc__.splitlines()[0] in output


def test_the_list_and_a_name_that_is_not_in_it(command):
    status, output, _ = command("--help")
    assert status == 0 and all(f"  {name} " in output for name in COMMANDS)
    status, _, said = command("fill-mask")
    assert status == 2 and "there is no command 'fill-mask'; fairseq-implicit --help lists them" in said


def test_the_list_loads_nothing_and_the_bare_call_prints_the_folder():
    code = "import sys, runpy; sys.argv[1:] = ['--help']; runpy.run_module('fairseq_implicit', run_name='__main__')"
    stop = f"try:\n    {code}\nfinally:\n    print({{'torch', 'numpy', 'fairseq'}} & set(sys.modules))"
    command = [sys.executable, "-c", stop]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.endswith("set()\n")
    bare = [sys.executable, "-m", "fairseq_implicit"]
    assert subprocess.run(bare, capture_output=True, text=True, cwd=ROOT).stdout == f"{FOLDER.parent}\n"


def test_commands_that_need_no_fairseq_nor_torch():
    code = """
import sys
sys.modules["fairseq"] = sys.modules["fairseq_cli"] = None
import fairseq_implicit.corpora
from fairseq_implicit.commands import load, main
for name in sys.argv[1:]:
    load(name)
assert main(["fill-masks", "folder", "a <mask>"]) == 1
print({"torch", "fairseq.models"} & set(sys.modules))
"""
    done = python(code, *WITHOUT_FAIRSEQ)
    assert done.stdout == "set()\n"
    assert done.stderr == "fairseq-implicit fill-masks: it needs the package fairseq, which is not installed\n"


def test_what_can_be_imported_where_there_is_no_fairseq():
    code = """
import importlib, pathlib, sys
sys.modules["fairseq"] = sys.modules["fairseq_cli"] = None
for folder in sys.argv[1:]:
    place = pathlib.Path("fairseq_implicit", folder)
    for path in sorted(place.rglob("*.py")) or [place]:
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""
    python(code, "layout.py", "solvers", "fields", "depth", "corpora")


ORDERS = """
import argparse, importlib, os, sys
import fairseq, fairseq.utils
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY

def registered():
    registries = TASK_REGISTRY, CRITERION_REGISTRY
    found = "deq_bert_tiny" in ARCH_MODEL_REGISTRY, *("implicit_masked_lm" in registry for registry in registries)
    return all(found) and hasattr(checkpoint_utils.save_checkpoint, "__wrapper__")

def user_dir():
    fairseq.utils.import_user_module(argparse.Namespace(user_dir=os.path.abspath("fairseq_implicit")))

def after(name):  # the package has been imported where there was no fairseq
    hidden = sys.modules.pop("fairseq")
    import fairseq_implicit
    sys.modules["fairseq"] = hidden
    assert not registered()
    importlib.import_module(name)

orders = [user_dir, lambda: importlib.import_module("fairseq_implicit")]
modules = ("models", "tasks", "criterions")
orders += [lambda name=name: after("fairseq_implicit." + name) for name in modules]
orders += [lambda: after("hubconf")]
for order in orders:  # each in a process that has loaded fairseq and nothing else
    child = os.fork()
    if not child:
        order()
        os._exit(not registered())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_everything_is_registered_in_any_order():
    assert python(ORDERS).stdout.split() == ["0"] * 6


@pytest.mark.parametrize(
    "error, status, sentence",
    [
        (KeyboardInterrupt(), 130, "fairseq-implicit entropy: interrupted; run the same command again"),
        (ModuleNotFoundError("no", name="google.protobuf"), 1, "it needs the package google, which is not installed"),
    ],
    ids=["Ctrl-C", "package"],
)
@pytest.mark.parametrize("moment", ["loading", "running"])
def test_what_may_end_a_command_at_any_moment(command, monkeypatch, moment, error, status, sentence):
    def ends(*arguments):
        raise error

    module, parser = load("entropy")
    monkeypatch.setattr(module, "run", ends)
    monkeypatch.setattr(commands, "load", ends if moment == "loading" else lambda name: (module, parser))
    found, _, said = command("entropy", "data-bin")
    assert found == status and sentence in said


def test_options_may_stand_between_a_folder_and_its_sentences():
    parsed = load("fill-masks")[1].parse_intermixed_args(["folder", "--candidates", "2", "A <mask>.", "B <mask>."])
    assert parsed.candidates == 2 and parsed.sentences == ["A <mask>.", "B <mask>."]


@pytest.mark.parametrize("flags", [["--device", "nonsense"], ["--batch-size", "0"]])
def test_values_that_no_command_can_use(command, flags):
    status, _, said = command("depth-sweep", "checkpoint.pt", "data-bin", *flags)
    assert status == 2 and f"argument {flags[0]}: '{flags[1]}'" in said
