"""A stack of blocks: the ODE Transformer, explicit or implicit.

Block ``l`` integrates its own field over ``t ∈ [l, l + T]``; Euler with one step of size 1 is the ordinary transformer.
The weights know nothing of the solver: one checkpoint can be evaluated with another scheme, more steps, adaptive steps
to a tolerance, or implicit ones.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fairseq_implicit.depth.convergence import BudgetAlarm, ResidualAlarm, rate_statistics, refuse_failure
from fairseq_implicit.depth.history import LayerHistory
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.depth.random_steps import RandomDepth, RandomSteps
from fairseq_implicit.depth.stack_report import EquationReport, Report, Scalar, SchemeReport
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.mixers.lambda_layer import content_lambdas
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.module_list import ModuleList
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.coefficients import Combination
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Solution, Solver, Span
from fairseq_implicit.solvers.vector_field import Time

HISTORIES = ("none", "dlcl")
STAGE_DROPOUTS = ("shared", "independent")


@dataclass(frozen=True)
class StackConfig:
    """What is stacked and how each block is solved.

    Attributes:
        layers: number of blocks.
        dim: width of the state.
        solver: of each block.
        total_time: length ``T`` of each block's interval.
        history: ``none`` or ``dlcl``, the dynamic linear combination of layers.
        tied: one field serves all blocks (ALBERT).
        layerdrop: probability in [0, 1) with which training skips a block for the whole batch.
        stage_dropout: the fields' noise policy.
        consistency_penalty: weight of (Σw − 1)², averaged over blocks.
        second_order_penalty: weight of (Σwc − 1/2)², averaged over blocks.
        final_norm: end with a layer norm, as pre-norm stacks need.
        random_steps: ``(low, high)``: in training the number of fixed steps per block is drawn at each update.
        random_depth: in training every sequence takes a number of steps of its own, a truncated Poisson number of this
            mean, through the one block that there is. The steps keep their size: more of them are more time.
        random_depth_max: the largest such number; ``None``: twice the mean.
        random_depth_gradient: through how many of a sequence's last steps the gradient goes; the others keep no graph.
        seed: of ``random_steps`` and ``random_depth``.
        norm: all norms outside the fields.

    Raises:
        OptionError: a value or a combination that has no meaning, in one sentence.
    """

    layers: int
    dim: int
    solver: Solver = RungeKutta()
    total_time: float = 1.0
    history: str = "none"
    tied: bool = False
    layerdrop: float = 0.0
    stage_dropout: str = "shared"
    consistency_penalty: float = 0.0
    second_order_penalty: float = 0.0
    final_norm: bool = False
    random_steps: tuple[int, int] | None = None
    random_depth: float | None = None
    random_depth_max: int | None = None
    random_depth_gradient: int = 8
    seed: int = 1
    norm: NormConfig = NormConfig()

    def __post_init__(self):
        solver = self.solver
        if self.layers < 1 or self.dim < 1:
            raise OptionError(
                "layers", f"a stack of {self.layers} blocks of width {self.dim}: both must be at least 1."
            )
        if not 0 < self.total_time < math.inf:
            raise OptionError("total_time", f"a total time of {self.total_time} is not positive and finite.")
        check_choice("history", self.history, HISTORIES)
        check_choice("stage_dropout", self.stage_dropout, STAGE_DROPOUTS)
        if not 0 <= self.layerdrop < 1:
            raise OptionError("layerdrop", f"{self.layerdrop} is not a probability below 1.")
        if self.stage_dropout == "independent" and solver.one_field:
            raise OptionError(
                "stage_dropout",
                "independent makes the field a different function at each evaluation, which has no error estimate: "
                "adaptive steps need 'shared'.",
            )
        if not solver.implicit and not solver.gradient.along_the_way:
            raise OptionError(
                "gradient", f"{solver.gradient.name} is for one solve of the whole depth, not for blocks."
            )
        if self.random_steps is not None:
            if solver.adaptive:
                raise OptionError(
                    "random_steps", "it draws a number of fixed steps: set `tolerance` 0, or leave it out."
                )
            replace(solver, steps=RandomSteps(self.random_steps, self.seed).high)
        if self.random_depth is not None:
            self._check_random_depth(self.random_depth)
        if self.history != "none" and solver.carries_history:
            raise OptionError(
                "history",
                f"`corrector` carries a history of its own; {self.history} goes with none and backward-euler.",
            )
        solver.check_penalties(self.consistency_penalty, self.second_order_penalty)

    @property
    def one_block(self) -> bool:
        """Whether one block's weights act at all depths."""
        return self.tied or self.layers == 1

    @property
    def step(self) -> float:
        """The size of a fixed step."""
        return self.total_time / self.solver.steps

    def _check_random_depth(self, mean: float) -> None:
        solver = self.solver
        if not self.one_block:
            raise OptionError(
                "random_depth",
                f"{self.layers} blocks with weights of their own are no loop, and a gradient through the last steps "
                "alone would cut the first blocks off: set `tied`, or `layers` 1.",
            )
        if solver.implicit or solver.adaptive or solver.carries_history:
            raise OptionError("random_depth", "it counts fixed explicit steps that depend on the state alone.")
        if self.random_steps is not None:
            raise OptionError("random_depth", "`random_steps` draws steps of other sizes: leave one of the two out.")
        if self.history != "none" or self.layerdrop > 0:
            raise OptionError(
                "random_depth", "a loop has no layers to combine or to skip: no `history`, no `layerdrop`."
            )
        if self.random_depth_gradient < 1:
            raise OptionError("random_depth_gradient", f"{self.random_depth_gradient} steps make no gradient.")
        RandomDepth(mean, self.random_depth_max, self.seed)


