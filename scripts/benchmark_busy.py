"""How a small training fares beside other programs, by how long its waiting threads spin.

OpenMP's threads run in circles while they wait for work. On a quiet machine that saves the time of waking them; where
other programs want the cores it takes them from whoever has work to do, the own threads included.

The training is that of a tiny ode_bert (RK2, two blocks of width 128, 16 blocks of 64 tokens, all threads), once with
each setting of the environment, and beside other processes of the same kind that wait as torch does by itself. The
settings take turns, and are stopped while it is not theirs; the medians are what counts.

    python -m scripts.benchmark_busy
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

#: What the environment says of waiting, by the name of the row; the first row is the reference.
SETTINGS: dict[str, dict[str, str]] = {
    "as torch comes": {},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (10_000, 1_000)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
BATCH, LENGTH, VOCABULARY, DIM = 16, 64, 2048, 128


def train() -> None:
    """For each number of seconds on standard input: trains that long and prints the tokens per second."""
    import torch
    from torch.nn import functional

    from fairseq_implicit.depth.stack import BlockStack, StackConfig
    from fairseq_implicit.fields.mixers.attention import AttentionConfig
    from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
    from fairseq_implicit.networks.embeddings import EmbeddingConfig
    from fairseq_implicit.networks.encoder import Encoder, EncoderConfig
    from fairseq_implicit.solvers.runge_kutta import RungeKutta

    torch.manual_seed(1)
    field = TransformerFieldConfig(DIM, 4 * DIM, AttentionConfig(2))
    depth = BlockStack(StackConfig(2, DIM, RungeKutta("rk2")), lambda block: TransformerField(field))
    embeddings = EmbeddingConfig(symbols=VOCABULARY, dim=DIM, positions=LENGTH, padding=1)
    model = Encoder(EncoderConfig(embeddings), depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH))
    masked = torch.rand(BATCH, LENGTH) < 0.3

    def update() -> None:
        logits = model(tokens, masked_tokens=masked, has_padding=False).values
        functional.cross_entropy(logits, tokens[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    for line in sys.stdin:
        start, updates = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < float(line):
            update()
            updates += 1
        print(updates * BATCH * LENGTH / spent, flush=True)


class Training:
    """A process that trains when it is asked to."""

    def __init__(self, setting: dict[str, str], seconds: float | None = None):
        """At once and for so long, where ``seconds`` are given."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
        command = [sys.executable, "-m", "scripts.benchmark_busy", "--train"]
        self.process = subprocess.Popen(
            command, env={**plain, **setting}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask(0.5 if seconds is None else seconds)
        if seconds is None:
            self.answer()

    def ask(self, seconds: float) -> None:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        return float(self.process.stdout.readline())

    def speed(self, seconds: float) -> float:
        """Tokens per second of the next ``seconds``."""
        self.ask(seconds)
        return self.answer()


@contextlib.contextmanager
def stopped(processes: list[Training]) -> Iterator[None]:
    """Within it the processes rest."""
    for each in processes:
        each.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for each in processes:
            each.process.send_signal(signal.SIGCONT)


def measure(settings: dict[str, dict[str, str]], others: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """``[quiet, busy]`` tokens per second of each setting, medians over the rounds."""
    trainings = {name: Training(setting) for name, setting in settings.items()}
    beside = [Training({}, seconds=1e6) for _ in range(others)]
    try:
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in settings}
        for _ in range(rounds):
            with stopped(beside):
                for name, training in trainings.items():
                    found[name][0].append(training.speed(seconds))
            for name, training in trainings.items():
                found[name][1].append(training.speed(seconds))
        return {name: [statistics.median(speeds) for speeds in pair] for name, pair in found.items()}
    finally:
        for each in (*trainings.values(), *beside):
            each.process.kill()
            each.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=4, help="torch processes beside it")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train()
        return
    found = measure(SETTINGS, options.others, options.rounds, options.seconds)
    reference = next(iter(found.values()))[0]
    sys.stdout.write(
        f"{os.cpu_count()} cores, {options.others} other processes, {options.rounds} rounds of {options.seconds} s; "
        f"tokens/s over those of a quiet machine as torch comes\n\n{'setting':<26}{'quiet':>8}{'busy':>8}\n"
    )
    for name, (quiet, busy) in found.items():
        sys.stdout.write(f"{name:<26}{quiet / reference:>8.2f}{busy / reference:>8.2f}\n")


if __name__ == "__main__":
    main()
