"""Depth as a dial: one checkpoint under other schemes, step counts, tolerances, solvers and budgets, none of which
changes a weight. The first row is always the checkpoint as trained."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fairseq_implicit.depth.equilibrium import EquilibriumDepth
from fairseq_implicit.evaluation.checkpoints import open_checkpoint
from fairseq_implicit.evaluation.masked_lm import Averages, Blocks, averages, batches, evaluate
from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.models.presets import family_of
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.implicit import Implicit


class Setting(NamedTuple):
    """One position of the dial of an ode_bert or neural_ode_bert; ``line`` groups the settings of one curve.

    Attributes:
        line: name of the curve.
        label: what is set, in words.
        overrides: the fields of the model that say it.
    """

    line: str
    label: str
    overrides: dict[str, Any]


class Dial(NamedTuple):
    """Which positions are tried.

    Attributes:
        schemes: of fixed steps.
        steps: their numbers, per block of an ode_bert and over the depth of a neural_ode_bert.
        splits: blocks per layer of an ode_bert.
        pairs: embedded pairs of adaptive steps.
        tolerances: of those, as they were written.
    """

    schemes: Sequence[str]
    steps: Sequence[int]
    splits: Sequence[int]
    pairs: Sequence[str]
    tolerances: Sequence[str]


def family(model: str) -> str:
    """The family of a model that has a dial of schemes.

    Raises:
        ValueError: it has none.
    """
    if (found := family_of(model)) in ("neural_ode_bert", "ode_bert"):
        return found
    raise ValueError(f"the checkpoint holds {model}: the dial turns ode_bert and neural_ode_bert only")


def settings(trained: dict[str, Any], dial: Dial) -> list[Setting]:
    """All positions, that of the training first.

    Args:
        trained: the settings of the checkpoint's model.

    Raises:
        ValueError: a model without a dial.
    """
    stack = family(trained["_name"]) == "ode_bert"
    # Whatever concerned training alone, or an adaptive solve alone, must not stand in the way of the others.
    if stack:
        plain = dict(
            ode_gradient="autograd", ode_random_steps=None, ode_random_depth=None, ode_random_depth_max=None,
            ode_random_depth_gradient=OdeBertConfig.ode_random_depth_gradient, ode_tolerance=0.0,
            enc_calculate_num=None,
        )  # fmt: skip
    else:
        plain = dict(
            ode_gradient="autograd", ode_backend="own", ode_random_steps=None, ode_kinetic_energy=0.0, ode_jacobian=0.0,
            ode_local_error=0.0, ode_step_control="auto",
        )  # fmt: skip
    gradient = "reversible" if trained.get("ode_gradient") == "reversible" else "autograd"
    as_trained = {**plain, "ode_gradient": gradient, "ode_tolerance": trained.get("ode_tolerance", 0.0)}
    as_trained.pop("enc_calculate_num", None)
    found = [Setting("as trained", "as trained", as_trained)]
    for scheme in dial.schemes:
        for split in dial.splits if stack else [None]:
            name = scheme if split in (None, trained.get("ode_split", 1)) else f"{scheme}, layers cut in {split}"
            for steps in dial.steps:
                overrides = {**plain, "ode_scheme": scheme, "ode_steps": steps, "ode_tolerance": 0.0}
                if split is not None:
                    overrides["ode_split"] = split
                found.append(Setting(name, f"{name}, {steps} step{'s' * (steps != 1)}", overrides))
    for pair in dial.pairs:
        for tolerance in dial.tolerances:
            overrides = {**plain, "ode_scheme": pair, "ode_tolerance": float(tolerance)}
            found.append(Setting(f"{pair}, adaptive", f"{pair}, tolerance {tolerance}", overrides))
    return found


def depth_rows(path: str, blocks: Blocks, positions: Sequence[Setting]) -> Iterator[tuple[Setting, Averages]]:
    """What a checkpoint reaches at each position, one after the other.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or data.
    """
    for setting in positions:
        yield setting, evaluate(path, blocks, **setting.overrides)


def budget_rows(
    path: str, blocks: Blocks, solvers: Sequence[FixedPointConfig]
) -> Iterator[tuple[FixedPointConfig | None, int, Averages]]:
    """What a deq_bert reaches under each solver: the solver (None as trained), its budget and the averages.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a deq_bert, or an impossible tolerance.
    """
    for solver in solvers:
        solver.tolerance_for(torch.float32)
    opened = open_checkpoint(path, blocks.data, blocks.device)
    depth = opened.model.encoder.depth
    if not isinstance(depth, EquilibriumDepth):
        raise ValueError(f"the checkpoint holds {opened.cfg.model._name}, which has no equilibrium: take depth-sweep")
    samples = batches(opened.task, blocks)
    trained = depth.config
    yield None, trained.solver.max_iter, averages(opened, samples, blocks.device)
    # An unrolled model is read at its equilibrium here.
    gradient = trained.gradient if trained.gradient.uses_solver else Implicit(adjoint=trained.gradient.adjoint)
    for solver in solvers:
        depth.config = dataclasses.replace(trained, gradient=gradient, evaluation=solver)
        yield solver, solver.max_iter, averages(opened, samples, blocks.device)
