"""Datasets: fairseq's dictionary over a vocabulary, token blocks, masks (one line in, one batch out)."""
