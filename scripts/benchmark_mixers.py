"""One layer of every mixer, forward and backward, in the time that attention takes, by the length of the sequences.

What is compared takes turns, one call each per round; the ratio of the medians is printed, and that of the operations
of the matrix products.

    python -m scripts.benchmark_mixers --dim 256 --heads 8 --lengths 128 512 2048
"""

import argparse
import warnings
from functools import partial

warnings.filterwarnings("ignore")
import torch  # noqa: E402

from fairseq_implicit.commands.checkpoint_arguments import device  # noqa: E402
from fairseq_implicit.commands.wording import conditions  # noqa: E402
from fairseq_implicit.fields.mixers import MIXERS  # noqa: E402
from fairseq_implicit.fields.mixers.mixer import Mixer  # noqa: E402
from scripts.side_by_side import median_seconds  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, at least one sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def update(mixer: Mixer, x: torch.Tensor) -> None:
    mixer.prepare(x)(x).sum().backward()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(f"{conditions(options.device, options.threads)}, seed {options.seed}")
    print(f"width {options.dim}, {options.heads} heads: ", end="")
    print("time (operations) over attention's, forward and backward\n")
    print(f"{'length':>7}" + "".join(f"{name:>22}" for name in MIXERS))
    for length in options.lengths:
        torch.manual_seed(options.seed)
        x = torch.randn(max(1, options.tokens // length), length, options.dim, device=options.device)
        mixers = {
            name: config(heads=options.heads).build(options.dim, "shared").to(options.device)
            for name, config in MIXERS.items()
        }
        seconds = median_seconds({name: partial(update, mixer, x) for name, mixer in mixers.items()}, options.rounds)
        costs = {name: mixer.operations(length) for name, mixer in mixers.items()}
        cells = [
            f"{seconds[name] / seconds['attention']:.2f} ({costs[name] / costs['attention']:.2f})" for name in mixers
        ]
        print(f"{length:>7}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
