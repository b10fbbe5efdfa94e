"""Optimisers and learning-rate schedules. Importing this package registers them, and with them the rest."""

import fairseq_implicit
from fairseq_implicit.optim import fused_adam, stable_adam, wsd  # noqa: F401

fairseq_implicit.register()
