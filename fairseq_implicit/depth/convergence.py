"""What a depth does about a solve that went wrong, and in which words it reports what a solve cost.

Statistics of every depth, where its solver has them:

- ``evaluations`` of the field in the forward pass and ``evaluations_backward`` (products with a Jacobian included) of
  the last backward pass that is known, per sample: means over the batch, and ``…_p95``, ``…_max``;
- ``residual`` of an equation, ``converged_share`` of the samples (and blocks) that met its tolerance,
  ``adjoint_residual`` and ``adjoint_fallbacks`` (samples) of the backward pass;
- ``steps`` accepted, ``rejected`` ones, and ``stopped``, the share of solves that spent their budget;
- ``state_rms`` over real tokens;
- ``rate_mean``, ``rate_min``, ``rate_max`` of a linear part.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fairseq_implicit.solvers.status import Status

logger = logging.getLogger(__name__)

ALARM_RESIDUAL = 0.05  # mean relative residual above which training is warned
ALARM_INTERVAL = 100  # updates between two warnings

_FAILURES = {
    Status.NON_FINITE: "the model has diverged; lower the learning rate, or continue from an earlier checkpoint",
    Status.STEP_UNDERFLOW: "the field is not smooth at this tolerance, or the model has diverged; raise the tolerance",
}


def refuse_failure(status: Status, what: str, remedy: str = "") -> None:
    """Stop a network whose solve has no answer: the finite state that a solver keeps is none.

    Args:
        status: how the solve ended.
        what: what was solved, such as ``the equilibrium``.
        remedy: what else helps with this solver.

    Raises:
        ArithmeticError: the field returned non-finite values, or the steps shrank to nothing.
    """
    if status in _FAILURES:
        raise ArithmeticError(f"the solve of {what} failed ({status.value}): {_FAILURES[status]}{remedy}")


class ResidualAlarm:
    """When to warn of residuals that are too large: at most once in ``ALARM_INTERVAL`` updates.

    Args:
        bound: largest residual that is not worth a word.
    """

    def __init__(self, bound: float = ALARM_RESIDUAL):
        self.bound = bound
        self._last = -ALARM_INTERVAL

    def due(self, update: int, residual: float) -> bool:
        """Whether to warn now of ``residual`` at this number of updates."""
        if residual <= self.bound or update - self._last < ALARM_INTERVAL:
            return False
        self._last = update
        return True


class BudgetAlarm:
    """Says once that a solve through time has spent its budget."""

    def __init__(self):
        self._said = False

    def hear(self, status: Status, budget: int) -> None:
        """A solve with that budget of evaluations has ended like this."""
        if status is Status.BUDGET_SPENT and not self._said:
            self._said = True
            logger.warning(
                "a solve spent its %d evaluations before its end and goes on with the state it reached: raise "
                "max_evaluations or the tolerance, or train with a penalty of the kinetic energy (reported once; the "
                "statistic 'stopped' counts them)",
                budget,
            )


def mean(values: Sequence[float | Tensor]) -> float | Tensor:
    """Of numbers and 0-dim tensors."""
    if len(values) == 1:
        return values[0]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).mean() if tensors else sum(values) / len(values)


def per_sample_mean(counts: int | Tensor) -> float | Tensor:
    """Of a count that is one for all samples, or ``(batch,)``."""
    return counts.float().mean() if isinstance(counts, Tensor) else counts


def rate_statistics(rates: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Of the linear parts of all fields of a depth; nothing where they have none."""
    found = [rate.detach() for rate in rates if rate is not None]
    if not found:
        return {}
    every = torch.cat(found)
    return {"rate_mean": every.mean(), "rate_min": every.min(), "rate_max": every.max()}
