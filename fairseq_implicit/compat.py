"""Everything that knows of gaps between fairseq 0.12, torch ≥ 2.6, numpy 2 and today's launchers.

``register()`` runs once, when the package is imported, which fairseq does before it loads a checkpoint or parses the
plugin's flags: in ``fairseq-train``, in every rank, in ``fairseq-validate``, ``fairseq-preprocess``,
``fairseq-hydra-train`` and the hub. It puts wrappers around eight functions of fairseq, each of which calls the
original and changes nothing for models and tasks that never meet the gap.
"""

import argparse
import atexit
import collections
import functools
import importlib.util
import logging
import math
import os
import pickle
import queue
import re
import threading
import time
import types
import typing
import zipfile

import numpy as np
import omegaconf
import torch
from fairseq import binarizer, checkpoint_utils, nan_detector, options
from fairseq.data import iterators
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar

logger = logging.getLogger(__name__)

_DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def register() -> None:
    """Closes the gaps; calling it again changes nothing."""
    if getattr(options.parse_args_and_arch, "closes_gaps", False):
        return
    torch.serialization.add_safe_globals(safe_globals())
    _wrap(options, "parse_args_and_arch", _parse_args_and_arch)
    _wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_checkpoint_to_cpu)
    _wrap(checkpoint_utils, "load_checkpoint", _load_checkpoint)
    _wrap(checkpoint_utils, "save_checkpoint", _save_checkpoint)
    _wrap(PathManager, "copy", _copy)
    _wrap(binarizer.FileBinarizer, "multiprocess_dataset", _multiprocess_dataset)
    _wrap(nan_detector.NanDetector, "add_hooks", _add_hooks)
    _wrap(progress_bar.BaseProgressBar, "_format_stats", _format_stats)
    atexit.register(finish_buffers)


def _wrap(owner, name: str, wrapper) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    wrapped.closes_gaps = True
    bound = isinstance(owner, type) and not isinstance(owner.__dict__[name], types.FunctionType)
    setattr(owner, name, staticmethod(wrapped) if bound else wrapped)


# --- checkpoints: torch.load with weights_only ------------------------------------------------------------------------


def safe_globals() -> list:
    """What a checkpoint of this plugin may hold besides tensors and plain containers; all of it is inert data.

    torch ≥ 2.6 refuses to unpickle anything else. Needed by: legacy fairseq components (``Namespace``), numpy scores
    as the best validation metric, and fairseq's broadcast of the loaded state to the other ranks, which is a second
    ``torch.load`` (``omegaconf`` containers, ``_TensorPlaceholder``).
    """
    from numpy._core import multiarray

    return [
        argparse.Namespace,
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
        typing.Any,
        dict,
        list,
        int,
        collections.defaultdict,
        _TensorPlaceholder,
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
        np.dtypes.Int32DType,
        np.dtypes.BoolDType,
        multiarray.scalar,
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]


