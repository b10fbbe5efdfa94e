"""Explicit Runge–Kutta schemes as validated data.

One step of size ``h`` from ``(t, y)``:

    F_i = f(t + c_i h, y + h Σ_{j<i} a_ij F_j),      y' = y + h Σ_i b_i F_i

The coefficients are exact rationals (decimals for Tsitouras 5) and reach the solver as Python floats: they never take
the dtype of a state, so a half-precision solve cannot spoil a later one, and they never travel to a device.

References: Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, II.1–II.5; the paper of each scheme
stands at its tableau.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from fairseq_implicit.options import OptionError

Number = Fraction | float

# Rationals are compared exactly; decimals of sixteen digits and magnitude ten can be off by this much in a sum.
DECIMAL_TOLERANCE = 1e-13


def _total(numbers: tuple[Number, ...]) -> Number:
    """Sum: exact for rationals, correctly rounded as soon as one entry is a decimal."""
    if all(isinstance(number, Fraction) for number in numbers):
        return sum(numbers, Fraction(0))
    return math.fsum(float(number) for number in numbers)


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit scheme.

    The nodes ``c`` are not an argument: they are the row sums of ``a``, so they cannot contradict it.

    Attributes:
        name: the scheme's name.
        a: one row per stage; row ``i`` (from 0) has ``i`` entries, so the matrix is strictly lower triangular.
        b: weights of the step, one per stage.
        order: order of the step.
        b_hat: weights of the embedded step, if there is one.
        embedded_order: order of the embedded step.
        aliases: other names of the same scheme.
        c: nodes, derived.
        a_values, b_values, b_hat_values, c_values: the same numbers as Python floats, derived.
        required: for each stage, whether the step with weights ``b`` depends on it, derived.

    Raises:
        ValueError: shapes do not fit, ``Σb ≠ 1``, ``Σb̂ ≠ 1``, or the embedded weights and order do not come together.
    """

    name: str
    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    order: int
    b_hat: tuple[Number, ...] | None = None
    embedded_order: int | None = None
    aliases: tuple[str, ...] = ()
    c: tuple[Number, ...] = field(init=False)
    a_values: tuple[tuple[float, ...], ...] = field(init=False, repr=False)
    b_values: tuple[float, ...] = field(init=False, repr=False)
    b_hat_values: tuple[float, ...] | None = field(init=False, repr=False)
    c_values: tuple[float, ...] = field(init=False, repr=False)
    required: tuple[bool, ...] = field(init=False, repr=False)

    def __post_init__(self):
        stages = len(self.b)
        if stages == 0 or len(self.a) != stages:
            raise ValueError(f"tableau {self.name}: {len(self.a)} rows of a for {stages} weights b; one row per stage")
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise ValueError(
                    f"tableau {self.name}: row {i} of a has {len(row)} entries; an explicit scheme has exactly {i}"
                )
        if self.order < 1:
            raise ValueError(f"tableau {self.name}: order {self.order} must be at least 1")
        self._check_sum("b", self.b)
        if (self.b_hat is None) != (self.embedded_order is None):
            raise ValueError(f"tableau {self.name}: b_hat and embedded_order are given together or not at all")
        if self.b_hat is not None:
            if len(self.b_hat) != stages:
                raise ValueError(f"tableau {self.name}: {len(self.b_hat)} weights b_hat for {stages} stages")
            self._check_sum("b_hat", self.b_hat)

        def derive(name, value):
            object.__setattr__(self, name, value)  # the dataclass is frozen

        derive("c", tuple(_total(row) if row else Fraction(0) for row in self.a))
        derive("a_values", tuple(tuple(float(entry) for entry in row) for row in self.a))
        derive("b_values", tuple(float(entry) for entry in self.b))
        derive("b_hat_values", None if self.b_hat is None else tuple(float(entry) for entry in self.b_hat))
        derive("c_values", tuple(float(entry) for entry in self.c))
        derive("required", self._required_stages())

    def _check_sum(self, name: str, weights: tuple[Number, ...]) -> None:
        excess = _total(weights) - 1
        if excess != 0 if isinstance(excess, Fraction) else abs(excess) > DECIMAL_TOLERANCE:
            raise ValueError(f"tableau {self.name}: the weights {name} sum to {_total(weights)}, not to 1")

    def _required_stages(self) -> tuple[bool, ...]:
        required = [weight != 0 for weight in self.b]
        for i in reversed(range(len(self.b))):
            if required[i]:
                for j, entry in enumerate(self.a[i]):
                    required[j] = required[j] or entry != 0
        return tuple(required)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.b)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage sits at the new state (FSAL): its row of ``a`` is ``b`` and its own weight is 0."""
        return self.stages > 1 and self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    @property
    def evaluations(self) -> int:
        """Evaluations of the field in one step with the weights ``b``."""
        return sum(self.required)


def _rationals(text: str) -> tuple[Fraction, ...]:
    return tuple(Fraction(token) for token in text.split())


def _scheme(name: str, rows: tuple[str, ...], b: str, order: int, b_hat: str = "", embedded_order=None, aliases=()):
    """A tableau written as it is printed in books: rows 2…s of ``a``, then ``b``, then ``b̂``."""
    return Tableau(
        name=name,
        a=((),) + tuple(_rationals(row) for row in rows),
        b=_rationals(b),
        order=order,
        b_hat=_rationals(b_hat) if b_hat else None,
        embedded_order=embedded_order,
        aliases=aliases,
    )


EULER = _scheme("euler", (), "1", order=1, aliases=("rk1",))

MIDPOINT = _scheme("midpoint", ("1/2",), "0 1", order=2)

# Explicit trapezoid; "RK2" in the ODE Transformer papers (arXiv 2203.09176).
HEUN2 = _scheme("heun2", ("1",), "1/2 1/2", order=2, b_hat="1 0", embedded_order=1, aliases=("rk2",))

# The node is 2/3, the choice with the smallest error bound; the variant with 3/4 is often mistaken for it.
RALSTON2 = _scheme("ralston2", ("2/3",), "1/4 3/4", order=2, b_hat="1 0", embedded_order=1)

KUTTA3 = _scheme("kutta3", ("1/2", "-1 2"), "1/6 2/3 1/6", order=3, aliases=("rk3",))

HEUN3 = _scheme("heun3", ("1/3", "0 2/3"), "1/4 0 3/4", order=3)

RALSTON3 = _scheme("ralston3", ("1/2", "0 3/4"), "2/9 1/3 4/9", order=3)

# Strong stability preserving; Shu and Osher 1988.
SSPRK3 = _scheme("ssprk3", ("1", "1/4 1/4"), "1/6 1/6 2/3", order=3)

# Bogacki and Shampine 1989.
BOSH3 = _scheme(
    "bosh3",
    ("1/2", "0 3/4", "2/9 1/3 4/9"),
    "2/9 1/3 4/9 0",
    order=3,
    b_hat="7/24 1/4 1/3 1/8",
    embedded_order=2,
)

RK4 = _scheme("rk4", ("1/2", "0 1/2", "0 0 1"), "1/6 1/3 1/3 1/6", order=4)

# Kutta's 3/8 rule: some libraries call this one "rk4".
RK4_38 = _scheme("rk4_38", ("1/3", "-1/3 1", "1 -1 1"), "1/8 3/8 3/8 1/8", order=4)

# Dormand and Prince 1980, with their embedded weights.
DOPRI5 = _scheme(
    "dopri5",
    (
        "1/5",
        "3/40 9/40",
        "44/45 -56/15 32/9",
        "19372/6561 -25360/2187 64448/6561 -212/729",
        "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
        "35/384 0 500/1113 125/192 -2187/6784 11/84",
    ),
    "35/384 0 500/1113 125/192 -2187/6784 11/84 0",
    order=5,
    b_hat="5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40",
    embedded_order=4,
)

# Tsitouras 2011, "Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying assumption".
_TSIT5_LAST_ROW = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
TSIT5 = Tableau(
    name="tsit5",
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_LAST_ROW,
    ),
    b=_TSIT5_LAST_ROW + (0.0,),
    order=5,
    b_hat=(
        0.09468075576583945,
        0.009183565540343254,
        0.4877705284247616,
        1.234297566930479,
        -2.7077123499835256,
        1.866628418170587,
        0.015151515151515152,
    ),
    embedded_order=4,
)

TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN2,
        RALSTON2,
        KUTTA3,
        HEUN3,
        RALSTON3,
        SSPRK3,
        BOSH3,
        RK4,
        RK4_38,
        DOPRI5,
        TSIT5,
    )
}
_ALIASES: dict[str, str] = {alias: tableau.name for tableau in TABLEAUS.values() for alias in tableau.aliases}


def get_tableau(name: str) -> Tableau:
    """The tableau of that name or alias.

    Raises:
        OptionError: no scheme has that name; the sentence lists those that exist.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in TABLEAUS:
        known = ", ".join(list(TABLEAUS) + [f"{alias} (= {target})" for alias, target in _ALIASES.items()])
        raise OptionError("scheme", f"unknown scheme {name!r}; the known schemes are {known}.")
    return TABLEAUS[canonical]
