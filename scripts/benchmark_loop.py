"""What a whole update of fairseq-train costs over the bare forward and backward pass of its model.

Trains on made-up tokens, each architecture with each optimiser in turn. Before every update the model passes forward
and backward on the same batch with nothing around it, twice, and the second time counts; the rest of the time until the
next update begins (the update itself, the batch's making, logging, the checks of fairseq's loop) is the whole update.
So both meet the same machine, and weights and batch where the caches have them, and their ratio is what counts.

    python -m scripts.benchmark_loop --updates 200 --rounds 3
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

warnings.filterwarnings("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

logging.disable(logging.WARNING)  # what fairseq announces, and the lines of its log

import fairseq_cli.train  # noqa: E402
from fairseq import options as fairseq_options  # noqa: E402
from fairseq.data import Dictionary, indexed_dataset  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

import fairseq_implicit.models  # noqa: E402, F401  (registers everything)
from fairseq_implicit.commands.checkpoint_arguments import device  # noqa: E402
from fairseq_implicit.commands.wording import conditions, counted  # noqa: E402
from scripts.side_by_side import synchronise  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 5  # updates of each run that are not counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ["ode_bert_euler_tiny", "ode_bert_rk2_tiny", "deq_bert_tiny"]
    parser.add_argument("--arch", nargs="+", default=presets)
    parser.add_argument("--optimizer", nargs="+", default=["adam", "fused_adam"])
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--updates", type=int, default=100, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each architecture with each optimizer, in turn")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: this process alone, for a busy machine and one thread",
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """A data folder of random sequences that fill their blocks, enough for a run without the end of an epoch."""
    dictionary = Dictionary()
    for index in range(options.vocabulary):
        dictionary.add_symbol(f"piece{index}")
    dictionary.save(str(folder / "dict.txt"))
    generator = torch.Generator().manual_seed(options.seed)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    for _ in range((options.updates + WARM_UP + 1) * options.batch):
        builder.add_item(torch.randint(4, options.vocabulary, (options.length - 1,), generator=generator))
    builder.finalize(str(folder / "train.idx"))


def configuration(folder: Path, arch: str, optimizer: str, options: argparse.Namespace):
    """fairseq's configuration of a run, with the flags of a recipe."""
    flags = [
        *f"{folder} --task implicit_masked_lm --criterion implicit_masked_lm --arch {arch}".split(),
        *f"--sample-break-mode eos --tokens-per-sample {options.length} --batch-size {options.batch}".split(),
        *f"--dropout {options.dropout} --attention-dropout {options.dropout} --seed {options.seed}".split(),
        *f"--optimizer {optimizer} --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.01".split(),
        *"--clip-norm 1.0 --lr 1e-4 --lr-scheduler polynomial_decay --warmup-updates 10".split(),
        *f"--max-update {options.updates + WARM_UP} --total-num-update {10 * options.updates}".split(),
        *f"--num-workers {options.workers} --log-interval 100 --log-format simple".split(),
        *"--no-save --disable-validation --distributed-world-size 1".split(),
    ]
    if options.device == "cpu":
        flags.append("--cpu")
    if options.precision != "float32":
        flags += [f"--{options.precision}", "--fp16-no-flatten-grads"]
    parsed = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), flags)
    return convert_namespace_to_omegaconf(parsed)


class Watch:
    """Seconds of the bare passes and of the whole updates of one run.

    Args:
        clock: tells seconds.

    Attributes:
        bare, whole: one number per update.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.bare: list[float] = []
        self.whole: list[float] = []
        self.left: float | None = None

    def ratio(self) -> float:
        """Median over the updates: slow moments of the machine cancel."""
        return statistics.median(
            whole / bare for whole, bare in zip(self.whole[WARM_UP:], self.bare[WARM_UP:], strict=False)
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = Trainer.train_step

        def train_step(trainer, samples, *args, **kwargs):
            synchronise()
            if self.left is not None:
                self.whole.append(self.clock() - self.left)
            self.bare.append(bare_seconds(trainer, samples[0], self.clock))
            self.left = self.clock()
            return original(trainer, samples, *args, **kwargs)

        Trainer.train_step = train_step
        try:
            yield
        finally:
            Trainer.train_step = original


def bare_seconds(trainer: Trainer, sample: dict, clock: Callable[[], float]) -> float:
    """Time of the model's passes on a batch that lies where it is needed, and that it has just passed once."""
    sample, _ = trainer._prepare_sample(sample)
    target = sample["target"]
    masked = target.ne(trainer.task.dictionary.pad())
    target, model = target[masked], trainer.model
    model.train()
    model.set_num_updates(trainer.get_num_updates())
    seconds = 0.0
    for _ in range(2):
        # The first pass finds what the last update wrote and the loop around it displaced; the update would not.
        for parameter in model.parameters():
            parameter.grad = None
        synchronise()
        start = clock()
        logits = model(**sample["net_input"], masked_tokens=masked)[0]
        functional.cross_entropy(logits.float(), target, reduction="sum").backward()
        synchronise()
        seconds = clock() - start
    return seconds


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    runs: dict[tuple[str, str], list[Watch]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), options)
        for _ in range(options.rounds):
            for arch in options.arch:
                for optimizer in options.optimizer:
                    watch = Watch(CLOCKS[options.clock])
                    with watch.watching():
                        fairseq_cli.train.main(configuration(Path(name), arch, optimizer, options))
                    runs.setdefault((arch, optimizer), []).append(watch)
    sys.stdout.write(
        f"batch {options.batch} x {options.length}, vocabulary {options.vocabulary}, dropout {options.dropout}, "
        f"{options.precision}, {options.clock} clock, {counted(options.workers, 'worker')}, seed {options.seed}, "
        f"{counted(options.rounds, 'round')} of {counted(options.updates, 'update')}\n"
        f"{conditions(options.device, options.threads)}\n\n"
        f"{'model':<26}{'optimizer':<14}forward + backward, ms   update, ms   ratio: median (of the rounds)\n"
    )
    for (arch, optimizer), found in runs.items():
        bare = statistics.median(seconds for watch in found for seconds in watch.bare[WARM_UP:])
        whole = statistics.median(seconds for watch in found for seconds in watch.whole[WARM_UP:])
        ratios = [watch.ratio() for watch in found]
        sys.stdout.write(
            f"{arch:<26}{optimizer:<14}{1e3 * bare:>22.2f} {1e3 * whole:>12.2f}   {statistics.median(ratios):.3f} "
            f"({', '.join(format(ratio, '.3f') for ratio in ratios)})\n"
        )


if __name__ == "__main__":
    main()
