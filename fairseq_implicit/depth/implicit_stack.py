"""A stack of blocks, each an implicit step: between the ordinary layer (θ = 0) and backward Euler (θ = 1)."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fairseq_implicit.depth.convergence import ALARM_RESIDUAL, ResidualAlarm, refuse_non_finite
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.fields.field import Field
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.fixed_point import OptionError
from fairseq_implicit.solvers.implicit_grad import AdjointRecord
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.theta import ThetaConfig, solve_theta

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImplicitStackConfig:
    """What is stacked and how each block is solved.

    Attributes:
        layers: number of blocks; block ``l`` integrates from time ``l`` on.
        dim: width of the state.
        theta: scheme, steps, root solver and gradient of one block.
        tied: one field serves all blocks.
        final_norm: end with a layer norm, as pre-norm stacks need.
        norm: that norm.

    Raises:
        ValueError: no block, or no width.
    """

    layers: int
    dim: int
    theta: ThetaConfig
    tied: bool = False
    final_norm: bool = False
    norm: NormConfig = field(default_factory=NormConfig)

    def __post_init__(self):
        if self.layers < 1 or self.dim < 1:
            raise ValueError(f"a stack of {self.layers} blocks of width {self.dim}: both must be at least 1")


class ImplicitStack(Depth):
    """``layers`` implicit blocks. Its weights have the names of an explicit stack's, so either opens the other's.

    Statistics: ``evaluations`` of the field in the forward pass, summed over blocks, mean over samples;
    ``evaluations_backward`` and ``adjoint_fallbacks`` of the previous backward pass; ``residual``, the worst block's,
    mean over samples; ``converged_share`` of all samples and blocks.

    Args:
        config: see :class:`ImplicitStackConfig`.
        field_factory: makes the field of block ``l``; called once, with 0, when the weights are tied.
    """

    def __init__(self, config: ImplicitStackConfig, field_factory: Callable[[int], Field]):
        super().__init__()
        self.config = config
        self.fields = nn.ModuleList(field_factory(layer) for layer in range(1 if config.tied else config.layers))
        self.final_norm = config.norm.build(config.dim) if config.final_norm else None
        self.adjoints: list[AdjointRecord] = []
        self.alarm = ResidualAlarm()
        self.update = 0

    def layers(self) -> Iterator[Field]:
        return iter(self.fields)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update."""
        self.update = num_updates

    def forward(self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False) -> DepthOutput:
        """Solve all blocks in turn.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the embedding and the state after each block (before the final norm).

        Raises:
            ArithmeticError: a field returned non-finite values.
            ValueError: the tolerance or the memory cap does not suit the precision or the batch.
        """
        theta = self.config.theta
        backward = self._backward_statistics()
        self.adjoints = [] if torch.is_grad_enabled() else self.adjoints
        records = self.adjoints if torch.is_grad_enabled() else None
        evaluations = torch.zeros(x.shape[0], device=x.device)
        residuals, converged, unfinished = [], [], False
        state, hidden = x, [x] if return_hidden_states else None
        for block in range(self.config.layers):
            f = self.fields[block % len(self.fields)].prepare(state, layout)
            layer = f.layer
            if layer is not None and theta.scheme == "theta" and theta.theta == 0 and theta.total_time == theta.steps:
                # The published layer to the last bit, where it ends in a norm.
                for _ in range(theta.steps):
                    state = layer(float(block), state)
                evaluations = evaluations + theta.steps
            else:
                try:
                    result = solve_theta(f, state, theta, float(block), layout, records)
                except OptionError as error:
                    raise ValueError(f"--ode-theta-{error.option.replace('_', '-')}: {error.sentence}") from error
                refuse_non_finite(result.status, f"implicit block {block}")
                unfinished = unfinished or result.status in (Status.BUDGET_SPENT, Status.STAGNATED)
                state = result.state
                evaluations = evaluations + result.evaluations
                if result.residual is not None:
                    residuals.append(result.residual.float())
                    converged.append(result.converged)
            if hidden is not None:
                hidden.append(state)
        if self.training and unfinished:
            self._warn(residuals)
        if self.final_norm is not None:
            state = self.final_norm(state)
        statistics: dict[str, float | Tensor] = {
            "evaluations": evaluations.mean(),
            "residual": torch.stack(residuals).amax(0).mean() if residuals else 0.0,
            "converged_share": torch.stack(converged).float().mean() if converged else 1.0,
            **backward,
        }
        return DepthOutput(state, hidden, statistics)

    def _warn(self, residuals: list[Tensor]) -> None:
        """Say which block ended how far from its tolerance, after one read of all of them."""
        theta = self.config.theta
        means = torch.stack(residuals).mean(1).tolist()
        worst = max(range(len(means)), key=means.__getitem__)
        if theta.solver.criterion == "relative" and self.alarm.due(self.update, means[worst]):
            logger.warning(
                "update %d: the mean residual %.3f of implicit block %d is above %.2f; raise --ode-theta-max-iter (now "
                "%d), or take smaller steps: a larger --ode-steps, a smaller --ode-time",
                self.update,
                means[worst],
                worst,
                ALARM_RESIDUAL,
                theta.solver.max_iter,
            )

    def _backward_statistics(self) -> dict[str, Tensor]:
        """Of the records that the previous backward pass has filled."""

        def total(name: str) -> Tensor:
            found = [torch.as_tensor(getattr(record, name), dtype=torch.float32) for record in self.adjoints]
            return sum((value.mean() for value in found), torch.zeros(()))

        return {"evaluations_backward": total("evaluations"), "adjoint_fallbacks": total("fallbacks")}
