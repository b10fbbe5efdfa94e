"""One field for the whole depth: a transformer whose weights depend on the time t in [0, T].

Two ways. :class:`DepthEmbeddedField` has one set of weights and lets t move the scale and shift of its norms (adaptive
layer norm, as in arXiv 2212.09748). :class:`InterpolatedField` has K sets, the knots, and weights that are piecewise
linear or constant between them (the "stacked" weights of arXiv 2002.08071): with as many knots as units of time, Euler
with unit steps is the ordinary K-layer transformer, so that such a model can start from one and be solved more finely
later.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.module_list import ModuleList
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.solver import Piece
from fairseq_implicit.solvers.vector_field import Time, VectorField

INTERPOLATIONS = ("linear", "constant")
#: Sinusoids of the depth embedding; the fastest makes this many half turns over the depth.
FREQUENCIES = 8


class DepthEmbedding(nn.Module):
    """Scales and shifts as a Fourier series of the time, with coefficients that start at zero.

    Term ``k`` is divided by ``k``: whatever the coefficients learn, the slopes of all terms are alike, and an adaptive
    solver is not forced to small steps by the fast ones. There is no hidden layer on purpose. Its units would be the
    same for every token, so Adam would move all of its outgoing weights in step and the shifts of the norms by
    hundreds of learning rates per update.

    Args:
        duration: the depth T; the terms have frequencies ``pi k / T``, k = 1 ... ``FREQUENCIES``.
        outputs: numbers per time.
    """

    def __init__(self, duration: float, outputs: int):
        super().__init__()
        self.base = math.pi / duration
        # No constant term: the norms have scales and shifts of their own.
        self.coefficients = nn.Linear(2 * FREQUENCIES, outputs, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Start autonomous: the time changes nothing."""
        nn.init.zeros_(self.coefficients.weight)

    def forward(self, t: Time, like: Tensor) -> Tensor:
        """``(1, outputs)`` for one time, a float or 0-dim tensor; ``(batch, outputs)`` for a ``(batch,)`` tensor.

        ``like`` is a tensor of the field's dtype and device (the embedding's own weight may be quantised).
        """
        # Angles in float32: half precision has no room for many turns.
        wide = torch.promote_types(like.dtype, torch.float32)
        k = torch.arange(1, FREQUENCIES + 1, device=like.device, dtype=wide)
        angles = t.to(k).reshape(-1, 1) * (self.base * k) if isinstance(t, Tensor) else (k * (self.base * t))[None]
        return self.coefficients(torch.cat([angles.sin() / k, angles.cos() / k], dim=-1).to(like.dtype))


