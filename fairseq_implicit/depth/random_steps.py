"""Step counts drawn anew at each update, so that a trained model is at home at any of them."""

import random
from collections.abc import Sequence

from torch import nn

from fairseq_implicit.options import OptionError


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
