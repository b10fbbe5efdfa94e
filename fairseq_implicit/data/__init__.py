"""Datasets: sentencepiece dictionary, token blocks, masks (one line in, one batch out)."""