class DepthEmbeddedField(TransformerField):
    """The transformer increment with norms that follow the time: ``LN(z) * (1 + scale(t)) + shift(t)``.

    Takes one time for all samples or a ``(batch,)`` tensor of times.

    Args:
        config: the transformer field; of kind ``pre-norm`` or ``parallel``.
        duration: the depth T that the embedding resolves.

    Raises:
        OptionError: another kind of field.
    """

    def __init__(self, config: TransformerFieldConfig, duration: float):
        if config.kind not in ("pre-norm", "parallel"):
            raise OptionError(
                "field",
                f"a depth embedding moves the norms of a pre-norm or parallel field, not of a {config.kind} one: set "
                "pre-norm, or `depth_weights` linear for the others.",
            )
        super().__init__(config)
        self.depth_embedding = DepthEmbedding(duration, config.residual.norm_count * 2 * config.dim)

    def initialise(self) -> None:
        self.depth_embedding.initialise()

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        residual, drop_path = self.residual(x, layout), self.drop_path.prepare(x)

        def f(t: Time, z: Tensor) -> Tensor:
            return layout.keep(drop_path(replace(residual, norms=self._norms_at(t, z)).increment(z)))

        return Increment(f)

    def _norms_at(self, t: Time, z: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
        # Norms keep their precision where other weights are quantised; without weights they have that of the state.
        like = z if self.attention_norm.weight is None else self.attention_norm.weight
        # (1 or batch, 1, norms * 2 * dim), split into scale and shift of each norm
        parts = self.depth_embedding(t, like).unsqueeze(1).chunk(2 * len(self.norms), dim=-1)
        return tuple(partial(_modulated, *each) for each in zip(self.norms, parts[0::2], parts[1::2], strict=True))


def _modulated(norm: nn.Module, scale: Tensor, shift: Tensor, z: Tensor) -> Tensor:
    normed = norm(z)
    return torch.addcmul(normed + shift, normed, scale)


class InterpolatedField(Field):
    """Weights that are a function of depth: ``knots`` transformer fields, each over ``T / knots`` units of time.

    At ``t = k T / knots`` the field is exactly knot ``k``; between two knots its weights are interpolated (``linear``)
    or those of the earlier one (``constant``); after the last knot they stay. Noise is drawn once, as for one layer.
    The field has a kink or a jump in time at every knot, where its increment's ``pieces`` are cut.

    In evaluation mode the increment takes a ``(batch,)`` tensor of times and evaluates the samples of each time by
    themselves. In training mode, where the noise belongs to the whole batch, all samples share one time.

    Args:
        config: of each knot, any kind.
        duration: the depth T.
        knots: number of knots, at least 1.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        OptionError: no knots or an unknown interpolation.
    """

    piecewise = True

    def __init__(self, config: TransformerFieldConfig, duration: float, knots: int, interpolation: str = "linear"):
        super().__init__()
        if knots < 1:
            raise OptionError("knots", f"weights along the depth need at least one knot, got {knots}.")
        if interpolation not in INTERPOLATIONS:
            raise OptionError(
                "depth_weights", f"{interpolation!r} is unknown: choose one of {', '.join(INTERPOLATIONS)}."
            )
        self.per_unit, self.interpolation = knots / duration, interpolation
        self.knots = ModuleList(TransformerField(config) for _ in range(knots))

    def layers(self) -> Iterator[Field]:
        return iter(self.knots)

    def operations(self, time: int) -> int:
        return self.knots[0].operations(time)  # with weights mixed of two knots

    def position(self, t: float, knot: int | None = None) -> tuple[int, float]:
        """The knot at or before ``t`` and the share of the next one, in [0, 1].

        Args:
            knot: the knot to take, at whatever side of it or of the next one ``t`` lies.
        """
        place = t * self.per_unit
        # Sums of step sizes miss a knot by rounding; there the weights must be the knot's own.
        nearest = round(place)
        place = float(nearest) if abs(place - nearest) < 1e-9 * len(self.knots) else place
        if knot is None:
            knot = min(max(math.floor(place), 0), len(self.knots) - 1)
        share = place - knot if self.interpolation == "linear" and knot < len(self.knots) - 1 else 0.0
        return knot, min(max(share, 0.0), 1.0)

    def weights(self, t: float) -> dict[str, Tensor]:
        """Name to weight of the transformer field at time ``t``, with gradient to the knots."""
        return self.weights_at(*self.position(t))

    def weights_at(self, knot: int, share: float) -> dict[str, Tensor]:
        """The same between ``knot``, at a share of 0, and the next one."""
        here: dict[str, Tensor] = dict(self.knots[knot].named_parameters())
        if share == 0.0:
            return here
        following = dict(self.knots[knot + 1].named_parameters())
        return {name: torch.lerp(weight, following[name], share) for name, weight in here.items()}

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        interpolation = _Interpolation(self, x, layout)
        return Increment(interpolation, pieces=interpolation.pieces)


class _Interpolation:
    """One solve's ``f(t, z)`` of an :class:`InterpolatedField`."""

    def __init__(self, field: InterpolatedField, x: Tensor, layout: Layout):
        self._field, self._x, self._layout = field, x, layout
        # The noise is that of the first knot, whose weights are replaced for the length of one evaluation.
        self._template = field.knots[0]
        self._evaluation = _Evaluation(self._template)
        self._prepared = self._template.prepare(x, layout)

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        return self._each_time(self._field.position, t, z)

    def pieces(self, end: float) -> tuple[Piece, ...]:
        """From knot to knot; after the last one the weights stay."""
        field = self._field
        inner = [knot / field.per_unit for knot in range(1, len(field.knots))]
        ends = [at for at in inner if at < end] + [end]
        continues = field.interpolation == "linear"
        # Each knot's weights hold on both ends of its piece: at the later one not yet its jump.
        positions = (partial(field.position, knot=knot) for knot in range(len(ends)))
        return tuple(
            Piece(partial(self._each_time, at), end, continues) for at, end in zip(positions, ends, strict=True)
        )

    def _each_time(self, position: Callable[[float], tuple[int, float]], t: Time, z: Tensor) -> Tensor:
        """The increment of each sample with the weights of its own time."""
        times = t.detach().reshape(-1).tolist() if isinstance(t, Tensor) else [t]
        if len(times) == 1:
            return self._at(position(times[0]), self._prepared, z)
        if self._field.training:
            raise OptionError(
                "step_control",
                "weights interpolated along the depth need one time for all samples in training: use batch or auto.",
            )
        rows_at: dict[tuple[int, float], list[int]] = {}
        for row, place in enumerate(map(position, times)):
            rows_at.setdefault(place, []).append(row)
        found = []
        for place, those in rows_at.items():
            rows = torch.tensor(those, device=z.device)
            prepared = self._template.prepare(self._x[rows], self._layout.rows(rows))
            found.append(self._at(place, prepared, z[rows]))
        order = torch.tensor([row for those in rows_at.values() for row in those], device=z.device)
        return torch.cat(found)[order.argsort()]

    def _at(self, place: tuple[int, float], prepared: VectorField, z: Tensor) -> Tensor:
        weights = {f"template.{name}": weight for name, weight in self._field.weights_at(*place).items()}
        return functional_call(self._evaluation, weights, (prepared, z))


class _Evaluation(nn.Module):
    """A module around the template, so that ``functional_call`` can put other weights into it."""

    def __init__(self, template: TransformerField):
        super().__init__()
        self.template = template

    def forward(self, prepared: VectorField, z: Tensor) -> Tensor:
        # With its weights given, the template is autonomous.
        return prepared(0.0, z)
