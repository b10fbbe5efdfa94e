"""``solve_depth``: any encoder of transformers under the solvers, its weights and its interface as they are.

Explicit and implicit steps integrate ``f(y) = layer(y) - y``, layer by layer or all layers as one field; Euler with one
step of time 1 calls the layer itself, so that it is the plain model to the last bit. An equilibrium is that of a map
into which the input x is injected at every evaluation, ``u = LN(x)`` without weights, g the gain:

=================  =======================================================================================
layers end norm    ``z = Layers(z)``, in whose first sum stands ``z + g u``: ``LN1(z + g u + Attention z)``
others             ``z = LN(Layers(z + g u))``: without a norm at its end the map would not be bounded
=================  =======================================================================================

Dropout, that of attention included, is drawn once per solve.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.depth.convergence import BudgetAlarm, ResidualAlarm, refuse_failure
from fairseq_implicit.fields.shared_dropout import ReplayedGenerator
from fairseq_implicit.huggingface.architectures import Architecture, Encoder, config_of, find_encoder
from fairseq_implicit.huggingface.depth_settings import DepthSettings
from fairseq_implicit.huggingface.solved_layer import (
    CURRENT,
    ONE_MAP,
    Call,
    Pass,
    chained,
    restore_layer,
    solve_layer,
)
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.gradients.trajectory import CheckpointStep
from fairseq_implicit.solvers.recomputation import recomputed
from fairseq_implicit.solvers.solver import Keep
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import Time

logger = logging.getLogger(__name__)

#: Where a model's configuration keeps its options.
KEY = "solved_depth"


def solve_depth(model: nn.Module, scheme: str | None = None, **options: Any) -> nn.Module:
    """Solve the depth of the encoder in ``model`` by another scheme, until :func:`restore_depth`.

    Weights, state dict and interface stay as they are; the options are kept in the model's configuration as
    ``solved_depth``, so that ``save_pretrained`` writes them and :func:`load_solved` reads them again.

    ``output_hidden_states`` gives the state after each layer's solve; over the stack the input and the states after
    each step. ``gradient_checkpointing_enable()`` recomputes each step in the backward pass.

    Args:
        model: an encoder of transformers (BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ALBERT, DistilBERT, DeBERTa-v2,
            ModernBERT), or a model that holds one. It is changed in place; what was solved before is solved anew.
        scheme: an explicit scheme, ``theta``, ``implicit-midpoint`` or ``equilibrium``; ``None``: as the model's
            configuration says.
        options: see :class:`fairseq_implicit.huggingface.depth_settings.DepthSettings`.

    Returns:
        ``model``.

    Raises:
        OptionError: an impossible option or model, in one sentence.
    """
    if scheme is None:
        if options:
            raise OptionError("scheme", f"say which one {', '.join(options)} belongs to, such as scheme='rk4'.")
        options = next((config[KEY] for config in _configs(model) if KEY in config), {})
        if not options:
            raise OptionError("scheme", "the model's configuration does not say how its depth is solved: name one.")
    else:
        options = {"scheme": scheme, **options}
    settings = DepthSettings.from_dict(options)
    encoder = find_encoder(model, settings.layers)
    restore_depth(model)
    depth = SolvedDepth(settings, encoder.architecture, encoder.calls)
    for layer in encoder.layers:
        solve_layer(layer, encoder.architecture.width)
    if settings.whole_stack:
        for module in encoder.beside:
            solve_layer(module, place=1)
    depth.attach(encoder.module)
    if encoder.config is not None:
        setattr(encoder.config, KEY, settings.as_dict())
    return model


def restore_depth(model: nn.Module) -> nn.Module:
    """Undo :func:`solve_depth`, in place: the plain model, whose configuration says nothing of a solver either."""
    solved = _find(model)
    if solved is not None:
        encoder, depth = solved
        for layer in (*encoder.layers, *(encoder.beside if depth.settings.whole_stack else ())):
            restore_layer(layer)
        depth.detach(encoder.module)
    for config in _configs(model):
        config.pop(KEY, None)
    return model


def depth_statistics(model: nn.Module) -> dict[str, float]:
    """What the last forward pass of a solved model cost, and the backward pass after it; means over the samples.

    Returns:
        ``evaluations`` of the field, summed over the solves; ``layer_evaluations``, the same in calls of one layer;
        of equations ``residual`` (that of the worst solve), ``converged_share`` of samples and solves,
        ``evaluations_backward`` (products with the Jacobian), ``adjoint_fallbacks``; of adaptive steps ``stopped``, the
        share of solves that spent their budget.

    Raises:
        OptionError: the model is not solved, or has made no pass.
    """
    solved = _find(model)
    if solved is None:
        raise OptionError("model", "its depth is not solved: call solve_depth first.")
    return solved[1].statistics()


def load_solved(folder: str, **options: Any) -> nn.Module:
    """A model that was saved while its depth was solved, as it was.

    transformers alone reads the same folder as the plain model.

    Args:
        folder: of ``save_pretrained``, or a name on the Hugging Face Hub.
        options: of transformers' ``from_pretrained``.

    Raises:
        OptionError: its configuration does not say how its depth is solved, or transformers does not know its class.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["AutoModel"])[0]
    if name not in dir(transformers):
        raise OptionError("folder", f"transformers has no {name}: load the model and call solve_depth(model).")
    return solve_depth(getattr(transformers, name).from_pretrained(folder, **options))


