"""Makes `fairseq_implicit.corpora` importable without the package around it.

Importing `fairseq_implicit` registers models and tasks, which loads torch and fairseq: seconds and hundreds of
megabytes per process that preparing text does not need, on machines that may not have them. The corpus tools call
this first when they run as programs; imported as modules they use the package as it is.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load() -> None:
    """Puts an empty package `fairseq_implicit` with the right path into `sys.modules`, unless it is there."""
    if "fairseq_implicit" not in sys.modules:
        package = types.ModuleType("fairseq_implicit")
        package.__path__ = [str(ROOT / "fairseq_implicit")]
        sys.modules["fairseq_implicit"] = package


if __name__ == "__main__":
    sys.exit("corpora_alone is a part of prepare_corpus.py, train_tokenizer.py and binarise_corpus.py: run one of them")
