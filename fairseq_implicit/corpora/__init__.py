"""From the files people have (The Pile, OSCAR, plain text) to clean, sharded text and fairseq data-bin folders.

Nothing here imports torch or fairseq. Its commands are ``prepare-corpus``, ``text-corpus``, ``train-tokenizer`` and
``binarise``.
"""
