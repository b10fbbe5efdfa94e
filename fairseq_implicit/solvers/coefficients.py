"""Combination coefficients: with which weights a block adds up the increments of its stages.

    y' = y + h Σ_i w_i F_i            or, with stage norms (PCformer),   y' = LN_r(y) + h Σ_i w_i LN_i(F_i)

=============== ======================================================== ============================================
mode            weights                                                  start
=============== ======================================================== ============================================
fixed           the tableau's b                                          –
learned         free scalars                                             b, or ones (ODE Transformer's "γ = 1")
softmax         softmax(a): they sum to 1, so the step stays consistent  log b
gated           two stages: g and 1 − g, g = σ(W[F_1; F_2] + β) of each  W xavier, β so that a zero increment gives b
                token; more stages: softmax of such a gate
ema             α (1 − α)^(n − i), α = σ(a)                              α = 1/2
ema-normalised  the same divided by their sum 1 − (1 − α)^n              α = 1/2
=============== ======================================================== ============================================

Sources: arXiv 2203.09176 (ODE Transformer), 2411.03042 (PCformer).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.module_list import ModuleList
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.tableau import Tableau

MODES = ("fixed", "learned", "softmax", "gated", "ema", "ema-normalised")
STARTS = ("tableau", "ones")
SCOPES = ("block", "model", "channel")

# A float, a 0-dim tensor, a (dim,) tensor (scope channel) or a (batch, time, 1) tensor (gated).
Weight = float | Tensor

# A stage whose tableau weight is 0 starts with this share in the softmax and gated modes: log 0 has no gradient.
SMALLEST_START = 0.01


def _full_precision(parameter: Tensor) -> Tensor:
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter


def _positive_start(tableau: Tableau, mode: str) -> tuple[float, ...]:
    """The tableau's b as positive shares of 1."""
    if min(tableau.b_values) < 0:
        raise OptionError(
            "coefficients",
            f"{mode!r} has positive weights only, but scheme {tableau.name!r} has a negative one; use fixed, learned "
            "or ema, or a scheme with positive weights.",
        )
    floored = [max(weight, SMALLEST_START) for weight in tableau.b_values]
    return tuple(weight / sum(floored) for weight in floored)


class StageWeights(nn.Module):
    """What learned weights have in common: called with the increments of the stages, they give one weight for each."""

    def at_rest(self) -> tuple[Weight, ...]:
        """The weights of a block whose increments are zero."""
        return self(())

    def statistics(self, weights: Sequence[Weight], layout: Layout) -> dict[str, float | Tensor]:
        """Scalars, other than those that all weights have."""
        return {}


class LearnedWeights(StageWeights):
    """One free number per stage, or per stage and channel.

    Args:
        tableau: the scheme.
        start: ``"tableau"`` (its b) or ``"ones"``; two stages of Heun with ones are two weight-tied Euler steps.
        channels: width for one weight per channel, ``None`` for scalars.
    """

    def __init__(self, tableau: Tableau, start: str = "tableau", channels: int | None = None):
        super().__init__()
        values = torch.tensor(tableau.b_values if start == "tableau" else (1.0,) * tableau.stages)
        self.values = nn.Parameter(values if channels is None else values.unsqueeze(1).repeat(1, channels))

    def forward(self, stages: Sequence[Tensor]) -> tuple[Weight, ...]:
        return tuple(_full_precision(self.values).unbind(0))


class SoftmaxWeights(StageWeights):
    """Weights that sum to 1: order 1 is kept whatever is learned."""

    def __init__(self, tableau: Tableau, channels: int | None = None):
        super().__init__()
        logits = torch.tensor(_positive_start(tableau, "softmax")).log()
        self.logits = nn.Parameter(logits if channels is None else logits.unsqueeze(1).repeat(1, channels))

    def forward(self, stages: Sequence[Tensor]) -> tuple[Weight, ...]:
        return tuple(_full_precision(self.logits).softmax(0).unbind(0))


