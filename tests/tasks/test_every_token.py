"""Every token of every split reaches the model in every epoch: counted behind fairseq's iterator, workers and ranks."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion
from fairseq_implicit.data.blocks import BREAK_MODES
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask

LENGTH = 16  # tokens in a block, with its <s>
PAD, EOS = 1, 2


def write_split(prefix, lines):
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for line in lines:
        builder.add_item(torch.tensor([*line, EOS]))
    builder.finalize(f"{prefix}.idx")


def text(blocks: int, seed: int):
    """Lines of ids that fill about so many blocks; some are blank, some longer than a block."""
    rng = np.random.default_rng(seed)
    left = blocks * (LENGTH - 1)
    while left > 0:
        length = min(left - 1, int(rng.choice([0, 2, 3, 5, 9, 20])))
        yield rng.integers(10, 60, length)
        left -= length + 1


@pytest.fixture(scope="module", params=[3, 1000])
def folder(request, toy_data, tmp_path_factory):
    """A data folder whose train and valid have that many blocks."""
    folder = tmp_path_factory.mktemp(f"blocks{request.param}")
    shutil.copy(f"{toy_data}/dict.txt", folder)
    for seed, split in enumerate(("train", "valid")):
        write_split(folder / split, text(request.param, seed))
    return SimpleNamespace(path=str(folder), blocks=request.param)


def task_on(folder, mode, **settings):
    cfg = ImplicitMaskedLMConfig(data=folder.path, tokens_per_sample=LENGTH, sample_break_mode=mode, **settings)
    cfg.seed = 1
    return ImplicitMaskedLMTask.setup_task(cfg)


def expected(task, split):
    """Tokens of the file without the marks between documents, where the mode drops those, and one <s> a block."""
    dataset = task.dataset(split)
    lengths = np.concatenate([file.line_lengths for file in dataset.blocks.files])
    separators = int((lengths == 1).sum()) if task.cfg.sample_break_mode in ("complete_doc", "eos") else 0
    return int(lengths.sum()) - separators + len(dataset)


def through_iterators(task, split, ranks, epochs=(1,), **batching):
    """Numbers of tokens in all batches of all ranks, for each epoch."""
    counts = []
    for epoch in epochs:
        count = 0
        for rank in range(ranks):
            iterator = task.get_batch_iterator(
                task.dataset(split), num_shards=ranks, shard_id=rank, required_batch_size_multiple=8, epoch=epoch,
                max_positions=LENGTH, disable_iterator_cache=True, **batching,
            )  # fmt: skip
            for batch in iterator.next_epoch_itr(shuffle=split == "train"):
                count += int(batch["net_input"]["src_tokens"].ne(PAD).sum()) if batch else 0
        counts.append(count)
    return counts


@pytest.mark.parametrize("mode", BREAK_MODES)
def test_every_batch_size(folder, mode):
    """Each size with one or two ranks; ``EXHAUSTIVE=1 bash scripts/test.sh …`` with both, and with workers too."""
    task = task_on(folder, mode)
    exhaustive = "EXHAUSTIVE" in os.environ
    for split in ("train", "valid"):
        task.load_dataset(split)
        for size in range(1, 11):
            batching = dict(max_sentences=size) if size < 10 else dict(max_tokens=100)
            for ranks in (1, 2) if exhaustive else (1 + size % 2,):
                for workers in (0, 2) if exhaustive else (0,):
                    found = through_iterators(task, split, ranks, num_workers=workers, **batching)
                    assert found == [expected(task, split)], (split, batching, ranks, workers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_worker_processes_and_epochs(folder, ranks):
    task = task_on(folder, "complete")
    task.load_dataset("train")
    counts = through_iterators(task, "train", ranks, epochs=(1, 2), max_sentences=45, num_workers=2, data_buffer_size=3)
    assert counts == [expected(task, "train")] * 2


def counted(fairseq_train, *flags):
    """Tokens in the losses of a run: summed over ranks, batches that only keep a rank busy left out."""
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        original = ImplicitMaskedLMCriterion.reduce_metrics

        def reduce_metrics(logging_outputs):
            counts.append(sum(int(log.get("ntokens", 0)) for log in logging_outputs))
            original(logging_outputs)

        patch.setattr(ImplicitMaskedLMCriterion, "reduce_metrics", staticmethod(reduce_metrics))
        fairseq_train(*flags)
    return sum(counts)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_training(folder, ranks, fairseq_train, fork, free_port, tmp_path):
    flags = (
        f"{folder.path} --task implicit_masked_lm --criterion implicit_masked_lm --arch ode_bert_euler_tiny "
        f"--encoder-layers 1 --encoder-embed-dim 8 --encoder-ffn-embed-dim 8 --tokens-per-sample {LENGTH} "
        f"--batch-size 150 --optimizer adam --max-epoch 1 --no-save --save-dir {tmp_path}"
    ).split()
    if ranks == 1:
        found = counted(fairseq_train, *flags)
    else:
        flags += "--distributed-world-size 2 --distributed-backend gloo --ddp-backend legacy_ddp".split()
        rendezvous = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
        started = [fork(counted, fairseq_train, *flags, **rendezvous, RANK=str(rank)) for rank in range(2)]
        found, other = [process.result() for process in started]
        assert other == found  # both see the sum
    task = task_on(folder, "none")
    for split in ("train", "valid"):
        task.load_dataset(split)
    assert found == expected(task, "train") + expected(task, "valid")


@pytest.mark.parametrize("blocks", range(1, 8))
def test_the_smallest_texts_train_and_validate(blocks, toy_data, fairseq_train, tmp_path):
    shutil.copy(f"{toy_data}/dict.txt", tmp_path)
    for split in ("train", "valid"):
        write_split(tmp_path / split, [np.full(LENGTH - 2, 20)] * blocks)
    run = fairseq_train(
        *f"{tmp_path} --task implicit_masked_lm --criterion implicit_masked_lm --arch ode_bert_euler_tiny".split(),
        *f"--encoder-layers 1 --encoder-embed-dim 8 --encoder-ffn-embed-dim 8 --tokens-per-sample {LENGTH}".split(),
        *f"--batch-size 4 --optimizer adam --max-epoch 2 --no-save --save-dir {tmp_path}".split(),
    )
    assert len(run.metrics("train_inner")) == 2 * -(-blocks // 4)
    assert run.metrics("valid")[-1]["valid_bsz"] * -(-blocks // 4) == pytest.approx(blocks, abs=0.2)
