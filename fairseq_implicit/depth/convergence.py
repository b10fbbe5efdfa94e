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