class GatedWeights(StageWeights):
    """Weights of each token, read from its increments.

    Parameters are bare tensors, not an ``nn.Linear``: a model-wide initialisation of linear layers would overwrite the
    bias that starts the gate at the tableau's b.
    """

    def __init__(self, tableau: Tableau, dim: int):
        super().__init__()
        start = _positive_start(tableau, "gated")
        logits = [math.log(start[0] / start[1])] if tableau.stages == 2 else [math.log(share) for share in start]
        self.weight = nn.Parameter(torch.empty(len(logits), tableau.stages * dim))
        self.bias = nn.Parameter(torch.tensor(logits))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Weight, ...]:
        # One product per stage: the concatenation [F_1; …; F_n] would copy every increment once more.
        dim = stages[0].shape[-1]
        products = [F.linear(stage, self.weight[:, i * dim : (i + 1) * dim]) for i, stage in enumerate(stages)]
        logits = sum((_full_precision(product) for product in products), _full_precision(self.bias))
        return self._shares(logits)

    def at_rest(self) -> tuple[Weight, ...]:
        """The weights of a token whose increments are zero, each ``(1, 1, 1)``."""
        return self._shares(_full_precision(self.bias).view(1, 1, -1))

    def statistics(self, weights: Sequence[Weight], layout: Layout) -> dict[str, float | Tensor]:
        gates = [torch.as_tensor(weight) for weight in weights]
        entropy = -sum(gate * gate.clamp_min(torch.finfo(gate.dtype).tiny).log() for gate in gates)
        return {"gate_mean": _mean(gates[0], layout), "gate_entropy": _mean(entropy, layout)}

    def _shares(self, logits: Tensor) -> tuple[Tensor, ...]:
        if logits.shape[-1] == 1:
            gate = torch.sigmoid(logits)
            return gate, 1 - gate
        return tuple(logits.softmax(-1).split(1, dim=-1))


class EmaWeights(StageWeights):
    """Exponential moving average: later stages weigh more.

    The raw weights sum to 1 − (1 − α)^n, so a step of a raw block is shorter than h; the normalised ones sum to 1.
    """

    def __init__(self, tableau: Tableau, normalised: bool = False, channels: int | None = None):
        super().__init__()
        self.stages = tableau.stages
        self.normalised = normalised
        self.logit = nn.Parameter(torch.zeros(()) if channels is None else torch.zeros(channels))

    @property
    def alpha(self) -> Tensor:
        return torch.sigmoid(_full_precision(self.logit))

    def forward(self, stages: Sequence[Tensor]) -> tuple[Weight, ...]:
        alpha = self.alpha
        share = alpha / (1 - (1 - alpha) ** self.stages) if self.normalised else alpha
        return tuple(share * (1 - alpha) ** (self.stages - 1 - i) for i in range(self.stages))

    def statistics(self, weights: Sequence[Weight], layout: Layout) -> dict[str, float | Tensor]:
        return {"alpha": self.alpha.mean()}


class StageNorms(nn.Module):
    """PCformer's norms: one of the state, one of each stage's increment."""

    def __init__(self, stages: int, dim: int, norm: Callable[[int], nn.LayerNorm]):
        super().__init__()
        self.state = norm(dim)
        self.increments = ModuleList(norm(dim) for _ in range(stages))


def normalise(norm: nn.LayerNorm, value: Tensor) -> Tensor:
    """Layer norm in the dtype of ``value`` ``(…, dim)``, which may be wider than that of the norm's parameters."""
    weight, bias = (None if one is None else one.to(value.dtype) for one in (norm.weight, norm.bias))
    return F.layer_norm(value, norm.normalized_shape, weight, bias, norm.eps)