def _configs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What the configurations in a model hold."""
    return (vars(config) for module in model.modules() if (config := config_of(module)) is not None)


def _find(model: nn.Module) -> tuple[Encoder, SolvedDepth] | None:
    for module in model.modules():
        depth = vars(module).get(KEY)
        if isinstance(depth, SolvedDepth):
            return find_encoder(module, depth.settings.layers), depth
    return None


@cache
def _arguments(forward: Callable) -> tuple[str, ...]:
    """The names of its arguments after ``self``, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


class SolvedDepth:
    """How the layers of one encoder are solved, and what its last pass cost.

    Attributes:
        settings: the options.
        architecture: of the encoder.
        calls: how many calls of layers one pass makes.
    """

    def __init__(self, settings: DepthSettings, architecture: Architecture, calls: int):
        self.settings, self.architecture, self.calls = settings, architecture, calls
        self.report: Report | None = None
        self.residual_alarm, self.budget_alarm = ResidualAlarm(0.0), BudgetAlarm()
        self.passes = 0
        self.handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Follow the passes of an encoder."""
        setattr(module, KEY, self)
        # First and always: what follows, and what goes wrong, belongs to a pass.
        before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = module.register_forward_hook(self._end, prepend=True, always_call=True)
        self.handles = [before, after]

    def detach(self, module: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        delattr(module, KEY)

    @property
    def evaluates_once(self) -> bool:
        """Whether a pass calls each layer just once, as the plain model does."""
        return not self.settings.is_equilibrium and self.settings.trajectory.plain_layers(self.settings.span) == 1

    def statistics(self) -> dict[str, float]:
        """See :func:`depth_statistics`."""
        if self.report is None:
            raise OptionError("model", "it has made no pass since its depth is solved: call it first.")
        return self.report.statistics()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(_arguments(type(module).forward), args, strict=False)), **kwargs}
        config = config_of(module)

        def wanted(name: str) -> Any:
            value = given.get(name)
            return getattr(config, name) if value is None and config is not None else value

        if wanted("output_attentions") and not self.evaluates_once:
            raise OptionError("output_attentions", f"{ONE_MAP}: restore_depth first.")
        states = self.settings.whole_stack and wanted("output_hidden_states")
        if states and wanted("return_dict") is False:
            raise OptionError(
                "return_dict", "the states of a solve over the stack have no place in a tuple: leave it out."
            )
        outer = CURRENT.get()
        if outer is not None and outer.module is module:  # left behind by an interrupted pass
            outer = outer.outer
        CURRENT.set(_Pass(self, module, self._layout(given.get("attention_mask")), bool(states), outer))

    def _layout(self, mask: Any) -> Layout:
        if mask is None:
            return UNPADDED
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return Layout(mask.bool())
        if self.settings.is_equilibrium or self.settings.is_implicit or self.settings.tolerance:
            raise OptionError(
                "attention_mask",
                "give it as (batch, time), 1 at real tokens: whether a sample has converged is judged over these.",
            )
        return UNPADDED

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = CURRENT.get()
        if not isinstance(current, _Pass) or current.module is not module:
            return  # refused at its beginning
        CURRENT.set(current.outer)
        if output is None:
            return  # raised
        self.passes += 1
        self.report = current.report
        self._warn(current.report)
        if current.wants_states:
            # The collector of hidden states saw one state going through all layers. The last one may be normed since.
            output.hidden_states = (*current.states[:-1], output.hidden_states[-1])

    def _warn(self, report: Report) -> None:
        if report.unfinished and self.residual_alarm.due(self.passes, report.worst_residual):
            logger.warning(
                "%.0f %% of the samples met the tolerance of %s, mean residual %.2g: raise max_iter (%d) or tol, %s",
                100 * report.converged_share,
                self.settings.scheme,
                report.worst_residual,
                self.settings.max_iter,
                "or the gain" if self.settings.is_equilibrium else "or take more and smaller steps",
            )

    def solve(self, calls: list[Call], current: _Pass, what: str) -> Tensor:
        """Pass some layers.

        Args:
            calls: theirs, in order; the first one's state is where the solve starts.
            current: the pass, which is told how it went.
            what: is solved, for an error.

        Raises:
            ArithmeticError: the solve failed.
            OptionError: an option does not suit this pass.
        """
        for call in calls:
            call.refuse_arguments()
        method = self._equilibrium if self.settings.is_equilibrium else self._trajectory
        return method(calls, self._with_shared_noise(calls), current, what)

    def _with_shared_noise(self, calls: list[Call]) -> Callable[..., Tensor]:
        """The layers as a function that gives the same bits for the same call."""
        noisy = any(call.layer.training for call in calls) and not self.evaluates_once
        replayed = ReplayedGenerator(calls[0].state.device) if noisy else contextlib.nullcontext()

        def layers(z: Tensor, around_first: Callable | None = None) -> Tensor:
            with replayed:
                return chained(calls, around_first)(z)

        return layers

    def _trajectory(self, calls: list[Call], layers: Callable[..., Tensor], current: _Pass, what: str) -> Tensor:
        x, layout, report, span = calls[0].state, current.layout, current.report, self.settings.span
        solver = self.settings.trajectory
        if any(call.checkpointed for call in calls):
            if solver.implicit:
                layers = self._recomputed(layers)
            elif not solver.gradient.recomputes:
                solver = replace(solver, gradient=CheckpointStep())
        plain = solver.plain_layers(span)
        if plain:
            # Only the layer's own map, not z + f(z), is the plain model to the last bit.
            layer = solver.around_layer(lambda t, z: layers(z))
            current.states = [x]
            for _ in range(plain):
                current.states.append(layer(0.0, current.states[-1]))
            report.add(plain, len(calls))
            return current.states[-1]

        def f(t: Time, z: Tensor) -> Tensor:
            return layout.keep(layers(z).to(z.dtype) - z)

        records: list[AdjointRecord] = []
        options: dict[str, Any] = {"records": records} if solver.implicit else {"dtype": x.dtype}
        if current.wants_states and solver.keeps:
            options["keep"] = Keep(states=True)
        result = solver.solve(f, solver.state(x), span, layout, **options)
        refuse_failure(result.status, what)
        if solver.adaptive:
            self.budget_alarm.hear(result.status, solver.max_evaluations)
            report.stopped.append(result.status is Status.BUDGET_SPENT)
        report.add(result.evaluations, len(calls), result.residual, result.converged, result.status, records)
        current.states = [state.to(x.dtype) for state in result.states or (x, result.state)]
        return current.states[-1]

    def _equilibrium(self, calls: list[Call], layers: Callable[..., Tensor], current: _Pass, what: str) -> Tensor:
        x, layout, settings = calls[0].state, current.layout, self.settings
        injected = settings.gain * functional.layer_norm(x, x.shape[-1:])
        norm = self.architecture.first_norm

        def post_norm(z: Tensor) -> Tensor:
            return layout.keep(layers(z, lambda: _added_before(calls[0].layer.get_submodule(norm), injected)))

        def pre_norm(z: Tensor) -> Tensor:
            return layout.keep(functional.layer_norm(layers(z + injected), x.shape[-1:]))

        cell: Callable[[Tensor], Tensor] = post_norm if norm else pre_norm
        if any(call.checkpointed for call in calls):
            cell = self._recomputed(cell)
        record = AdjointRecord()
        found = settings.equation_gradient.equilibrium(cell, x, settings.fixed_point, layout, record)
        result = found.solve
        refuse_failure(result.status, what)
        current.report.add(result.evaluations, len(calls), result.residual, result.converged, result.status, [record])
        current.states = [x, found.state.to(x.dtype)]
        return current.states[-1]

    def _recomputed(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        gradient = self.settings.equation_gradient
        if not gradient.recomputable:
            raise OptionError(
                "gradient",
                f"{gradient.name} differentiates one evaluation many times, which gradient checkpointing would repeat; "
                "its memory does not grow with the budget anyway: gradient_checkpointing_disable(), or phantom-K.",
            )
        return recomputed(function)


@contextlib.contextmanager
def _added_before(norm: nn.Module, injected: Tensor) -> Iterator[None]:
    """``norm`` reads its input plus ``injected``."""
    handle = norm.register_forward_pre_hook(lambda module, args: (args[0] + injected, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Report:
    """What the solves of one pass cost; nothing of it has been read back from the device before it is asked for."""

    evaluations: list[int | Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    converged: list[Tensor] = field(default_factory=list)
    records: list[AdjointRecord] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    unfinished: bool = False

    def add(
        self,
        evaluations: int | Tensor,
        layers: int,
        residual: Tensor | None = None,
        converged: Tensor | None = None,
        status: Status = Status.COMPLETED,
        records: list[AdjointRecord] | None = None,
    ) -> None:
        """A solve of a field of so many ``layers``."""
        self.evaluations.append(evaluations)
        self.layers.append(layers)
        self.records.extend(records or ())
        self.unfinished = self.unfinished or status in (Status.BUDGET_SPENT, Status.STAGNATED)
        if residual is not None and converged is not None:
            self.residuals.append(residual.detach())
            self.converged.append(converged)

    @property
    def worst_residual(self) -> float:
        """The largest mean over the samples of a solve."""
        return float(torch.stack([residual.float().mean() for residual in self.residuals]).max())

    @property
    def converged_share(self) -> float:
        return float(torch.stack([converged.float().mean() for converged in self.converged]).mean())

    def statistics(self) -> dict[str, float]:
        means = [_mean(each) for each in self.evaluations]
        found = {
            "evaluations": sum(means),
            "layer_evaluations": sum(mean * layers for mean, layers in zip(means, self.layers, strict=True)),
        }
        if self.residuals:
            found["residual"], found["converged_share"] = self.worst_residual, self.converged_share
            found["evaluations_backward"] = sum(_mean(record.evaluations) for record in self.records)
            found["adjoint_fallbacks"] = sum(_mean(record.fallbacks) for record in self.records)
        if self.stopped:
            found["stopped"] = sum(self.stopped) / len(self.stopped)
        return found


def _mean(counts: float | Tensor) -> float:
    return float(torch.as_tensor(counts, dtype=torch.float64).mean())


class _Pass:
    """One forward pass of an encoder, see :class:`fairseq_implicit.huggingface.solved_layer.Pass`.

    Attributes:
        module: the encoder.
        layout: of the batch.
        wants_states: whether the states along a solve of the stack are asked for.
        outer: the pass within which this one runs.
        states: those along the last solve, the first one included.
    """

    def __init__(self, depth: SolvedDepth, module: nn.Module, layout: Layout, wants_states: bool, outer: Pass | None):
        self.depth, self.module, self.layout = depth, module, layout
        self.wants_states, self.outer = wants_states, outer
        self.report = Report()
        self.count = 0
        self.calls: list[Call] = []
        self.states: list[Tensor] = []

    def receive(self, call: Call) -> Any:
        self.count += 1
        if self.depth.settings.whole_stack:
            return self._of_stack(call)
        if self.depth.evaluates_once and not self.depth.settings.gradient and not call.checkpointed:
            self.report.add(1, 1)
            return call.evaluate(call.state)  # with whatever else it returns
        state = self.depth.solve([call], self, f"layer {self.count - 1}")
        return call.shaped(state)

    def _of_stack(self, call: Call) -> Any:
        """Calls are collected while the state goes through them unchanged; the last one returns that of the solve."""
        self.calls.append(call)
        if call.state is not self.calls[0].state:
            raise OptionError(
                "over",
                f"{type(self.module).__name__} does something of its own between its layers, so they are no single "
                "field: take over='layer'.",
            )
        last = self.count == self.depth.calls
        return call.shaped(self.depth.solve(self.calls, self, "the stack") if last else call.state)
