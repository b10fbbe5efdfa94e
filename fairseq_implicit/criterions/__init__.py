"""fairseq criterions; importing a module registers its criterion."""

from fairseq_implicit.criterions import implicit_masked_lm  # noqa: F401
