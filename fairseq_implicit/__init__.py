"""BERT whose depth is a solver.

Where fairseq is already loaded, as it is whenever it imports this package for ``--user-dir``, importing it registers
models, task, criterions, optimisers and a tokenizer; elsewhere it does nothing, so that the parts below work where
there is no fairseq. Importing ``fairseq_implicit.models``, ``.tasks``, ``.criterions`` or ``.optim`` registers all of
them in any order.
"""

import sys


def register() -> None:
    """Registers the parts that fairseq calls by name and closes fairseq's gaps; again, it changes nothing."""
    from fairseq_implicit import compat

    compat.register()

    from fairseq_implicit import criterions, models, optim, tasks  # noqa: F401  (they register themselves on import)
    from fairseq_implicit.data import hf_tokenizer  # noqa: F401


if sys.modules.get("fairseq") is not None:
    register()