def _load_checkpoint_to_cpu(original, path, *args, **kwargs):
    try:
        return original(path, *args, **kwargs)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found and not zipfile.is_zipfile(path):
            raise _no_checkpoint(path, "it has another format") from None
        what = f"the type {found.group(1)}" if found else "objects"
        raise ValueError(
            f"checkpoint {path} holds {what} outside the safe list of fairseq_implicit.compat.safe_globals(), which "
            "could run code on loading: if you trust the file, allow the type with "
            "torch.serialization.add_safe_globals before loading."
        ) from None
    except (EOFError, zipfile.BadZipFile, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("archive|zip|corrupt|Invalid magic", str(error)):
            raise
        raise _no_checkpoint(path, (str(error) or "it ends too early").splitlines()[0]) from None


def _no_checkpoint(path: str, reason: str) -> ValueError:
    return ValueError(
        f"checkpoint {path} is truncated or is no checkpoint ({reason}): continue from another one of the folder with "
        "--restore-file."
    )


def _copy(original, src_path, dst_path, overwrite=False):
    """Copies a checkpoint so that the destination is whole at every moment.

    fairseq writes one checkpoint and copies it to ``checkpoint_last.pt``. A process that is killed during that copy
    would leave a truncated file under the one name that a restart looks for.
    """
    if "://" in dst_path or not overwrite:
        return original(src_path, dst_path, overwrite)
    partial = dst_path + ".tmp"
    copied = original(src_path, partial, True)
    os.replace(partial, dst_path)
    return copied


def _save_checkpoint(original, cfg, trainer, epoch_itr, val_loss):
    """A validation that gave no number, such as the correlation of constant predictions, is no candidate for the best.

    fairseq would remember it as the best, which every later one then beats, and overwrite the best checkpoint.
    """
    if val_loss is not None and math.isnan(val_loss):
        logger.warning(f"the validation {cfg.best_checkpoint_metric} is not a number: checkpoint_best.pt stays")
        val_loss = None
    return original(cfg, trainer, epoch_itr, val_loss)


def _load_checkpoint(original, cfg, trainer, **kwargs):
    """``fairseq_cli.train`` comes through here once, before the first update, from flags and from hydra alike."""
    refuse_what_cannot_train(trainer.cfg)
    return original(cfg, trainer, **kwargs)


def refuse_what_cannot_train(cfg: omegaconf.DictConfig) -> None:
    """Refuses settings that fairseq accepts in silence and that end in lost work.

    Args:
        cfg: the whole configuration of a training run.

    Raises:
        FileNotFoundError: the file to restore does not exist (fairseq would train from scratch).
        ValueError: copies of a job under a launcher, or precisions that fairseq only has for GPUs.
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
            "--fp16 needs a GPU (fairseq moves to CUDA at the first overflow of a gradient): on a CPU use --bf16 or "
            "neither."
        )
    if cfg.common.amp:
        raise ValueError("--amp needs a GPU, on a CPU it does nothing: use --bf16 or neither.")


# --- flags ------------------------------------------------------------------------------------------------------------


def _parse_args_and_arch(original, parser, *args, **kwargs):
    try:
        parsed = original(parser, *args, **kwargs)
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


# --- the end of the process -------------------------------------------------------------------------------------------


def finish_buffers(patience: float = 10.0) -> None:
    """Ends the threads that read batches ahead, before the interpreter goes.

    A run that stops inside an epoch leaves fairseq's daemon thread in the middle of a torch operation; when the
    interpreter then takes the lock away from it, the C++ stack unwinds through code that forbids it and the process
    aborts ("terminate called without an active exception", exit status 134) after an entirely successful run.

    Args:
        patience: seconds to wait for all threads together.
    """
    deadline = time.monotonic() + patience
    for thread in threading.enumerate():
        if not isinstance(thread, iterators.BackgroundConsumer):
            continue
        thread._max_len = 0  # it stops after the batch in hand
        while thread.is_alive() and time.monotonic() < deadline:
            try:
                thread._queue.get_nowait()  # it may be waiting for room in the queue
            except queue.Empty:
                pass
            thread.join(timeout=0.02)


# --- fairseq-preprocess -----------------------------------------------------------------------------------------------


def _multiprocess_dataset(original, input_file, *args, **kwargs):
    if os.path.isfile(input_file) and os.path.getsize(input_file) == 0:
        raise ValueError(f"{input_file} is empty: there is nothing to binarise.")
    try:
        return original(input_file, *args, **kwargs)
    except ValueError as error:  # fairseq's search for a line start ends in "negative seek position"
        if not isinstance(error, UnicodeDecodeError) and "negative seek" not in str(error):
            raise
        offset, line = find_invalid_utf8(input_file)
        raise ValueError(
            f"{input_file} is not valid UTF-8 (byte {offset}, line {line}): convert or clean the text first."
        ) from None


def find_invalid_utf8(path: str) -> typing.Tuple[int, int]:
    """Byte offset and line number (from 1) of the first byte of a file that is not UTF-8; (-1, -1) if all of it is."""
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return offset + error.start, number
            offset += len(line)
    return -1, -1


# --- non-finite gradients ---------------------------------------------------------------------------------------------


def _add_hooks(original, detector, module):
    """Hooks that find the module with the first NaN.

    fairseq's backward hooks look for a tensor in each module's output and fail where it is another structure, such as
    a ``DepthOutput``; the user then reads that failure instead of "gradients are Nan/Inf".
    """
    backward, detector.backward = detector.backward, False
    original(detector, module)
    detector.backward = backward
    if backward:
        detector.bhooks.append(module.register_full_backward_hook(detector.bhook_fn))


# --- progress bars ----------------------------------------------------------------------------------------------------

_details = {"pred", "targ"}  # fairseq's sentence_prediction keeps all predictions of a validation under these names


def keep_out_of_text_bars(names: typing.Iterable[str]) -> None:
    """Names of metrics that go to TensorBoard and JSON logs but not into lines that a person reads."""
    _details.update(names)


def _format_stats(original, bar, stats, *args, **kwargs):
    kept = collections.OrderedDict(
        (name, value) for name, value in stats.items() if re.sub("^(train|valid)_", "", name) not in _details
    )
    return original(bar, kept, *args, **kwargs)
