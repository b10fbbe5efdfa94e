"""What a solve returns: the state, what it cost, and one sentence on how it ended."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


class Status(enum.Enum):
    """How a solve ended, from best to worst. The value is the sentence that users read."""

    COMPLETED = "every prescribed step was taken"
    CONVERGED = "every sample met the tolerance"
    STAGNATED = "the residual stopped falling before every sample met the tolerance"
    BUDGET_SPENT = "the evaluation budget was spent before every sample met the tolerance"
    STEP_UNDERFLOW = "the steps shrank to nothing before they met the tolerance"
    NON_FINITE = "the field or the state left the range of finite numbers"

    @classmethod
    def worst(cls, statuses: Iterable["Status"]) -> "Status":
        """The ending of several solves: that of the worst one; ``COMPLETED`` where there is none."""
        return max(statuses, key=list(cls).index, default=cls.COMPLETED)


@dataclass(frozen=True)
class SolveResult:
    """The end of one solve.

    Attributes:
        state: final state, ``(batch, time, dim)``.
        evaluations: evaluations of the field; an ``int`` when the same for every sample (fixed-step schemes, so
            that nothing has to be read back from the device), else a ``(batch,)`` integer tensor.
        residual: ``(batch,)`` residual or error estimate in the solver's own norm, ``None`` where the scheme has none.
        status: how the solve ended.
    """

    state: Tensor
    evaluations: int | Tensor
    residual: Tensor | None = None
    status: Status = Status.COMPLETED
