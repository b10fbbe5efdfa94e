"""Flags: help with all of them, launches that can work."""

import argparse
import dataclasses

import pytest
from fairseq import checkpoint_utils, options
from fairseq.models import MODEL_DATACLASS_REGISTRY

from fairseq_implicit import compat
from fairseq_implicit.compat.flags import launch_on_cpu
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig


def test_registering_twice_wraps_once():
    before = options.parse_args_and_arch, checkpoint_utils.load_checkpoint
    compat.register()
    assert (options.parse_args_and_arch, checkpoint_utils.load_checkpoint) == before


def flags(**changed):
    values = dict(
        distributed_world_size=2,
        distributed_backend="gloo",
        ddp_backend="legacy_ddp",
        distributed_init_method=None,
        distributed_rank=0,
        distributed_no_spawn=False,
        device_id=0,
    )
    return argparse.Namespace(**{**values, **changed})


def test_processes_on_cpus_under_torchrun(monkeypatch):
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "3"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
    namespace = flags()
    launch_on_cpu(namespace)
    assert (namespace.distributed_init_method, namespace.distributed_rank) == ("env://", 2)
    assert namespace.distributed_world_size == 3 and namespace.distributed_no_spawn


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (dict(ddp_backend="pytorch_ddp"), "--ddp-backend legacy_ddp"),
        (dict(distributed_backend="nccl"), "--distributed-backend gloo"),
        ({}, "torchrun --nproc_per_node 2"),
    ],
)
def test_refuses_launches_that_cannot_work_on_cpus(monkeypatch, changed, sentence):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=sentence):
        launch_on_cpu(flags(**changed))


def printed_help(capsys, parser, *argv):
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(parser, [str(arg) for arg in argv])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arch", ["ode_bert_rk2_tiny", "neural_ode_bert_tiny", "deq_bert_tiny"])
def test_help_lists_every_flag_with_its_sentence(arch, capsys):
    text = printed_help(
        capsys, options.get_training_parser(), "data", "--task", "implicit_masked_lm", "--arch", arch, "--help",
        "--criterion", "implicit_masked_lm", "--optimizer", "adam",
    )  # fmt: skip
    fields = dataclasses.fields(MODEL_DATACLASS_REGISTRY[arch]) + dataclasses.fields(ImplicitMaskedLMConfig)
    flags = ["--" + field.name.replace("_", "-") for field in fields if field.metadata.get("help")]
    assert len(flags) > 40 and [flag for flag in flags if flag not in text and flag != "--data"] == []
    assert "--adam-betas" in text and "share of the tokens to predict that stay visible" in " ".join(text.split())


def test_help_without_a_model_says_how_to_see_its_flags(capsys):
    text = printed_help(capsys, options.get_training_parser(), "-h")
    assert "--max-update" in text and "with --task, --arch, --criterion" in text
    text = printed_help(capsys, options.get_validation_parser(), "data", "--task", "implicit_masked_lm", "--help")
    assert "--tokens-per-sample" in text
