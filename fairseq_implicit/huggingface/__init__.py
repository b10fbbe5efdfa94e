"""The transformers face of the models. Needs transformers, never fairseq."""
