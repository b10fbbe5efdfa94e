"""A masked-language model on the blocks of a data folder, whose masks are the same each time."""

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq import utils

from fairseq_implicit.evaluation.checkpoints import Opened, open_checkpoint


class Blocks(NamedTuple):
    """Which blocks of a data folder are evaluated, and where.

    Attributes:
        data: folder, as for fairseq-validate.
        subset: name of the split.
        batch_size: blocks of a batch.
        limit: batches, spread over the subset; None for all.
        device: of the model and the batches.
    """

    data: str
    subset: str = "valid"
    batch_size: int = 32
    limit: int | None = None
    device: str = "cpu"


class Averages(NamedTuple):
    """What a model reaches on blocks.

    Attributes:
        loss: nats per masked token.
        accuracy: percent of the masked tokens.
        seconds: that all of it took.
        blocks: how many they were.
        statistics: means over batches of what the depth reports, such as ``evaluations`` per sample.
    """

    loss: float
    accuracy: float
    seconds: float
    blocks: int
    statistics: dict[str, float]


class Score(NamedTuple):
    """How well a model fills masks.

    Attributes:
        loss: nats per masked token.
        first: share of the masked tokens that are the first candidate, in [0, 1].
        among: share of those that are among the first so many candidates.
        masks: how many they were.
    """

    loss: float
    first: float
    among: float
    masks: int


def batches(task: Any, blocks: Blocks) -> list[dict[str, Any]]:
    """The batches of a subset, or ``limit`` of them at equal distances, as they go from the shortest to the longest
    blocks.

    Raises:
        ValueError: the subset is empty.
    """
    task.load_dataset(blocks.subset)
    iterator = task.get_batch_iterator(
        task.dataset(blocks.subset), max_sentences=blocks.batch_size, max_positions=task.max_positions()
    ).next_epoch_itr(shuffle=False)
    count = len(iterator)
    if not count:
        raise ValueError(f"--subset {blocks.subset} is empty")
    limit = min(blocks.limit or count, count)
    kept = {count * (2 * place + 1) // (2 * limit) for place in range(limit)}  # the middles of as many equal parts
    return [sample for number, sample in enumerate(iterator) if number in kept]


def averages(opened: Opened, samples: Iterable[dict[str, Any]], device: str) -> Averages:
    """Evaluates a model on batches."""
    criterion = opened.task.build_criterion(opened.cfg.criterion).eval()
    sums: dict[str, float] = {}
    seconds, blocks = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            blocks += len(sample["id"])
            sample = sample if device == "cpu" else utils.move_to_cuda(sample)
            start = time.perf_counter()
            _, _, logged = criterion(opened.model, sample)
            counts = {name: float(value) for name, value in logged.items()}  # waits for the accelerator
            seconds += time.perf_counter() - start
            for name, value in counts.items():
                sums[name] = sums.get(name, 0.0) + value
    tokens, number = max(sums.pop("sample_size"), 1.0), max(sums.pop("batches"), 1.0)
    loss, accuracy = sums.pop("loss") / tokens, 100.0 * sums.pop("correct") / tokens
    statistics = {name: value / number for name, value in sums.items() if name not in ("ntokens", "nsentences")}
    return Averages(loss, accuracy, seconds, blocks, statistics)


def evaluate(path: str, blocks: Blocks, **overrides: Any) -> Averages:
    """Evaluates a checkpoint, with ``overrides`` of its model's settings.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or data, or it cannot be opened so.
    """
    opened = open_checkpoint(path, blocks.data, blocks.device, **overrides)
    return averages(opened, batches(opened.task, blocks), blocks.device)


@torch.no_grad()
def score(path: str, blocks: Blocks, mask_rate: float, candidates: int, hidden: bool = False) -> Score:
    """Fills the masks of a subset, which are the same for every model with the same ``--tokens-per-sample``.

    Args:
        path: checkpoint.
        blocks: which ones, and where.
        mask_rate: share of the tokens that are masked, whatever the training masked.
        candidates: how many of a mask count for ``among``.
        hidden: put ``<mask>`` in the place of all of them; the training may leave some visible and others random.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or data, or it cannot be opened so.
        ArithmeticError: the model's output is not finite.
    """
    shown = {"leave_unmasked_prob": 0.0, "random_token_prob": 0.0} if hidden else {}
    opened = open_checkpoint(path, blocks.data, blocks.device, valid_mask_prob=mask_rate, **shown)
    padding = opened.task.dictionary.pad()
    loss, first, among, masks = 0.0, 0, 0, 0
    for sample in batches(opened.task, blocks):
        sample = sample if blocks.device == "cpu" else utils.move_to_cuda(sample)
        masked = sample["target"].ne(padding)
        target = sample["target"][masked]
        logits = opened.model(**sample["net_input"], masked_tokens=masked)[0].reshape(-1, len(opened.task.dictionary))
        loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
        if not math.isfinite(loss):
            raise ArithmeticError(
                f"the loss of {path} is not finite: the training has diverged; lower its --lr and train again"
            )
        better = logits.gt(logits.gather(1, target[:, None])).sum(1)
        first += int(better.eq(0).sum())
        among += int(better.lt(candidates).sum())
        masks += len(target)
    if not masks:
        raise ValueError(f"--subset {blocks.subset} of {blocks.data} holds no masked token: give more text")
    return Score(loss / masks, first / masks, among / masks, masks)
