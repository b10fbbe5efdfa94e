"""What the training loop does anew in every update: the same as before, and less of it."""

from types import SimpleNamespace

import omegaconf
import torch
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

import fairseq_implicit.models  # noqa: F401


def test_an_update_is_seeded_as_fairseq_seeds_it_and_leaves_nothing_behind():
    trainer = SimpleNamespace(
        tpu=False, cuda=False, cfg=SimpleNamespace(common=SimpleNamespace(seed=7)), get_num_updates=lambda: 5
    )
    utils.set_torch_seed(12)
    expected = torch.rand(4)
    remembered = len(torch.cuda._queued_calls)
    for _ in range(3):
        Trainer._set_seed(trainer)
        assert torch.equal(torch.rand(4), expected)
    assert len(torch.cuda._queued_calls) == remembered


def outcome(function, *args):
    try:
        found = function(*args)
    except Exception as error:
        return type(error), str(error)
    return found


def test_fields_of_configurations_are_read_as_ever():
    """All fields of fairseq, and the kinds that have rules of their own."""
    original = omegaconf.DictConfig.__getattr__.__wrapped__
    special = dict(own=3, text="a", none=None, twice="${own}", missing="???", unknown="${nowhere}", inner={"x": 1})
    configs = [OmegaConf.structured(FairseqConfig), OmegaConf.create(special)]
    configs += [omegaconf.DictConfig(content) for content in (None, "???")]
    configs += [node for key in configs[0] if isinstance(node := configs[0]._get_node(key), omegaconf.DictConfig)]
    compared = 0
    for config in configs:
        content = config.__dict__["_content"]
        for key in [*(content if isinstance(content, dict) else ()), "nothing", "__name__"]:
            ours, theirs = outcome(getattr, config, key), outcome(original, config, key)
            assert ours == theirs and type(ours) is type(theirs), key
            compared += 1
    assert compared > 250
