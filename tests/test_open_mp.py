"""How long waiting threads spin: one number for commands and recipes, unless the user has chosen."""

import os
import subprocess
import sys

import pytest

from fairseq_implicit.open_mp import SPIN_COUNT, spin_briefly
from tests.conftest import ROOT
from tests.scripts.recipes import Checkout

CHOICES = [{}, {"GOMP_SPINCOUNT": ""}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}]


def expected(chosen):
    return chosen if any(chosen.values()) else {"GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize("chosen", CHOICES)
def test_it_is_set_where_nobody_has_chosen(chosen, tmp_path):
    environment = dict(chosen)
    spin_briefly(environment)
    assert environment == expected(chosen)
    # and the recipes do the same
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    script = f'source "{Checkout(tmp_path).root}/scripts/environment.sh" && env'
    done = subprocess.run(["bash", "-c", script], env={**environment, **chosen}, capture_output=True, text=True)
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    found = {name: lines[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in lines}
    assert found == expected(chosen), done.stderr


def test_commands_set_it_before_torch_is_there():
    script = """
import sys
from fairseq_implicit import commands, open_mp
commands.main = lambda argv: print("torch" in sys.modules, __import__("os").environ["GOMP_SPINCOUNT"])
commands.command_line()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", SPIN_COUNT], done.stderr