class Combination(nn.Module):
    """The weights of one block's stages, and their statistics.

    Args:
        tableau: the scheme.
        mode: one of ``MODES``.
        start: where the mode ``learned`` starts, one of ``STARTS``.
        channels: width for one weight per channel in the modes learned, softmax and ema.
        dim: width of the state; needed by the mode ``gated`` and by ``stage_norms``.
        stage_norms: normalise the state and every increment (PCformer's ``rk_norm``).
        norm: makes a norm of a width.

    Raises:
        OptionError: an unknown mode or start, or a combination that has no meaning; the sentence says which.
    """

    def __init__(
        self,
        tableau: Tableau,
        mode: str = "fixed",
        start: str = "tableau",
        channels: int | None = None,
        dim: int | None = None,
        stage_norms: bool = False,
        norm: Callable[[int], nn.LayerNorm] = nn.LayerNorm,
    ):
        super().__init__()
        check_coefficients(tableau, mode, start, "block" if channels is None else "channel")
        self.tableau = tableau
        self.mode = mode
        self.weights: StageWeights | None
        if mode == "learned":
            self.weights = LearnedWeights(tableau, start, channels)
        elif mode == "softmax":
            self.weights = SoftmaxWeights(tableau, channels)
        elif mode == "gated":
            self.weights = GatedWeights(tableau, _given(dim, mode))
        elif mode in ("ema", "ema-normalised"):
            self.weights = EmaWeights(tableau, mode == "ema-normalised", channels)
        else:
            self.weights = None
        self.norms = StageNorms(tableau.stages, _given(dim, mode), norm) if stage_norms else None

    @property
    def required(self) -> tuple[bool, ...]:
        """For each stage, whether it has to be evaluated: learned weights may use a stage whose b is 0."""
        return self.tableau.required if self.weights is None else (True,) * self.tableau.stages

    def forward(self, state: Tensor, stages: Sequence[Tensor | None], h: float) -> tuple[Tensor, tuple[Weight, ...]]:
        """Add the increments ``stages`` ``(batch, time, dim)`` to ``state`` ``(batch, time, dim)``.

        Returns:
            the new state and the weights that were used.
        """
        weights = self.tableau.b_values if self.weights is None else self.weights(stages)
        if self.norms is not None:
            stages = [
                None if stage is None else normalise(norm, stage.to(state.dtype))
                for norm, stage in zip(self.norms.increments, stages, strict=True)
            ]
            state = normalise(self.norms.state, state)
        return combine(state, stages, weights, h), weights

    def at_rest(self) -> tuple[Weight, ...]:
        """The weights of a block whose increments are zero (a block that layer drop skips)."""
        return self.tableau.b_values if self.weights is None else self.weights.at_rest()

    def statistics(self, weights: tuple[Weight, ...], layout: Layout = UNPADDED) -> dict[str, float | Tensor]:
        """Detached scalars: Σw, Σwc and, where the mode has them, gate mean and entropy (nats) or α.

        ``gate_mean`` is the first stage's mean weight. Means are over real tokens.
        """
        with torch.no_grad():
            weights = tuple(weight.detach() if isinstance(weight, Tensor) else weight for weight in weights)
            found = {
                "coefficient_sum": _mean(sum(weights), layout),
                "coefficient_moment": _mean(self._moment(weights), layout),
            }
            if self.weights is not None:
                found.update(self.weights.statistics(weights, layout))
        return found

    def consistency_penalty(self, weights: tuple[Weight, ...], layout: Layout = UNPADDED) -> float | Tensor:
        """Mean of (Σw − 1)², with gradient: zero when the step has order 1."""
        return _mean((sum(weights) - 1) ** 2, layout)

    def second_order_penalty(self, weights: tuple[Weight, ...], layout: Layout = UNPADDED) -> float | Tensor:
        """Mean of (Σwc − 1/2)², with gradient: zero when a consistent step has order 2."""
        return _mean((self._moment(weights) - 0.5) ** 2, layout)

    def _moment(self, weights: tuple[Weight, ...]) -> Weight:
        return sum(weight * node for weight, node in zip(weights, self.tableau.c_values, strict=True))


def _given(dim: int | None, mode: str) -> int:
    if dim is None:
        raise OptionError("dim", f"coefficient mode {mode!r} and stage norms need the width of the state: pass dim.")
    return dim


def _mean(value: Weight, layout: Layout) -> float | Tensor:
    """Mean over channels or real tokens."""
    if not isinstance(value, Tensor):
        return value
    return value.mean() if value.dim() < 3 else layout.mean(value)


def combine(state: Tensor, stages: Sequence[Tensor | None], weights: Sequence[Weight], h: float) -> Tensor:
    """``state + h Σ w_i F_i`` in the dtype of ``state`` or wider; a stage of ``None`` has weight 0.

    Multiply and add are fused: one pass over the state per stage.
    """
    for stage, weight in zip(stages, weights, strict=True):
        if stage is None:
            continue
        if isinstance(weight, Tensor):
            state = torch.addcmul(state, stage, (h * weight).to(state.dtype))
        elif weight != 0:
            state = torch.add(state, stage, alpha=h * weight)
    return state


def check_coefficients(tableau: Tableau, mode: str, start: str, scope: str) -> None:
    """Refuse what has no meaning.

    Raises:
        OptionError: one sentence that names what is at fault and what to use.
    """
    check_choice("coefficients", mode, MODES)
    check_choice("start", start, STARTS)
    check_choice("scope", scope, SCOPES)
    if start == "ones" and mode != "learned":
        raise OptionError("start", f"ones belongs to `coefficients` learned, not to {mode!r}.")
    if scope == "channel" and mode in ("fixed", "gated"):
        raise OptionError(
            "scope", f"`coefficients` {mode!r} has no weight per channel; channel goes with learned, softmax and ema."
        )
    if scope == "model" and mode == "fixed":
        raise OptionError("scope", "`coefficients` 'fixed' has nothing to share over the model; use block.")
    if tableau.stages == 1 and mode in ("softmax", "gated", "ema-normalised"):
        raise OptionError(
            "coefficients",
            f"{mode!r} shares 1 among the stages, but scheme {tableau.name!r} has one stage only; use a scheme with "
            "two stages or more, or fixed or learned.",
        )
    if mode in ("softmax", "gated"):
        _positive_start(tableau, mode)
