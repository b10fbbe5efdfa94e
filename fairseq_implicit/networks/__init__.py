"""What a BERT is around its depth. Pure torch: no fairseq, no transformers."""
