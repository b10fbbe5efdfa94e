"""What backward passes cost."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class AdjointRecord:
    """What the last backward pass cost. Filled when it runs; zero before.

    Attributes:
        evaluations: products with the Jacobian, per sample ``(batch,)``, or one number for all.
        residual: relative residual of the adjoint equation, ``(batch,)``; of the reversible iteration, how far the
            start that it came back to is from the true one, relative to the state, times the share of the gradient's
            norm that arrives there: an estimate of the gradient's relative error, within a factor of ten or so. Zero
            where no equation is solved.
        fallbacks: samples whose adjoint stalled and took the Neumann sum.
    """

    evaluations: float | Tensor = 0
    residual: float | Tensor = 0.0
    fallbacks: float | Tensor = 0
