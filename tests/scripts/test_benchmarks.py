"""What the benchmarks share, and the rows of the corpus benchmark; their measurements are not tested."""

import importlib
import math
import subprocess
import sys

import pytest
import torch

from fairseq_implicit.commands.wording import conditions, counted
from scripts import benchmark_corpus, benchmark_throughput
from tests.conftest import ROOT


def test_a_text_too_small_to_measure_has_no_net_speed():
    """One whose net time is nothing, or less, says so instead of dividing by it."""
    long = benchmark_corpus.row("fast", 2, 10.0, 6.0, 1.0, (21.0, 1.0))
    assert long.split() == ["fast", "2", "6.0", "1.67", "3.5x", "2.00", "4.0x"]
    for whole in (0.9, 1.0, 1.2):
        short = benchmark_corpus.row("fast", 2, 0.1, whole, 1.0, (21.0, 1.0))
        assert short.split()[-2:] == ["–", "–"] and len(short) == len(long)
    assert benchmark_corpus.row("fast", 1, 1.0, 9.0, 1.0, (1.0, 1.0)).split()[-2:] == ["0.12", "–"]
    assert math.isnan(benchmark_corpus.net_seconds(1.0, 1.0)) and benchmark_corpus.net_seconds(3.0, 1.0) == 2.0


def test_one_thread_is_no_plural():
    assert counted(1, "step") == "1 step" and counted(0, "step") == "0 steps"
    assert ", 1 thread, " in conditions("cpu", 1) and ", 2 threads, " in conditions("cpu", 2)


def test_measuring_memory_prints_nothing():
    """torch's profiler writes to the process's stderr, and asks how much it may say only once."""
    script = (
        "import torch; from scripts.side_by_side import peak_bytes; print(peak_bytes(lambda: torch.zeros(100, 100)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) >= 40_000
    assert [line for line in done.stderr.splitlines() if "Profiler" in line] == []


@pytest.mark.parametrize("script", ["benchmark_ode", "benchmark_deq"])
def test_a_device_that_is_not_there_ends_a_benchmark_in_one_sentence(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--device", "cuda:99"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{script}").main()
    assert "argument --device: 'cuda:99' cannot be used:" in capsys.readouterr().err.splitlines()[-1]


def test_the_throughput_benchmark_runs_to_its_end(monkeypatch, capsys):
    """Its tables are printed by the commands of a README; a small model shows that every row comes."""
    flags = "--size tiny --layers 1 --batch 1 --length 8 --vocabulary 30 --rounds 1 --device cpu".split()
    monkeypatch.setattr("sys.argv", ["benchmark_throughput", *flags, "--threads", str(torch.get_num_threads())])
    benchmark_throughput.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "(pre-norm" in line]
    assert len(rows) == 6 and all(float(row[-2]) > 0 < float(row[-1]) for row in rows)
