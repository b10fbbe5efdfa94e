"""The schedule of warm-up, stable stretch and decay."""

import math

import pytest
import torch
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from omegaconf import OmegaConf

from fairseq_implicit.optim.wsd import WarmupStableDecay, WsdConfig


def schedule(**settings):
    adam = OmegaConf.create({**vars(FairseqAdamConfig()), "lr": [0.5], "tpu": False})
    optimizer = FairseqAdam(adam, [torch.nn.Parameter(torch.zeros(()))])
    return WarmupStableDecay(
        OmegaConf.create({**vars(WsdConfig()), "lr": [0.5], "max_update": 0, **settings}), optimizer
    )


def test_its_formula():
    found = schedule(warmup_updates=4, decay_updates=5, end_learning_rate=0.1, total_num_update=20)
    rates = [found.step_update(n) for n in range(23)]
    assert rates[:5] == [0.0, 0.125, 0.25, 0.375, 0.5] and set(rates[4:16]) == {0.5}
    decay = [0.1 + 0.4 * (1 - math.sqrt(k / 5)) for k in range(6)]
    assert rates[15:21] == pytest.approx(decay, abs=1e-15) and rates[20:] == [0.1] * 3
    assert found.step_begin_epoch(2) == 0.1 == found.optimizer.get_lr()


def test_its_ends():
    """A share of all updates by default; no warm-up; nothing but decay."""
    assert schedule(total_num_update=200).decay == 20
    assert schedule(total_num_update=200, decay_share=0.25).decay == 50
    plain = schedule(max_update=3, decay_updates=0)
    assert [plain.step_update(n) for n in range(4)] == [0.5, 0.5, 0.5, 0.0]
    falling = schedule(total_num_update=4, decay_updates=4)
    assert [falling.step_update(n) for n in (0, 1, 4)] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(warmup_updates=15, decay_updates=6), "--warmup-updates 15 and 6 updates of decay do not fit into 20"),
        (dict(warmup_updates=19), "19 and 2 updates of decay do not fit into 20 updates"),
        (dict(total_num_update=0), "give --max-update or --total-num-update"),
        (dict(decay_share=1.5), "--decay-share must lie between 0 and 1, not 1.5"),
        (dict(decay_updates=-1), "must not be negative"),
        (dict(lr=[0.5, 0.1]), "takes one --lr"),
    ],
)
def test_impossible_spans(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedule(**{"total_num_update": 20, **settings})
