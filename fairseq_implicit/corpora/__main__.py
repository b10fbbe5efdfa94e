"""``python -m fairseq_implicit.corpora``: the same command line as ``scripts/prepare_corpus.py``."""

import sys

from fairseq_implicit.corpora.prepare_command import main

if __name__ == "__main__":
    sys.exit(main())
