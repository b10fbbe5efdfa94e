"""From the files people have (The Pile, OSCAR, plain text) to clean, sharded text and fairseq data-bin folders.

Stands alone: nothing here imports another part of the package. Its commands are ``prepare-corpus``,
``train-tokenizer`` and ``binarise``.
"""
