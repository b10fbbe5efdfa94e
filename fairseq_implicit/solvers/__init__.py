"""Numerical methods in plain torch: explicit schemes, fixed points, implicit steps and their gradients."""
