"""A stack of blocks: the ODE Transformer.

Block ``l`` integrates its own field over ``t ∈ [l, l + T]`` with an explicit scheme; Euler with one step of size 1 is
the ordinary transformer. The weights know nothing of the solver: one checkpoint can be evaluated with another scheme,
more steps, or adaptive steps to a tolerance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairseq_implicit.depth.history import LayerHistory
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.depth.random_steps import RandomSteps
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import AdaptiveConfig, solve_adaptive
from fairseq_implicit.solvers.coefficients import Combination, Weight, check_coefficients
from fairseq_implicit.solvers.multistep import (
    correct_by_backward_euler,
    solve_adams,
    solve_backward_euler_corrected,
)
from fairseq_implicit.solvers.runge_kutta import (
    ExplicitConfig,
    entering_dtype,
    recomputed,
    solve_explicit,
    solver_state,
)
from fairseq_implicit.solvers.status import Status

CORRECTORS = ("none", "backward-euler", "adams", "pcformer")
HISTORIES = ("none", "dlcl")
STAGE_DROPOUTS = ("shared", "independent")

Scalar = float | Tensor


@dataclass(frozen=True)
class StackConfig:
    """What is stacked and how each block is integrated.

    Attributes:
        layers: number of blocks.
        dim: width of the state.
        scheme: name or alias of a tableau.
        steps: sub-steps per block.
        total_time: length ``T`` of each block's interval.
        coefficients: mode of the combination coefficients, see :mod:`fairseq_implicit.solvers.coefficients`.
        start: where learned coefficients start, ``tableau`` or ``ones``.
        scope: ``block``, ``model`` (one set for all blocks) or ``channel`` (per block and channel).
        stage_norm: normalise the state and each increment before they are added (PCformer's ``rk_norm``).
        gradient: ``autograd``, ``checkpoint-step`` or ``checkpoint-stage``.
        state_float32: keep the state in float32 along the whole stack when the field runs in half precision.
        residual_in_field: integrate ``z + F(z)`` as the original ODE-Transformer code does (compatibility only).
        corrector: ``none``; ``backward-euler``; ``adams`` (the AB2/AM2 pair across blocks); ``pcformer`` (backward
            Euler on mixtures of all earlier blocks).
        history: ``none`` or ``dlcl``, the dynamic linear combination of layers.
        tied: one field serves all blocks (ALBERT).
        layerdrop: probability in [0, 1) with which training skips a block for the whole batch.
        stage_dropout: the fields' noise policy; ``independent`` makes recomputation replay the random state.
        consistency_penalty: weight of (Σw − 1)², averaged over blocks.
        second_order_penalty: weight of (Σwc − 1/2)², averaged over blocks.
        final_norm: end with a layer norm, as pre-norm stacks need.
        norm: all norms outside the fields.
        tolerance: of adaptive steps in each block (schemes ``bosh3``, ``dopri5``, ``tsit5``); 0: ``steps`` fixed ones.
        max_evaluations: of adaptive steps, per sample and block.
        random_steps: ``(low, high)``: in training the number of fixed steps per block is drawn at each update.
        seed: of ``random_steps``.

    Raises:
        ValueError: a value or a combination that has no meaning, in one sentence.
    """

    layers: int
    dim: int
    scheme: str = "euler"
    steps: int = 1
    total_time: float = 1.0
    coefficients: str = "fixed"
    start: str = "tableau"
    scope: str = "block"
    stage_norm: bool = False
    gradient: str = "autograd"
    state_float32: bool = False
    residual_in_field: bool = False
    corrector: str = "none"
    history: str = "none"
    tied: bool = False
    layerdrop: float = 0.0
    stage_dropout: str = "shared"
    consistency_penalty: float = 0.0
    second_order_penalty: float = 0.0
    final_norm: bool = False
    norm: NormConfig = field(default_factory=NormConfig)
    tolerance: float = 0.0
    max_evaluations: int = 500
    random_steps: tuple[int, int] | None = None
    seed: int = 1

    def __post_init__(self):
        solve = self.solve  # validates what concerns one block
        if self.layers < 1 or self.dim < 1:
            raise ValueError(f"a stack of {self.layers} blocks of width {self.dim}: both must be at least 1")
        check_coefficients(solve.tableau, self.coefficients, self.start, self.scope)
        for name, value, known in (
            ("corrector", self.corrector, CORRECTORS),
            ("history", self.history, HISTORIES),
            ("stage dropout", self.stage_dropout, STAGE_DROPOUTS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if not 0 <= self.layerdrop < 1:
            raise ValueError(f"a layer drop of {self.layerdrop} is not a probability below 1")
        for name, weight in (("consistency", self.consistency_penalty), ("second-order", self.second_order_penalty)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight {weight} of the {name} penalty must be finite and not negative")
            if weight > 0 and self.coefficients == "fixed":
                raise ValueError(f"a {name} penalty needs coefficients that are learned, not the mode 'fixed'")
        if self.second_order_penalty > 0 and solve.tableau.stages == 1:
            raise ValueError(f"a second-order penalty needs a scheme with two stages or more, not {self.scheme!r}")
        if self.history != "none" and self.corrector in ("adams", "pcformer"):
            raise ValueError(
                f"corrector {self.corrector!r} carries a history of its own: history {self.history!r} goes with the "
                "correctors none and backward-euler"
            )
        if self.corrector == "adams":
            self._check_adams()
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"a tolerance of {self.tolerance}: it must be positive, or 0 for fixed steps")
        if self.tolerance > 0:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        self.adaptive  # validates scheme and budget
        if self.coefficients != "fixed" or self.stage_norm or self.residual_in_field or self.corrector != "none":
            raise ValueError(
                "adaptive steps (a tolerance above 0) measure the error of the tableau itself: set coefficients "
                "'fixed', corrector 'none', and neither a stage norm nor the residual in the field"
            )
        if self.gradient == "checkpoint-stage" or self.random_steps is not None:
            raise ValueError(
                "gradient 'checkpoint-stage' and random steps are for fixed steps: set the tolerance to 0, or leave "
                "them out"
            )
        if self.stage_dropout == "independent":
            raise ValueError(
                "stage dropout 'independent' makes the field a different function at each evaluation, which has no "
                "error estimate: adaptive steps need 'shared'"
            )

    def _check_adams(self) -> None:
        if self.scheme not in ("heun2", "rk2") or self.steps != 1:
            raise ValueError(
                f"corrector 'adams' takes one step per block and is started by Heun's method: set scheme 'heun2' and "
                f"1 step, not scheme {self.scheme!r} and {self.steps}"
            )
        if self.coefficients != "fixed" or self.stage_norm:
            raise ValueError("corrector 'adams' has coefficients of its own: set mode 'fixed' and no stage norm")

    @property
    def solve(self) -> ExplicitConfig:
        """The solve of one block."""
        return ExplicitConfig(
            scheme=self.scheme,
            steps=self.steps,
            total_time=self.total_time,
            gradient=self.gradient,
            state_float32=self.state_float32,
            residual_in_field=self.residual_in_field,
            replay_random=self.stage_dropout == "independent",
        )

    @property
    def adaptive(self) -> AdaptiveConfig:
        """The adaptive solve of one block."""
        return AdaptiveConfig(self.scheme, self.tolerance, self.tolerance, self.max_evaluations)

    @property
    def is_plain_euler(self) -> bool:
        """Whether a block is one Euler step of size 1 with nothing around it: the field's own layer."""
        return (
            self.scheme in ("euler", "rk1")
            and self.steps == 1
            and self.total_time == 1
            and self.coefficients == "fixed"
            and self.corrector == "none"
            and not (self.stage_norm or self.residual_in_field)
        )


class BlockStack(Depth):
    """``layers`` blocks, each a field and the coefficients of its solve.

    Statistics, each also as ``block<l>/<name>``: ``state_rms`` over real tokens (of the last block),
    ``coefficient_sum`` Σw, ``coefficient_moment`` Σwc, and where the mode has them ``gate_mean``, ``gate_entropy``,
    ``alpha`` (means over blocks); ``evaluations`` counts the fields' evaluations in the forward pass, per sample where
    steps are adaptive; ``stopped`` is the share of adaptive solves that spent their budget.

    A block that layer drop skips is the identity: it reports the coefficients of a zero increment.

    Args:
        config: see :class:`StackConfig`.
        field_factory: makes the field of block ``l``; called once, with 0, when the weights are tied.
    """

    def __init__(self, config: StackConfig, field_factory: Callable[[int], Field]):
        super().__init__()
        self.config = config
        self.solve_config = config.solve
        tableau = self.solve_config.tableau
        self.fields = nn.ModuleList(field_factory(layer) for layer in range(1 if config.tied else config.layers))
        self.combinations = nn.ModuleList(
            Combination(
                tableau,
                config.coefficients,
                config.start,
                channels=config.dim if config.scope == "channel" else None,
                dim=config.dim,
                stage_norms=config.stage_norm,
                norm=config.norm.build,
            )
            for _ in range(1 if config.scope == "model" else config.layers)
        )
        pcformer = config.corrector == "pcformer"
        keeps_history = pcformer or config.history == "dlcl"
        self.history = LayerHistory(config.layers, config.dim, config.norm, not pcformer) if keeps_history else None
        self.predictor_history = LayerHistory(config.layers, config.dim, config.norm, False) if pcformer else None
        self.final_norm = config.norm.build(config.dim) if config.final_norm else None
        self.random_steps = None if config.random_steps is None else RandomSteps(config.random_steps, config.seed)
        if self.random_steps is not None and config.corrector == "adams":
            raise ValueError("corrector 'adams' takes one step per block: it has no random number of steps")

    def layers(self) -> Iterator[Field]:
        return iter(self.fields)

    def forward(self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False) -> DepthOutput:
        """Integrate through all blocks.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the embedding and the state after each block (before the final norm).
        """
        state = solver_state(x, self.solve_config)
        hidden_states = [x] if return_hidden_states else None
        report = _Report(self.config, layout)
        entries: list[Tensor] = []
        increment = None
        if self.history is not None:
            entries.append(self.history.entry(0, state))
            state = self.history.mix(entries)
        skipped = self._draw_skipped_blocks()
        solve = self.solve_config
        if self.random_steps is not None and self.training:
            solve = replace(solve, steps=self.random_steps.draw())
        for block in range(self.config.layers):
            combination = self.combinations[block % len(self.combinations)]
            if block in skipped:
                # The Adams pair has no coefficients to report, and restarts after a gap.
                passed = _Passed(state, () if self.config.corrector == "adams" else (combination.at_rest(),), 0)
            else:
                f = self.fields[block % len(self.fields)].prepare(state.to(x.dtype), layout)
                if self.config.tolerance > 0:
                    passed = self._integrate_adaptively(f, state, block, combination, layout, x.dtype)
                else:
                    passed = self._integrate(f, state, block, combination, entries, increment, x.dtype, solve)
            state, increment = passed.state, passed.increment
            if self.history is not None:
                entries.append(self.history.entry(block + 1, state))
                state = self.history.mix(entries)
            report.add(block, combination, passed, state)
            if hidden_states is not None:
                hidden_states.append(state.to(x.dtype))
        state = state.to(x.dtype)
        if self.final_norm is not None:
            state = self.final_norm(state)
        return DepthOutput(state, hidden_states, report.statistics(), report.penalties())

    def _integrate(
        self,
        f: Increment,
        state: Tensor,
        block: int,
        combination: Combination,
        entries: list[Tensor],
        increment: Tensor | None,
        dtype: torch.dtype,
        solve: ExplicitConfig,
    ) -> "_Passed":
        """Pass one block: ``entries`` is the layer history, ``increment`` what the Adams pair carries along."""
        config, t0 = self.config, float(block)
        layer = f.layer if config.is_plain_euler and solve.steps == 1 else None
        if layer is not None:
            # A post-norm layer ends in a norm: only its own map, not z + F(z), is the published layer to the last bit.
            layer = layer if solve.gradient == "autograd" else recomputed(layer, solve)
            return _Passed(layer(t0, state.to(dtype)).to(state.dtype), (combination.at_rest(),), 1)
        if config.corrector == "adams":
            adams = solve_adams(f, state, solve, increment, t0, dtype)
            return _Passed(adams.state, (), adams.evaluations, adams.increment)
        if config.corrector == "backward-euler":
            result = solve_backward_euler_corrected(f, state, solve, combination, t0, dtype)
        else:
            result = solve_explicit(f, state, solve, combination, t0, dtype)
        if config.corrector == "pcformer":
            predicted = self.predictor_history.entry(block + 1, result.state)
            mixed = self.predictor_history.mix(entries + [predicted])
            corrected = correct_by_backward_euler(f, mixed, mixed, solve, t0, dtype)
            return _Passed(corrected, result.weights, result.evaluations + 1)
        return _Passed(result.state, result.weights, result.evaluations)

    def _integrate_adaptively(
        self,
        f: Increment,
        state: Tensor,
        block: int,
        combination: Combination,
        layout: Layout,
        dtype: torch.dtype,
    ) -> "_Passed":
        """Pass one block with adaptive steps, each sample with its own.

        Raises:
            ArithmeticError: non-finite values, or steps that shrink to nothing.
        """
        result = solve_adaptive(
            entering_dtype(f, dtype),
            state,
            self.config.total_time,
            self.config.adaptive,
            layout,
            start=float(block),
            recompute=self.config.gradient == "checkpoint-step",
        )
        if result.status in (Status.NON_FINITE, Status.STEP_UNDERFLOW):
            raise ArithmeticError(
                f"the adaptive solve of block {block} failed ({result.status.value}): the model has diverged, or its "
                "tolerance is too small"
            )
        evaluations = result.evaluations
        evaluations = evaluations.float().mean() if isinstance(evaluations, Tensor) else evaluations
        stopped = float(result.status is Status.BUDGET_SPENT)
        return _Passed(result.state, (combination.at_rest(),), evaluations, stopped=stopped)

    def _draw_skipped_blocks(self) -> set[int]:
        """Blocks that layer drop skips in this pass. Drawn on the host: nothing is read back from the device."""
        if not self.training or self.config.layerdrop == 0:
            return set()
        draws = torch.rand(self.config.layers, device="cpu").tolist()
        return {block for block, draw in enumerate(draws) if draw < self.config.layerdrop}


class _Passed(NamedTuple):
    """A state after one block, the weights of each of its sub-steps, and its cost."""

    state: Tensor
    weights: tuple[tuple[Weight, ...], ...]
    evaluations: Scalar
    increment: Tensor | None = None
    stopped: float = 0.0


class _Report:
    """Statistics and penalties of one forward pass, as 0-dim tensors that nobody has read back."""

    def __init__(self, config: StackConfig, layout: Layout):
        self.config = config
        self.layout = layout
        self.evaluations = 0
        self.blocks: list[dict[str, Scalar]] = []
        self.consistency: list[Scalar] = []
        self.second_order: list[Scalar] = []

    def add(self, block: int, combination: Combination, passed: _Passed, state: Tensor) -> None:
        self.evaluations += passed.evaluations
        found = _means([combination.statistics(weights, self.layout) for weights in passed.weights])
        found["state_rms"] = self.layout.rms(state)
        if self.config.tolerance > 0:
            found["stopped"] = passed.stopped
        self.blocks.append(found)
        for weights in passed.weights:
            if self.config.consistency_penalty > 0:
                self.consistency.append(combination.consistency_penalty(weights, self.layout))
            if self.config.second_order_penalty > 0:
                self.second_order.append(combination.second_order_penalty(weights, self.layout))

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
            found["consistency"] = self.config.consistency_penalty * _mean(self.consistency)
        if self.second_order:
            found["second_order"] = self.config.second_order_penalty * _mean(self.second_order)
        return found


def _mean(values: Sequence[Scalar]) -> Scalar:
    if isinstance(values[0], Tensor):
        return values[0] if len(values) == 1 else torch.stack(list(values)).mean()
    return sum(values) / len(values)


def _means(found: Sequence[dict[str, Scalar]]) -> dict[str, Scalar]:
    """Mean of each name over dicts of the same names."""
    return {name: _mean([values[name] for values in found]) for name in found[0]} if found else {}
