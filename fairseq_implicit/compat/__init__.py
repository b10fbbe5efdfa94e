"""Everything that knows of gaps between fairseq 0.12, torch ≥ 2.6, numpy 2 and today's launchers.

``register()`` runs once, when the package is imported, which fairseq does before it loads a checkpoint or parses the
plugin's flags: in ``fairseq-train``, in every rank, in ``fairseq-validate``, ``fairseq-preprocess``,
``fairseq-hydra-train`` and the hub. It puts wrappers around functions of fairseq, each of which calls the original and
changes nothing for models and tasks that never meet the gap.
"""

from fairseq_implicit.compat import (
    averages,
    batches,
    checkpoints,
    flags,
    loop,
    parameters,
    preprocess,
    reports,
    training,
)


def register() -> None:
    """Closes the gaps; calling it again changes nothing."""
    for module in (averages, batches, checkpoints, flags, loop, parameters, preprocess, reports, training):
        module.register()
