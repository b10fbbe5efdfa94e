"""One meaning per status, one order of severity."""

import torch

from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.solver import Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.theta import Theta
from tests.solvers.solving import solve_adaptive


def test_the_worst_of_several_endings():
    order = [
        Status.COMPLETED, Status.CONVERGED, Status.STAGNATED, Status.BUDGET_SPENT, Status.STEP_UNDERFLOW,
        Status.NON_FINITE,
    ]  # fmt: skip
    assert list(Status) == order, "a new ending needs its place in the order"
    for place, one in enumerate(order):
        for other in order[: place + 1]:
            assert Status.worst([one, other]) is Status.worst([other, one]) is one
    assert Status.worst([]) is Status.COMPLETED and Status.worst([Status.COMPLETED]) is Status.COMPLETED


def test_steps_that_shrink_to_nothing_have_a_status_of_their_own():
    """A field that is another one at each call has no step that meets the tolerance; there is no residual in it."""
    noise = torch.Generator().manual_seed(0)
    y = torch.zeros(1, 1, 1, dtype=torch.float64)
    result = solve_adaptive(
        lambda t, z: 1e8 * torch.randn(1, 1, 1, dtype=torch.float64, generator=noise), y, 1.0,
        Adaptive("bosh3", 1e-9, 1e-9),
    )  # fmt: skip
    assert result.status is Status.STEP_UNDERFLOW
    assert "steps shrank" in result.status.value and "residual" not in result.status.value


def test_an_empty_batch_and_an_explicit_theta_solve_complete():
    y = torch.zeros(0, 2, 3)
    assert solve_adaptive(lambda t, z: -z, y, 1.0, Adaptive("bosh3")).status is Status.COMPLETED
    assert Theta(theta=0.0).solve(lambda t, z: -z, torch.ones(1, 2, 3), Span()).status is Status.COMPLETED
