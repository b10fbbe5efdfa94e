"""Flags: all of them listed by ``--help``, and none that fairseq accepts only to lose the work."""

import argparse
import importlib.util
import os
import sys

import omegaconf
import torch
from fairseq import options
from fairseq.file_io import PathManager

from fairseq_implicit.compat.wrapping import wrap
from fairseq_implicit.machine import multiplies_bfloat16

_DEFAULT_RESTORE_FILE = "checkpoint_last.pt"

#: Set to 1, this variable allows trainings in bfloat16 on CPUs that have to emulate it.
EMULATED_BF16 = "FAIRSEQ_IMPLICIT_EMULATED_BF16"


def register() -> None:
    wrap(options, "parse_args_and_arch", _parse_args_and_arch)


def _parse_args_and_arch(original, parser, input_args=None, *args, **kwargs):
    given = list(sys.argv[1:] if input_args is None else input_args)
    if {"-h", "--help"} & set(given):
        _print_help(original, parser, [flag for flag in given if flag not in ("-h", "--help")], *args, **kwargs)
    try:
        parsed = original(parser, input_args, *args, **kwargs)
    except KeyError as error:
        if error.args != (None,):
            raise
        raise ValueError("fairseq-validate needs --task, for example --task implicit_masked_lm.") from None
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    without_gpu = getattr(namespace, "cpu", False) or not torch.cuda.is_available()
    _keep_bf16_off_tpu(namespace)
    if without_gpu and hasattr(namespace, "save_dir") and hasattr(namespace, "ddp_backend"):
        launch_on_cpu(namespace)
    return parsed


def _print_help(original, parser: argparse.ArgumentParser, given, *args, **kwargs) -> None:
    """Help with the flags of the task, model, criterion and optimiser that are named beside ``--help``; exits.

    fairseq asks argparse for help before it has added any of them.
    """

    def print_help(*unused):
        parser.print_help()
        parser.exit()

    parser.parse_args = print_help
    try:
        original(parser, given, *args, **kwargs)
    except (KeyError, RuntimeError):  # what fairseq says of a missing --task or --arch
        parser.epilog = "with --task, --arch, --criterion and --optimizer beside --help, their own flags are listed too"
        print_help()


def _keep_bf16_off_tpu(namespace: argparse.Namespace) -> None:
    """fairseq takes ``--bf16`` for a wish to train on a TPU and then fails for want of torch_xla, GPU or not."""
    if getattr(namespace, "tpu", False) and importlib.util.find_spec("torch_xla") is None:
        if not getattr(namespace, "bf16", False):
            raise ValueError("--tpu needs torch_xla, which is not installed.")
        namespace.tpu = False


def launch_on_cpu(namespace: argparse.Namespace) -> None:
    """Makes several processes on CPUs possible under torchrun, and refuses the settings that cannot work there.

    Args:
        namespace: parsed training flags, changed in place.

    Raises:
        ValueError: naming the flag to change.
    """
    size = namespace.distributed_world_size
    if size == 1:
        return
    if namespace.ddp_backend not in ("legacy_ddp", "no_c10d"):
        raise ValueError(
            f"--ddp-backend {namespace.ddp_backend} needs GPUs: {size} processes on CPUs need --ddp-backend legacy_ddp."
        )
    if namespace.distributed_backend != "gloo":
        raise ValueError(
            f"--distributed-backend {namespace.distributed_backend} needs GPUs: {size} processes on CPUs need "
            "--distributed-backend gloo."
        )
    if namespace.distributed_init_method is not None:
        return
    if not all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")):
        raise ValueError(
            f"--distributed-world-size {size} without GPUs: fairseq starts processes for GPUs only; start them with "
            f"torchrun --nproc_per_node {size}."
        )
    # what fairseq does for GPUs under torchrun, less its division by the number of GPUs
    namespace.distributed_init_method = "env://"
    namespace.distributed_world_size = int(os.environ["WORLD_SIZE"])
    namespace.distributed_rank = int(os.environ["RANK"])
    namespace.distributed_no_spawn = True
    namespace.device_id = 0


def refuse_what_cannot_train(cfg: omegaconf.DictConfig) -> None:
    """Refuses settings that fairseq accepts in silence and that end in lost work.

    Args:
        cfg: the whole configuration of a training run.

    Raises:
        FileNotFoundError: the file to restore does not exist (fairseq would train from scratch).
        ValueError: copies of a job under a launcher, precisions that fairseq only has for GPUs, or that the CPU
            has to emulate.
    """
    restore = cfg.checkpoint.restore_file
    if restore != _DEFAULT_RESTORE_FILE and not PathManager.exists(restore):
        raise FileNotFoundError(
            f"--restore-file {restore} does not exist: correct the path, or leave the flag out to train from scratch."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched > 1 and cfg.distributed_training.distributed_world_size == 1:
        raise ValueError(
            f"the launcher started {launched} processes, but --distributed-world-size is 1, so that each would train "
            f"the whole job and overwrite the others' checkpoints: pass --distributed-world-size {launched}."
        )
    if torch.cuda.is_available() and not cfg.common.cpu:
        return
    if cfg.common.fp16:
        raise ValueError(
            "--fp16 needs a GPU (fairseq moves to CUDA at the first overflow of a gradient): on a CPU use --bf16 where "
            "it has that, or neither."
        )
    if cfg.common.amp:
        raise ValueError("--amp needs a GPU, on a CPU it does nothing: use --bf16 where it has that, or neither.")
    if cfg.common.bf16 and not multiplies_bfloat16() and os.environ.get(EMULATED_BF16) != "1":
        raise ValueError(
            "--bf16 is emulated on this CPU, which has none of amx_bf16, avx512_bf16 and bf16, and slower than float32 "
            f"by a factor of up to a hundred: leave it out, or set the environment variable {EMULATED_BF16}=1 to train "
            "in it all the same."
        )
