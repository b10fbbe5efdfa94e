"""The gradients by their names.

=============  ==========================================================================================
``ift``        solves ``w = Jᵀw + g`` (J the Jacobian of f at z*, g the incoming gradient): exact
``neumann-K``  the first K terms of ``w = Σ (Jᵀ)ⁱ g``: K − 1 products on one graph
``phantom-K``  K tracked damped steps from z* (Geng et al., arXiv 2111.05177)
``jfb``        one tracked step, ``w = g`` (Fung et al., arXiv 2103.12803)
``bptt-K``     no solver: K tracked steps from the start, a weight-tied K-layer network
``reversible`` no solver: the coupled iteration of arXiv 2509.12917, inverted in the backward pass
=============  ==========================================================================================
"""

import re

from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.neumann import Neumann
from fairseq_implicit.solvers.gradients.phantom import JacobianFree, Phantom
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.gradients.unrolled import Unrolled

EQUILIBRIUM: dict[str, type[EquilibriumGradient]] = {
    gradient.kind: gradient for gradient in (Implicit, Neumann, Phantom, JacobianFree, Unrolled, ReversibleIteration)
}
SPELLINGS = ", ".join(f"{kind}-K" if gradient.counted else kind for kind, gradient in EQUILIBRIUM.items())


def parse_gradient(
    name: str, damping: float | None = None, adjoint: FixedPointConfig | None = None
) -> EquilibriumGradient:
    """``"phantom-4"`` -> ``Phantom(steps=4, ...)``.

    Args:
        name: its kind, and the number of its steps where it has one.
        damping: ``None`` for its usual one.
        adjoint: solver of the adjoint equation.

    Raises:
        OptionError: the name is unknown, its number is missing, zero or out of place, or it has nothing to damp.
    """
    match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", name)
    kind, steps = match.groups() if match else (name, None)
    gradient = EQUILIBRIUM.get(kind)
    if gradient is None:
        raise OptionError("gradient", f"{name!r} is unknown; choose one of {SPELLINGS}.")
    if gradient.counted and steps is None:
        raise OptionError("gradient", f"{name!r} needs its number of steps, such as {kind}-4.")
    if not gradient.counted and steps is not None:
        raise OptionError("gradient", f"{name!r}: {kind} takes no number of steps; write {kind}.")
    if damping is not None and not gradient.damped:
        raise OptionError("gradient_damping", f"{name} has nothing to damp; drop one of the two.")
    return gradient(
        1 if steps is None else int(steps),
        gradient.usual_damping if damping is None else damping,
        FixedPointConfig() if adjoint is None else adjoint,
    )
