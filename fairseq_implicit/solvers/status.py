"""What a solve returns: the state, what it cost, and one sentence on how it ended."""

import enum
from dataclasses import dataclass
from typing import Optional, Union

from torch import Tensor


class Status(enum.Enum):
    """How a solve ended. The value is the sentence that users read."""

    COMPLETED = "every prescribed step was taken"
    CONVERGED = "the residual of every sample fell below the tolerance"
    BUDGET_SPENT = "the evaluation budget was spent before every sample met the tolerance"
    STAGNATED = "the residual stopped falling before every sample met the tolerance"
    NON_FINITE = "the field returned non-finite values; the last finite state is returned"


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
    evaluations: Union[int, Tensor]
    residual: Optional[Tensor] = None
    status: Status = Status.COMPLETED
