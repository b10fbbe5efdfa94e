"""Joins fields and solvers into an encoder: a stack of blocks, a continuum, or an equilibrium."""
