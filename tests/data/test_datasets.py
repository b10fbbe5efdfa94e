"""The dataset as fairseq and its data loaders use it."""

import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, data_utils

from fairseq_implicit.data import data_bin
from fairseq_implicit.data.batches import Collater
from fairseq_implicit.data.blocks import BREAK_MODES, Blocks, cut_blocks
from fairseq_implicit.data.datasets import BlockDataset, InferenceDataset
from fairseq_implicit.data.objectives.masked_tokens import MaskedTokens
from fairseq_implicit.data.objectives.objective import MaskRates
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import BOS, PAD


@pytest.fixture(scope="module")
def symbols(toy_data):
    dictionary = Dictionary.load(f"{toy_data}/dict.txt")
    dictionary.add_symbol("<mask>")
    return dictionary.symbols


def dataset(toy_data, symbols, split="train", length=32, mode="complete", pad_to_multiple=1, **options):
    files = [MappedTokens(f"{toy_data}/{split}")]
    blocks = Blocks(files, [cut_blocks(file.line_lengths, length - 1, mode) for file in files], symbols)
    objective = MaskedTokens(symbols, SentencePieceVocabulary.surface, MaskRates())
    return BlockDataset(blocks, objective, Collater(pad_to_multiple, length), **options)


@pytest.mark.parametrize("mode", BREAK_MODES)
@pytest.mark.parametrize("length", [8, 33, 512])
def test_the_text_comes_back(toy_data, symbols, mode, length):
    lines = data_utils.load_indexed_dataset(f"{toy_data}/train")
    train = dataset(toy_data, symbols, length=length, mode=mode)
    blocks = train.blocks
    found = torch.cat([torch.from_numpy(blocks[i][1:]) for i in range(len(blocks))])
    kept = [line for line in lines if mode in ("none", "complete") or len(line) > 1]
    assert torch.equal(found, torch.cat(kept))
    assert all(
        blocks[i][0] == BOS and len(blocks[i]) == train.size(i) == train.num_tokens(i) for i in range(len(blocks))
    )


def test_masks_change_by_epoch_and_stay_fixed_for_validation(toy_data, symbols):
    train, valid = dataset(toy_data, symbols), dataset(toy_data, symbols, "valid", fixed=True)
    first, held = train[3], valid[3]
    again = dataset(toy_data, symbols)[3]
    assert torch.equal(first["source"], again["source"]) and torch.equal(first["target"], again["target"])
    for each in (train, valid):
        each.set_epoch(2)
    assert not torch.equal(train[3]["target"], first["target"])
    assert torch.equal(valid[3]["source"], held["source"]) and torch.equal(valid[3]["target"], held["target"])
    assert not torch.equal(dataset(toy_data, symbols, seed=2)[3]["target"], first["target"])


