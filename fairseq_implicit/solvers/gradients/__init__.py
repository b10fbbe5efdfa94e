"""Gradients of solves: one class each, which knows its cost and its conditions; their names are in ``names.py``."""
