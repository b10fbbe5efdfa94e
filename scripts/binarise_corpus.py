#!/usr/bin/env python3
"""Binarises text shards into fairseq data-bin folders shard0 to shardN; --help lists the options.

python scripts/binarise_corpus.py prepared --tokenizer tokenizer/spm.model --output data-bin --workers 8 --fast
fairseq-train "$(cat data-bin/data-bin.txt)" ...
"""

import sys

if __name__ == "__main__":
    import corpora_alone

    corpora_alone.load()
    from fairseq_implicit.corpora.binarise_command import main

    sys.exit(main())
