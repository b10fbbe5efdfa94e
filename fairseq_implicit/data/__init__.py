"""Datasets: fairseq's dictionary over a vocabulary, token blocks, objectives, batches (one line in, one batch out)."""
