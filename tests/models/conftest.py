"""A task with a dictionary and nothing else, and models of a few thousand weights."""

import types

import pytest
import torch
from fairseq.data import Dictionary


@pytest.fixture
def task():
    dictionary = Dictionary()
    for index in range(40):
        dictionary.add_symbol(f"piece{index}")
    dictionary.add_symbol("<mask>")
    return types.SimpleNamespace(source_dictionary=dictionary, max_positions=lambda: 24)


@pytest.fixture
def tokens():
    """Three sequences ``(3, 12)`` of 12, 9 and 5 tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 44, (3, 12), generator=generator)
    ids[:, 0] = 0
    ids[1, 9:] = 1
    ids[2, 5:] = 1
    return ids
