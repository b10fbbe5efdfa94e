"""The transformers face: encoders of transformers under the solvers."""

from fairseq_implicit.huggingface.solved_depth import depth_statistics, load_solved, restore_depth, solve_depth

__all__ = ["depth_statistics", "load_solved", "restore_depth", "solve_depth"]
