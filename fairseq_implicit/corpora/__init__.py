"""From the files people have (The Pile, OSCAR, plain text) to clean, sharded text and fairseq data-bin folders.

Stands alone: nothing here imports another part of the package. The command lines are ``scripts/prepare_corpus.py``
(also ``python -m fairseq_implicit.corpora``), ``scripts/train_tokenizer.py`` and ``scripts/binarise_corpus.py``.
"""