def test_batch(toy_data, symbols):
    blocks = dataset(toy_data, symbols, pad_to_multiple=8)
    samples = [blocks[i] for i in (0, 1, 2)]
    batch = blocks.collater(samples)
    lengths = [len(sample["source"]) for sample in samples]
    width = min(-(-max(lengths) // 8) * 8, 32)
    net_input = batch["net_input"]
    assert net_input["src_tokens"].shape == batch["target"].shape == (3, width)
    assert net_input["src_lengths"].tolist() == lengths
    assert net_input["has_padding"] is (min(lengths) < width)
    assert (batch["nsentences"], batch["ntokens"]) == (3, sum(lengths))
    assert net_input["src_tokens"].ne(PAD).sum() == sum(lengths)
    assert torch.equal(batch["target"].flatten()[batch["predicted"]], batch["target"][batch["target"].ne(PAD)])
    full = dataset(toy_data, symbols, mode="none")
    assert full.collater([full[0], full[1]])["net_input"]["has_padding"] is False
    assert full.collater([]) == {}


def test_padding_never_exceeds_the_models_positions(toy_data, symbols):
    blocks = dataset(toy_data, symbols, length=30, mode="none", pad_to_multiple=8)
    assert blocks.collater([blocks[0]])["net_input"]["src_tokens"].shape == (1, 30)
    with pytest.raises(ValueError, match="--pad-to-multiple"):
        dataset(toy_data, symbols, pad_to_multiple=0)


def test_order_and_batching(toy_data, symbols):
    blocks = dataset(toy_data, symbols)
    order = blocks.ordered_indices()
    assert sorted(order.tolist()) == list(range(len(blocks)))
    assert (np.diff(blocks.sizes[order]) >= 0).all()
    blocks.set_epoch(2)
    assert not np.array_equal(order, blocks.ordered_indices())
    batches = blocks.batch_by_size(order, max_tokens=128)
    assert sorted(i for batch in batches for i in batch) == list(range(len(blocks)))
    assert all(len(batch) * max(blocks.size(i) for i in batch) <= 128 for batch in batches)
    assert not blocks.can_reuse_epoch_itr_across_epochs
    assert dataset(toy_data, symbols, fixed=True).can_reuse_epoch_itr_across_epochs


def test_worker_processes_see_the_same_data(toy_data, symbols):
    blocks = dataset(toy_data, symbols, "test")
    blocks.set_epoch(5)
    loader = torch.utils.data.DataLoader(blocks, batch_size=4, collate_fn=blocks.collater, num_workers=1)
    for number, batch in enumerate(loader):
        expected = blocks.collater([blocks[i] for i in range(4 * number, min(4 * number + 4, len(blocks)))])
        assert torch.equal(batch["net_input"]["src_tokens"], expected["net_input"]["src_tokens"])
        assert torch.equal(batch["target"], expected["target"])


@pytest.mark.parametrize("share_epoch", [False, True])
def test_travels_to_spawned_workers(toy_data, symbols, share_epoch):
    blocks = dataset(toy_data, symbols, "test", share_epoch=share_epoch)
    blocks.set_epoch(5)
    copy, collate = pickle.loads(ForkingPickler.dumps((blocks, blocks.collater)))  # what spawning sends
    assert torch.equal(collate([copy[1]])["target"], blocks.collater([blocks[1]])["target"])


def test_the_epoch_reaches_workers_that_stay(toy_data, symbols):
    blocks = dataset(toy_data, symbols, "test", share_epoch=True)
    loader = torch.utils.data.DataLoader(
        blocks, batch_size=64, collate_fn=blocks.collater, num_workers=1, persistent_workers=True
    )
    for epoch in (1, 2):
        blocks.set_epoch(epoch)
        batch = next(iter(loader))
        assert torch.equal(batch["target"], blocks.collater([blocks[int(i)] for i in batch["id"]])["target"])


def copied(toy_data, tmp_path):
    shutil.copytree(toy_data, tmp_path / "bin")
    return tmp_path / "bin"


def test_refuses_ids_beyond_the_dictionary(toy_data, symbols):
    small = Dictionary()
    small.add_symbol("only")
    small.add_symbol("<mask>")
    blocks = dataset(toy_data, small.symbols)
    with pytest.raises(ValueError, match="binarised with another dict.txt"):
        blocks[0]


def test_combined_files(toy_data, symbols, tmp_path):
    folder = copied(toy_data, tmp_path)
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"valid.{suffix}", folder / f"train1.{suffix}")
    files = data_bin.open_split(str(folder), "train", combine=True)
    assert [file.prefix for file in files] == [str(folder / "train"), str(folder / "train1")]
    assert len(data_bin.open_split(str(folder), "train", combine=False)) == 1
    indices = [cut_blocks(file.line_lengths, 31, "none") for file in files]
    both = Blocks(files, indices, symbols)
    alone = dataset(toy_data, symbols, "valid", mode="none").blocks
    assert len(both) == len(indices[0]) + len(alone)
    for i in range(len(alone)):
        assert np.array_equal(both[len(indices[0]) + i], alone[i])


def test_inference_dataset():
    data = InferenceDataset([torch.tensor([7, 8, 2]), torch.tensor([9, 2])])
    assert data.ordered_indices().tolist() == [1, 0]
    batch = data.collater([data[1], data[0]])
    assert batch["net_input"]["src_tokens"].tolist() == [[0, 9, 2, 1], [0, 7, 8, 2]]
    assert batch["id"].tolist() == [1, 0]
    assert batch["net_input"]["has_padding"] is True
