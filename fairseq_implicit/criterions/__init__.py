"""fairseq criterions; importing a module registers its criterion."""

from fairseq_implicit.criterions import depth_losses, implicit_masked_lm  # noqa: F401

depth_losses.register()
