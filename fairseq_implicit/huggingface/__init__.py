"""The transformers face. Needs transformers, never fairseq."""

from fairseq_implicit.huggingface.solved_depth import depth_statistics, load_solved, restore_depth, solve_depth

__all__ = ["depth_statistics", "load_solved", "restore_depth", "solve_depth"]
