"""Weights and settings of public models and of other families, to and from this package's. No fairseq, no transformers.

On this side stand the names that a checkpoint of this package has (``encoder.…``, ``classification_heads.…``) and the
flags of its ``ode_bert``; ids stay those of the vocabulary that the weights came with.
"""
