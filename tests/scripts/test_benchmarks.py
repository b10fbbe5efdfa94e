"""What the benchmarks share, and the rows of the corpus benchmark; their measurements are not tested."""

import importlib
import math
import subprocess
import sys

import pytest
import torch

from fairseq_implicit.commands.wording import conditions, counted
from scripts import benchmark_corpus, benchmark_loop, benchmark_throughput
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


@pytest.mark.parametrize(
    "script", ["benchmark_ode", "benchmark_deq", "benchmark_loop", "benchmark_mixers", "benchmark_throughput"]
)
def test_a_device_that_is_not_there_ends_a_benchmark_in_one_sentence(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--device", "cuda:99"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{script}").main()
    assert "argument --device: 'cuda:99' cannot be used:" in capsys.readouterr().err.splitlines()[-1]


def throughput(monkeypatch, capsys, *more):
    flags = "--size tiny --layers 1 --batch 1 --length 8 --vocabulary 30 --rounds 1 --device cpu".split()
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["benchmark_throughput", *flags, *threads, *more])
    benchmark_throughput.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("dtype", benchmark_throughput.DTYPES)
def test_the_throughput_benchmark_runs_to_its_end(monkeypatch, capsys, dtype):
    """Its tables are printed by the commands of a README; a small model shows that every row comes."""
    lines = throughput(monkeypatch, capsys, "--dtype", dtype)
    rows = [line.split() for line in lines if "(pre-norm" in line]
    assert len(rows) == 6 and all(float(row[-2]) > 0 < float(row[-1]) for row in rows)
    (peak,) = (line for line in lines if "of the peak of one matrix product" in line)
    assert float(peak.split(": ")[1].split("%")[0]) >= 0


def test_profiles_name_operations_and_their_shares(monkeypatch, capsys):
    lines = throughput(monkeypatch, capsys, "--profile")
    assert sum("share of self time" in line for line in lines) == 3
    shares = [float(line.split()[-2].rstrip("%")) for line in lines if line.lstrip().startswith("aten::")]
    assert shares and 0 < sum(shares) <= 300.5 and not any("peak memory" in line for line in lines)


def test_operations_are_those_of_the_weights_and_of_attention(monkeypatch):
    """Six per weight of a matrix and token, counted on the model itself; attention's products beside them."""
    monkeypatch.setattr("sys.argv", "x --size tiny --layers 2 --batch 3 --length 8 --vocabulary 30".split())
    bench = benchmark_throughput.Bench(benchmark_throughput.arguments())
    whole = bench.ode_bert(ode_scheme="euler").model
    model = whole.encoder
    of = lambda module: sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)  # noqa: E731
    head = of(model.lm_head) * len(bench.target)
    attention = 2 * (2 * 3 * 8 * 8 * model.embed_tokens.embedding_dim)
    assert bench.operations(whole) == 6 * (of(model.depth) * 24 + attention + head)


def test_the_loop_benchmark_runs_to_its_end(monkeypatch, capsys):
    """Through fairseq's loop, with a bare pass before each update that changes nothing."""
    flags = "--arch ode_bert_euler_tiny --batch 2 --length 8 --vocabulary 30 --updates 2 --rounds 1 --workers 0"
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["benchmark_loop", *flags.split(), *threads, "--device", "cpu", "--clock", "cpu"])
    benchmark_loop.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ode_bert")]
    assert [row[1] for row in rows] == ["adam", "fused_adam"] and all(float(row[4]) > 0 for row in rows)
