"""The command line of the ODE-Transformer's own code."""

import pytest

from fairseq_implicit.families.original_flags import OriginalFlags, from_original_flags
from fairseq_implicit.solvers.coefficients import check_coefficients
from fairseq_implicit.solvers.tableau import get_tableau


@pytest.mark.parametrize(
    "flags, expected",
    [
        ((1,), ("euler", "fixed", "tableau", "block")),
        ((2, "standard"), ("heun2", "fixed", "tableau", "block")),
        ((3, "standard"), ("kutta3", "fixed", "tableau", "block")),
        ((4, "standard"), ("rk4", "fixed", "tableau", "block")),
        ((2, "learnable"), ("heun2", "gated", "tableau", "model")),
        ((2, "learnable", "gated"), ("heun2", "gated", "tableau", "model")),
        ((2, "initialization"), ("heun2", "learned", "ones", "model")),
        ((4, "learnable", "ema", "scalar"), ("rk4", "ema", "tableau", "model")),
        ((4, "learnable", "ema", "vector"), ("rk4", "ema", "tableau", "channel")),
    ],
)
def test_original_flags(flags, expected):
    mapped = from_original_flags(*flags)
    assert mapped == OriginalFlags(*expected)
    check_coefficients(get_tableau(mapped.scheme), *mapped[1:])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ((5,), "--enc-calculate-num 5 has no scheme"),
        ((2, "gated"), "--rk-type gated is not one of standard, learnable, initialization"),
        ((2, "learnable", "softmax"), "--enc-learnable-type softmax is not one of gated, ema"),
        ((2, "learnable", "ema", "matrix"), "--alpha-type matrix is not one of scalar, vector"),
        ((2, "standard", "gated"), "--enc-learnable-type gated contradicts --rk-type standard"),
        ((2, "learnable", "gated", "vector"), "needs --enc-learnable-type ema"),
        ((1, "learnable"), "--rk-type learnable combines several evaluations"),
        ((1, "initialization"), "--rk-type initialization combines several evaluations"),
    ],
)
def test_contradicting_original_flags_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_original_flags(*flags)
