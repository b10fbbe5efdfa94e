"""Step counts drawn anew at each update, so that a trained model is at home at any of them."""

import math
import random
from collections.abc import Sequence

from torch import nn

from fairseq_implicit.options import OptionError

DEEPEST = 10_000  # mean steps of a random depth: beyond it stands a slip of the pen


class RandomSteps(nn.Module):
    """A whole number of steps, uniform in [low, high], that depends on the seed and the update alone.

    All ranks, all micro-batches of one update and a resumed run draw the same number. fairseq tells the update
    through ``set_num_updates``. Evaluation takes the fixed number that the model is configured with.

    Args:
        bounds: low and high.
        seed: of the run.

    Raises:
        OptionError: not two whole numbers with ``1 <= low <= high``.
    """

    def __init__(self, bounds: Sequence[int], seed: int):
        super().__init__()
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
            raise OptionError(
                "random_steps",
                f"{','.join(map(str, bounds))} is no range: give the smallest and the largest number, such as 1,4.",
            )
        self.low, self.high = (int(bound) for bound in bounds)
        self.seed = seed
        self.update = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update."""
        self.update = num_updates

    def draw(self) -> int:
        # A string seed is hashed whole: neighbouring updates draw independently of each other.
        return random.Random(f"steps {self.seed} {self.update}").randint(self.low, self.high)


class RandomDepth(nn.Module):
    """Numbers of steps, one per sequence of a batch, for a loop that is to be at home at any of them.

    Poisson numbers of that ``mean``, given that they lie in [1, ``maximum``]. They depend on seed, update and place in
    the batch alone: all ranks and micro-batches of one update draw the same ones, so that no rank waits for another's
    deeper loop, and so do a recomputed pass and a resumed run. fairseq tells the update through ``set_num_updates``.

    Args:
        mean: of the Poisson distribution, before it is cut.
        maximum: largest number; ``None``: twice the mean, and 2 at least.
        seed: of the run.

    Raises:
        OptionError: no positive mean, one beyond all use, or a maximum that is, or below 1, or so far below the mean
            that hardly anything remains.
    """

    def __init__(self, mean: float, maximum: int | None, seed: int):
        super().__init__()
        if not 0 < mean < math.inf:
            raise OptionError("random_depth", f"a mean of {mean} steps: give a positive number.")
        if mean > DEEPEST:
            raise OptionError("random_depth", f"no loop takes {mean:,.0f} steps: give {DEEPEST:,} at most.")
        maximum = max(2, math.ceil(2 * mean)) if maximum is None else maximum
        if maximum < max(1, math.ceil(mean / 2)):
            raise OptionError(
                "random_depth_max",
                f"{maximum} steps leave nothing of numbers whose mean is {mean:g}: give the mean or more.",
            )
        if maximum > 2 * DEEPEST:
            raise OptionError("random_depth_max", f"no loop takes {maximum:,} steps: give {2 * DEEPEST:,} at most.")
        self.maximum = maximum
        logarithms = [count * math.log(mean) - math.lgamma(count + 1) for count in range(1, maximum + 1)]
        self.weights = [math.exp(each - max(logarithms)) for each in logarithms]
        self.seed = seed
        self.update = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update."""
        self.update = num_updates

    def draw(self, sequences: int) -> list[int]:
        counts = range(1, self.maximum + 1)
        return random.Random(f"depth {self.seed} {self.update}").choices(counts, self.weights, k=sequences)
