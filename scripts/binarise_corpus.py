#!/usr/bin/env python3
"""Binarises text shards into fairseq data-bin folders shard0 to shardN; --help lists the options.

    python scripts/binarise_corpus.py prepared --tokenizer tokenizer/spm.model --output data-bin --workers 8 --fast
    fairseq-train "$(cat data-bin/data-bin.txt)" ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_implicit.corpora.binarise_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
