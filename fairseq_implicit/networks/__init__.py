"""Whole networks: embeddings, a depth and heads. Pure torch; fairseq and others wrap them."""
