"""What a depth does about a solve that went wrong: non-finite values are an error, a large residual a warning."""

from fairseq_implicit.solvers.status import Status

ALARM_RESIDUAL = 0.05  # mean relative residual above which training is warned
ALARM_INTERVAL = 100  # updates between two warnings


def refuse_non_finite(status: Status, what: str) -> None:
    """Stop a network whose field returns non-finite values: the finite state that a solver keeps is no answer.

    Args:
        status: how the solve ended.
        what: what was solved, such as ``the equilibrium``.

    Raises:
        ArithmeticError: the status is ``NON_FINITE``.
    """
    if status is Status.NON_FINITE:
        raise ArithmeticError(f"the solve of {what} failed ({status.value}): the model has diverged")


class ResidualAlarm:
    """When to warn of solves that end far from their tolerance: at most once in ``ALARM_INTERVAL`` updates."""

    def __init__(self):
        self._last = -ALARM_INTERVAL

    def due(self, update: int, residual: float) -> bool:
        """Whether to warn now of ``residual``, the batch's mean relative residual, at this number of updates."""
        if residual <= ALARM_RESIDUAL or update - self._last < ALARM_INTERVAL:
            return False
        self._last = update
        return True
