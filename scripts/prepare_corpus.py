#!/usr/bin/env python3
"""Cleans The Pile, OSCAR or plain text and writes numbered text shards; --help lists the options.

    python scripts/prepare_corpus.py pile/train --valid-input pile/val.jsonl.zst --output prepared --workers 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_implicit.corpora.prepare_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
