"""BERT whose depth is a solver: importing the package registers models, task and criterions with fairseq."""

from fairseq_implicit import compat

compat.register()

from fairseq_implicit import criterions, models, tasks  # noqa: E402  (they register themselves on import)

__all__ = ["compat", "criterions", "models", "tasks"]