class BlockStack(Depth):
    """``layers`` blocks, each a field and its solve. The weights have the same names whatever the solver.

    Statistics, see :mod:`fairseq_implicit.depth.convergence`: ``evaluations``, summed over blocks. Of schemes with
    stages also, and each as ``block<l>/<name>``: ``state_rms`` (of the last block), ``coefficient_sum`` Σw,
    ``coefficient_moment`` Σwc, and where the mode has them ``gate_mean``, ``gate_entropy``, ``alpha`` (means over
    blocks); ``stopped`` of adaptive steps. Of implicit ones ``residual`` of the worst block, ``converged_share`` of all
    samples and blocks, ``evaluations_backward`` and ``adjoint_fallbacks`` of the previous backward pass. Of linear
    parts ``rate_mean``, ``rate_min``, ``rate_max`` over all blocks and channels.

    A block that layer drop skips is the identity: it reports the coefficients of a zero increment.

    Args:
        config: see :class:`StackConfig`.
        field_factory: makes the field of block ``l``; called once, with 0, when the weights are tied.
    """

    def __init__(self, config: StackConfig, field_factory: Callable[[int], Field]):
        super().__init__()
        self.config = config
        solver = config.solver
        self.fields = ModuleList(field_factory(layer) for layer in range(1 if config.tied else config.layers))
        self.combinations: ModuleList[Combination] = ModuleList()
        if not solver.implicit:
            self.combinations.extend(
                solver.combination(config.dim, config.norm.build)
                for _ in range(1 if solver.shares_combination else config.layers)
            )
        mixes = solver.mixes_history
        keeps_history = mixes or config.history == "dlcl"
        self.history = LayerHistory(config.layers, config.dim, config.norm, not mixes) if keeps_history else None
        self.predictor_history = LayerHistory(config.layers, config.dim, config.norm, False) if mixes else None
        self.final_norm = config.norm.build(config.dim) if config.final_norm else None
        self.random_steps = None if config.random_steps is None else RandomSteps(config.random_steps, config.seed)
        self.random_depth = None
        if config.random_depth is not None:
            self.random_depth = RandomDepth(config.random_depth, config.random_depth_max, config.seed)
            self._check_loop()
        self.adjoints: list[AdjointRecord] = []
        self.residual_alarm, self.budget_alarm = ResidualAlarm(), BudgetAlarm()
        self.update = 0

    def layers(self) -> Iterator[Field]:
        for field in self.fields:
            yield from field.layers()

    def config_at(self, depth: int) -> StackConfig:
        """That of ``depth`` steps: through one block as many of the size that it was trained with, which are as much
        more time, and through blocks of their own so many per block over the same time, as :class:`RandomSteps` trains
        them."""
        config, solver = self.config, self.config.solver
        if solver.adaptive:
            raise OptionError("tolerance", "adaptive steps choose their number themselves: set 0 for fixed ones.")
        if not config.one_block or config.random_steps is not None:
            return replace(config, solver=replace(solver, steps=depth))
        if config.history != "none" or solver.mixes_history:
            raise OptionError("history", "it counts blocks, and a loop of another depth would have others.")
        if solver.steps == 1:
            return replace(config, layers=depth)
        self._check_loop()
        return replace(config, layers=1, solver=replace(solver, steps=depth), total_time=depth * config.step)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update."""
        self.update = num_updates

    def _check_loop(self) -> None:
        """Refuse tied blocks whose coefficients are not: no step of theirs is another's."""
        if len(self.combinations) > 1 and any(True for _ in self.combinations.parameters()):
            raise OptionError("scope", "a loop of one block has one set of `coefficients`: set model, or `layers` 1.")

    @property
    def scheduled(self) -> bool:
        return self.random_steps is not None or self.random_depth is not None

    def count_updates(self, updates: int) -> None:
        self.update = updates
        for drawn in (self.random_steps, self.random_depth):
            if drawn is not None:
                drawn.update = updates

    def forward(
        self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False, return_lambdas: bool = False
    ) -> DepthOutput:
        """Integrate through all blocks.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the embedding and the state after each block (before the final norm).
            return_lambdas: collect the content lambdas at the states before the blocks.

        Raises:
            ArithmeticError: a solve failed; the sentence names the block.
            OptionError: the tolerance or the memory cap does not suit the precision or the batch.
        """
        solver = self.config.solver
        if self.random_steps is not None and self.training:
            solver = replace(solver, steps=self.random_steps.draw())
        hidden_states = [x] if return_hidden_states else None
        lambdas: list[Tensor] | None = [] if return_lambdas else None
        report = (EquationReport if solver.implicit else SchemeReport)(self, layout)
        if self.random_depth is not None and self.training:
            state, cost = self._loop(self.random_depth.draw(len(x)), x, layout, report, lambdas)
            if hidden_states is not None:
                hidden_states.append(state.to(x.dtype))
            statistics = report.statistics()
        else:
            state, reused = self._through_blocks(solver, x, layout, report, hidden_states, lambdas)
            statistics = report.statistics()
            backward = statistics.get("evaluations_backward", 0)
            cost = solver.update_cost(statistics["evaluations"], backward, self.config.layers) - reused
        rates = rate_statistics(field.linear_rate() for field in self.fields)
        if rates:
            statistics |= {"state_rms": layout.rms(state), **rates}
        state = state.to(x.dtype)
        if self.final_norm is not None:
            state = self.final_norm(state)
        operations = cost * self.fields[0].operations(x.shape[1])
        return DepthOutput(state, hidden_states, statistics, report.penalties(), operations=operations, lambdas=lambdas)

    def _through_blocks(
        self,
        solver: Solver,
        x: Tensor,
        layout: Layout,
        report: Report,
        hidden_states: list[Tensor] | None,
        lambdas: list[Tensor] | None,
    ) -> tuple[Tensor, int]:
        """The state after all blocks, and the evaluations that gradients have in common with their solves."""
        state = solver.state(x)
        if solver.implicit and torch.is_grad_enabled():
            self.adjoints = []
        entries: list[Tensor] = []
        carried = None
        if self.history is not None:
            entries.append(self.history.entry(0, state))
            state = self.history.mix(entries)
        reused = 0
        skipped = self._draw_skipped_blocks()
        for block in range(self.config.layers):
            field = self.fields[block % len(self.fields)]
            self._look_at_lambdas(lambdas, field, x, layout, float(block), state)
            if block in skipped:
                # What is carried along is lost: the Adams pair restarts after a gap.
                result = None
            else:
                f = field.prepare(x, layout).within(self.around)
                span = Span(float(block), self.config.total_time)
                result = self._solve(solver, f, state, span, block, layout, entries, carried, x.dtype)
                reused += result.reused
            state, carried = (state, None) if result is None else (result.state, result.carried)
            if self.history is not None:
                entries.append(self.history.entry(block + 1, state))
                state = self.history.mix(entries)
            report.add(block, result, state)
            if hidden_states is not None:
                hidden_states.append(state.to(x.dtype))
        return state, reused

    def _look_at_lambdas(
        self, lambdas: list[Tensor] | None, field: Field, x: Tensor, layout: Layout, t: Time, state: Tensor
    ) -> None:
        """Collect the content lambdas of a field at a state, where they are asked for."""
        if lambdas is not None:
            with content_lambdas(lambdas):
                field.prepare(x, layout)(t, state.to(x.dtype))

    def _loop(
        self, depths: list[int], x: Tensor, layout: Layout, report: Report, lambdas: list[Tensor] | None
    ) -> tuple[Tensor, Scalar]:
        """Each sequence through its own number of steps of one block, in one solve with one noise.

        All end together: the shallow ones wait, so that the last steps of all are the last of the loop, and only these
        keep a graph. A sequence's steps are those that it would take alone.

        Returns:
            the state and the cost of the update in evaluations of the field on the whole batch.
        """
        solver = replace(self.config.solver, steps=1)
        f = self.fields[0].prepare(x, layout).within(self.around)
        deepest, h = max(depths), self.config.step
        tracked = min(deepest, self.config.random_depth_gradient)
        waits = torch.tensor([deepest - depth for depth in depths], device=x.device)
        start = state = solver.state(x)
        self._look_at_lambdas(lambdas, self.fields[0], x, layout, 0.0, state)
        for index in range(deepest):
            running = (waits <= index).view(-1, 1, 1)
            if index == deepest - tracked:
                # Whoever still waits keeps the graph of its embedding.
                state = torch.where((waits < index).view(-1, 1, 1), state, start)
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= deepest - tracked):
                span = Span((index - waits).clamp(min=0) * h, h)
                result = self._solve(solver, f, state, span, 0, layout, [], None, x.dtype)
                state = torch.where(running, result.state, state)
        each = result.evaluations
        report.add(0, replace(result, evaluations=each * (deepest - waits)), state)
        return state, each * (deepest - tracked) + solver.update_cost(each * tracked, 0, 1)

    def _solve(
        self,
        solver: Solver,
        f: Increment,
        state: Tensor,
        span: Span,
        block: int,
        layout: Layout,
        entries: list[Tensor],
        carried: Tensor | None,
        dtype: torch.dtype,
    ) -> Solution:
        """Pass one block: ``entries`` is the layer history, ``carried`` what the block before it handed on."""
        layers = solver.plain_layers(span)
        layer = f.layer if layers else None
        if layer is not None:
            # A post-norm layer ends in a norm: only its own map, not z + F(z), is the published layer to the last bit.
            layer = solver.around_layer(layer)
            for _ in range(layers):
                state = layer(span.start, state.to(dtype)).to(state.dtype)
            return Solution(state, layers, weights=((1.0,),))
        options: dict[str, Any] = {"dtype": dtype}
        if solver.exponential and f.linear is not None:
            options["rate"], f = f.linear
        if solver.implicit:
            options["records"] = self.adjoints if torch.is_grad_enabled() else None
        if solver.combines:
            options.update(combination=self.combination(block), carried=carried)
            history = self.predictor_history
            if history is not None:
                options["mixture"] = lambda predicted: history.mix(entries + [history.entry(block + 1, predicted)])
        result = solver.solve(f, state, span, layout, **options)
        refuse_failure(result.status, f"block {block}")
        return result

    def combination(self, block: int) -> Combination:
        """The weights of the stages of a block."""
        return self.combinations[block % len(self.combinations)]

    def _draw_skipped_blocks(self) -> set[int]:
        """Blocks that layer drop skips in this pass. Drawn on the host: nothing is read back from the device."""
        if not self.training or self.config.layerdrop == 0:
            return set()
        draws = torch.rand(self.config.layers, device="cpu").tolist()
        return {block for block, draw in enumerate(draws) if draw < self.config.layerdrop}
