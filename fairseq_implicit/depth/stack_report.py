"""What one pass through a stack of blocks reports: statistics, penalties, and warnings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fairseq_implicit.depth.convergence import ALARM_RESIDUAL, mean, per_sample_mean
from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.coefficients import Weight
from fairseq_implicit.solvers.solver import Solution
from fairseq_implicit.solvers.status import Status

if TYPE_CHECKING:
    from fairseq_implicit.depth.stack import BlockStack

logger = logging.getLogger(__name__)

Scalar = float | Tensor


class Report(Protocol):
    """Statistics and penalties of one pass."""

    def add(self, block: int, result: Solution | None, state: Tensor) -> None: ...
    def statistics(self) -> dict[str, Scalar]: ...
    def penalties(self) -> dict[str, Tensor]: ...


class SchemeReport:
    """Statistics and penalties of one pass through schemes with stages, as 0-dim tensors that nobody has read back."""

    def __init__(self, stack: BlockStack, layout: Layout):
        self.stack, self.config, self.layout = stack, stack.config, layout
        self.evaluations: Scalar = 0
        self.blocks: list[dict[str, Scalar]] = []
        self.consistency: list[Scalar] = []
        self.second_order: list[Scalar] = []

    def add(self, block: int, result: Solution | None, state: Tensor) -> None:
        """Of a block that was passed, or skipped."""
        solver, combination = self.config.solver, self.stack.combination(block)
        weights: tuple[tuple[Weight, ...], ...]
        if result is None:
            weights = () if solver.own_coefficients else (combination.at_rest(),)
        else:
            weights = result.weights
            self.evaluations += per_sample_mean(result.evaluations)
        found = _means([combination.statistics(each, self.layout) for each in weights])
        found["state_rms"] = self.layout.rms(state)
        if solver.adaptive:
            status = Status.CONVERGED if result is None else result.status
            self.stack.budget_alarm.hear(status, solver.max_evaluations)
            found["stopped"] = float(status is Status.BUDGET_SPENT)
        self.blocks.append(found)
        for each in weights:
            if self.config.consistency_penalty > 0:
                self.consistency.append(combination.consistency_penalty(each, self.layout))
            if self.config.second_order_penalty > 0:
                self.second_order.append(combination.second_order_penalty(each, self.layout))

    def statistics(self) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {"evaluations": self.evaluations}
        flat.update(_means(self.blocks))
        flat["state_rms"] = self.blocks[-1]["state_rms"]
        for block, found in enumerate(self.blocks):
            flat.update({f"block{block}/{name}": value for name, value in found.items()})
        return flat

    def penalties(self) -> dict[str, Tensor]:
        found = {}
        if self.consistency:
            found["consistency"] = self.config.consistency_penalty * torch.as_tensor(mean(self.consistency))
        if self.second_order:
            found["second_order"] = self.config.second_order_penalty * torch.as_tensor(mean(self.second_order))
        return found


class EquationReport:
    """Statistics of one pass through blocks that solve equations, and the warning where they end far from them."""

    def __init__(self, stack: BlockStack, layout: Layout):
        self.stack = stack
        self.backward = [(record.evaluations, record.fallbacks) for record in stack.adjoints]
        self.evaluations: int | Tensor = 0
        self.residuals: list[Tensor] = []
        self.converged: list[Tensor] = []
        self.unfinished = False

    def add(self, block: int, result: Solution | None, state: Tensor) -> None:
        if result is None:
            return
        self.evaluations = self.evaluations + result.evaluations
        self.unfinished = self.unfinished or result.status in (Status.BUDGET_SPENT, Status.STAGNATED)
        if result.residual is not None and result.converged is not None:
            self.residuals.append(result.residual.float())
            self.converged.append(result.converged)

    def statistics(self) -> dict[str, Scalar]:
        if self.stack.training and self.unfinished:
            self._warn()
        evaluations, fallbacks = zip(*self.backward, strict=True) if self.backward else ((), ())
        return {
            "evaluations": torch.as_tensor(self.evaluations, dtype=torch.float32).mean(),
            "residual": torch.stack(self.residuals).amax(0).mean() if self.residuals else 0.0,
            "converged_share": torch.stack(self.converged).float().mean() if self.converged else 1.0,
            "evaluations_backward": _total(evaluations),
            "adjoint_fallbacks": _total(fallbacks),
        }

    def penalties(self) -> dict[str, Tensor]:
        return {}

    def _warn(self) -> None:
        """Say which block ended how far from its tolerance, after one read of all of them."""
        stack, solver = self.stack, self.stack.config.solver.solver
        means = torch.stack(self.residuals).mean(1).tolist()
        worst = max(range(len(means)), key=means.__getitem__)
        if solver.criterion == "relative" and stack.residual_alarm.due(stack.update, means[worst]):
            logger.warning(
                "update %d: the mean residual %.3f of implicit block %d is above %.2f; raise max_iter (now %d), "
                "or take more and smaller steps",
                stack.update,
                means[worst],
                worst,
                ALARM_RESIDUAL,
                solver.max_iter,
            )


def _total(found) -> Tensor:
    """Sum of the means over the samples."""
    values = [torch.as_tensor(value, dtype=torch.float32) for value in found]
    return sum((value.mean() for value in values), torch.zeros(()))


def _means(found: list[dict[str, Scalar]]) -> dict[str, Scalar]:
    """Mean of each name over dicts of the same names."""
    return {name: mean([values[name] for values in found]) for name in found[0]} if found else {}
