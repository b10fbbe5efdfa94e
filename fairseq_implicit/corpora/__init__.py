"""From the files people have (The Pile, OSCAR, plain text) to clean, sharded text and fairseq data-bin folders.

Nothing here imports torch or fairseq. The command lines are ``scripts/prepare_corpus.py``
(also ``python -m fairseq_implicit.corpora``), ``scripts/train_tokenizer.py`` and ``scripts/binarise_corpus.py``.
"""
