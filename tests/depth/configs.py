"""Configurations of depths with their solver's options beside their own."""

import dataclasses
import inspect

from fairseq_implicit.depth.continuous import ContinuousConfig
from fairseq_implicit.depth.stack import StackConfig
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.names import CORRECTORS, continuous_solver, trajectory_gradient
from fairseq_implicit.solvers.runge_kutta import RungeKutta

_EXPLICIT = {field.name for field in dataclasses.fields(RungeKutta)}
_CONTINUOUS = set(inspect.signature(continuous_solver).parameters)


def stack_config(layers, dim, corrector="none", tolerance=0.0, gradient="autograd", **options):
    """A stack of explicit blocks, or of adaptive ones to a tolerance."""
    own = {name: options.pop(name) for name in _EXPLICIT & options.keys()}
    own |= dict(gradient=trajectory_gradient(gradient), replay_random=options.get("stage_dropout") == "independent")
    if tolerance:
        solver = Adaptive(own["scheme"], tolerance, tolerance, 500, gradient=own["gradient"])
    else:
        solver = CORRECTORS[corrector](**{"scheme": "euler", **own})
    return StackConfig(layers, dim, solver, **options)


def continuous_config(dim, duration, **options):
    """A continuous depth."""
    own = {name: options.pop(name) for name in _CONTINUOUS & options.keys()}
    solver = continuous_solver(**own, replay_random=options.get("independent_noise", False))
    return ContinuousConfig(dim, duration, solver, **options)
