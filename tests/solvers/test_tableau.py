"""Every tableau has the order it claims and no more: exact conditions of all rooted trees, no floating point."""

import dataclasses
import math
from fractions import Fraction
from functools import cache

import pytest

from fairseq_implicit.solvers.tableau import RK4, TABLEAUS, TSIT5, Tableau, get_tableau

ALL = list(TABLEAUS.values())
# A tree is the sorted tuple of its root's subtrees. Numbers of rooted trees with 1, 2, … nodes: OEIS A000081.
TREES_PER_ORDER = (1, 1, 2, 4, 9, 20)


@cache
def trees(order):
    """All rooted trees with ``order`` nodes."""

    def forests(nodes, largest):
        if nodes == 0:
            yield ()
        for size in range(min(nodes, largest[0]), 0, -1):
            for index, tree in enumerate(trees(size)):
                if (size, index) <= largest:
                    for rest in forests(nodes - size, (size, index)):
                        yield (tree,) + rest

    return tuple(forests(order - 1, (order, math.inf)))


def nodes(tree):
    return 1 + sum(nodes(child) for child in tree)


def density(tree):
    return nodes(tree) * math.prod(density(child) for child in tree)


def residual(tableau, weights, tree):
    """Left side minus right side of the tree's order condition (Hairer, Nørsett, Wanner, II.2, theorem 2.13)."""

    def at_stages(subtree):
        inner = [at_stages(child) for child in subtree]
        return [
            math.prod((sum(a * phi[j] for j, a in enumerate(row)) for phi in inner), start=Fraction(1))
            for row in tableau.a
        ]

    return sum(b * phi for b, phi in zip(weights, at_stages(tree), strict=True)) - Fraction(1, density(tree))


def largest_residual(tableau, weights, order):
    return max(abs(residual(tableau, weights, tree)) for tree in trees(order))


def has_order(tableau, weights, order):
    tolerance = 1e-13 if tableau is TSIT5 else 0
    return all(largest_residual(tableau, weights, p) <= tolerance for p in range(1, order + 1))


def test_the_trees_are_all_there():
    assert tuple(len(trees(order)) for order in range(1, 7)) == TREES_PER_ORDER


@pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
def test_order_is_exactly_the_claimed_one(tableau):
    assert has_order(tableau, tableau.b, tableau.order)
    assert largest_residual(tableau, tableau.b, tableau.order + 1) > 1e-5


@pytest.mark.parametrize("tableau", [t for t in ALL if t.b_hat], ids=lambda tableau: tableau.name)
def test_embedded_order_is_exactly_the_claimed_one(tableau):
    assert has_order(tableau, tableau.b_hat, tableau.embedded_order)
    assert largest_residual(tableau, tableau.b_hat, tableau.embedded_order + 1) > 1e-5


def test_all_schemes_of_the_specification_are_there():
    expected = "euler midpoint heun2 ralston2 kutta3 heun3 ralston3 ssprk3 bosh3 rk4 rk4_38 dopri5 tsit5"
    assert list(TABLEAUS) == expected.split()
    assert [get_tableau(alias).name for alias in ("rk1", "rk2", "rk3")] == ["euler", "heun2", "kutta3"]


@pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
def test_derived_numbers(tableau):
    assert tableau.first_same_as_last == (tableau.name in ("bosh3", "dopri5", "tsit5"))
    # Only the last stage of an FSAL scheme serves nobody but its embedded weights.
    assert tableau.evaluations == tableau.stages - tableau.first_same_as_last
    assert tableau.c_values == pytest.approx([math.fsum(map(float, row)) for row in tableau.a], abs=1e-15)
    assert all(isinstance(value, float) for value in tableau.b_values + tableau.c_values)


def permuted(row, i, j):
    row = list(row)
    row[i], row[j] = row[j], row[i]
    return tuple(row)


@pytest.mark.parametrize("tableau", [t for t in ALL if t.stages > 1], ids=lambda tableau: tableau.name)
def test_swapping_any_two_different_weights_is_noticed(tableau):
    for i in range(tableau.stages):
        for j in range(i):
            if tableau.b[i] != tableau.b[j]:
                mutant = dataclasses.replace(tableau, b=permuted(tableau.b, i, j))
                assert not has_order(mutant, mutant.b, tableau.order)


@pytest.mark.parametrize("tableau", [t for t in ALL if t.stages > 1], ids=lambda tableau: tableau.name)
def test_shifting_any_node_is_noticed(tableau):
    """A node that moves (the defect of a published rk4) is a row of a that moves: the order falls or, in the row that
    only the embedded weights see, the embedded order does."""
    for i in range(1, tableau.stages):
        row = tableau.a[i][:-1] + (tableau.a[i][-1] + Fraction(1, 7),)
        mutant = dataclasses.replace(tableau, a=tableau.a[:i] + (row,) + tableau.a[i + 1 :])
        holds = has_order(mutant, mutant.b, tableau.order)
        if tableau.embedded_order:
            holds = holds and has_order(mutant, mutant.b_hat, tableau.embedded_order)
        assert not holds


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"b": RK4.b[:3]}, "4 rows of a for 3 weights b"),
        ({"b": (Fraction(1, 6),) * 4}, "weights b sum to 2/3, not to 1"),
        ({"a": ((), (), (), ())}, "row 1 of a has 0 entries"),
        ({"a": RK4.a[:3] + (RK4.a[3] + (Fraction(1),),)}, "row 3 of a has 4 entries"),
        ({"order": 0}, "order 0 must be at least 1"),
        ({"b_hat": RK4.b}, "given together or not at all"),
        ({"embedded_order": 2}, "given together or not at all"),
        ({"b_hat": RK4.b[:3], "embedded_order": 2}, "3 weights b_hat for 4 stages"),
        ({"b_hat": (Fraction(1),) * 4, "embedded_order": 2}, "weights b_hat sum to 4, not to 1"),
    ],
)
def test_a_wrong_tableau_cannot_be_built(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(RK4, **changes)


def test_decimals_off_in_the_twelfth_digit_are_refused():
    with pytest.raises(ValueError, match="tableau almost"):
        Tableau(name="almost", a=((), (1.0,)), b=(0.5, 0.5 + 1e-12), order=2)


def test_an_unknown_scheme_is_refused_with_the_list():
    with pytest.raises(ValueError, match="unknown scheme 'rk45'; the known schemes are euler, .*rk2 \\(= heun2\\)"):
        get_tableau("rk45")
