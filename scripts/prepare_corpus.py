#!/usr/bin/env python3
"""Cleans The Pile, OSCAR or plain text and writes numbered text shards; --help lists the options.

python scripts/prepare_corpus.py pile/train --valid-input pile/val.jsonl.zst --output prepared --workers 8
"""

import sys

if __name__ == "__main__":
    import corpora_alone

    corpora_alone.load()
    from fairseq_implicit.corpora.prepare_command import main

    sys.exit(main())
