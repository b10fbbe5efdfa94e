"""fairseq tasks; importing a module registers its task."""

from fairseq_implicit.tasks import implicit_masked_lm  # noqa: F401
