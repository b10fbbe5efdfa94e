"""A training job: one writer to a folder, and no update lost when it is told to stop."""

import logging
import multiprocessing
import os
import signal
import threading
import weakref
from typing import TextIO

import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from fairseq_implicit.compat.flags import refuse_what_cannot_train
from fairseq_implicit.compat.wrapping import wrap
from fairseq_implicit.folder_lock import FolderInUse, lock_folder

logger = logging.getLogger(__name__)

LOCK_FILE = ".training.lock"

#: What asks a job to save and end: a scheduler's preemption, ``kill PID``, SLURM's ``--signal``.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def register() -> None:
    wrap(checkpoint_utils, "load_checkpoint", _load_checkpoint)
    wrap(distributed_utils, "call_main", call_main)


class ComparesCheckpoints:
    """A task whose ``set_checkpoint_dict`` compares a checkpoint with its data and changes nothing but its counts.

    fairseq calls it only where the order of the data is resumed as well; such a task is asked wherever a training
    starts from a checkpoint.
    """


def _load_checkpoint(original, cfg, trainer, **kwargs):
    """``fairseq_cli.train`` comes through here once, before the first update, from flags and from hydra alike."""
    refuse_what_cannot_train(trainer.cfg)
    if not cfg.no_save and trainer.data_parallel_rank == 0:
        weakref.finalize(trainer, own_folder(cfg.save_dir).close)
    # Its module may be __main__, and is loaded by now in any case.
    from fairseq_cli import train

    wrap(train, "train", _train)
    if _is_set(trainer.cfg, "compile_blocks"):
        trainer.get_model().compile_blocks()
    if saves_on_signal(trainer.cfg):
        wrap(train, "validate_and_save", _validate_and_save)
        wrap(type(trainer), "valid_step", _valid_step)
        requests.listen()
    remember_data_folders(trainer.cfg)
    extra_state, epoch_itr = original(cfg, trainer, **kwargs)
    state = (extra_state or {}).get(type(trainer.task).__name__)
    if state and isinstance(trainer.task, ComparesCheckpoints):
        trainer.task.set_checkpoint_dict(state)
    return extra_state, epoch_itr


def remember_data_folders(cfg: omegaconf.DictConfig) -> None:
    """Makes the data folders absolute that a checkpoint will name, so that they are found from anywhere."""
    data = cfg.task.get("data") if isinstance(cfg.task, omegaconf.DictConfig) else None
    if isinstance(data, str) and "://" not in data:
        folders = data.split(os.pathsep)
        if all(map(os.path.isdir, folders)):
            cfg.task.data = os.pathsep.join(map(os.path.abspath, folders))


def _train(original, cfg, trainer, task, epoch_itr):
    """One epoch, unless the training is over: fairseq would train one update more at every start.

    Raises:
        FloatingPointError: the gradient is not finite; the sentence says what to change.
    """
    updates = trainer.get_num_updates()
    if not 0 < (cfg.optimization.max_update or 0) <= updates:
        try:
            return original(cfg, trainer, task, epoch_itr)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the training has diverged at update {trainer.get_num_updates() + 1} ({error}): lower --lr, lengthen "
                "--warmup-updates, or clip the gradient by a smaller --clip-norm."
            ) from None
    from fairseq_cli import train

    logger.info(f"nothing to train: {updates} updates are done, --max-update {cfg.optimization.max_update} is reached")
    # A signal may have come during the last validation, which is what is left to do then.
    epoch_itr.next_epoch_itr(shuffle=epoch_itr.next_epoch_idx > cfg.dataset.curriculum)
    return train.validate_and_save(cfg, trainer, task, epoch_itr, cfg.dataset.valid_subset.split(","), False)


# --- one writer to a folder -------------------------------------------------------------------------------------------


def own_folder(folder: str) -> TextIO:
    """Locks ``--save-dir`` for this process until the returned file is closed or the process ends, however it ends.

    Raises:
        ValueError: another process writes there; the sentence names it.
    """
    try:
        return lock_folder(folder, LOCK_FILE)
    except FolderInUse as owner:
        raise ValueError(
            f"another training writes to --save-dir {folder} ({owner}): wait for it, stop it, or choose another "
            "--save-dir."
        ) from None


# --- signals ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal arrived during validation, which nothing of the training is lost by leaving."""


class _Requests:
    """Signals that ask for the end: noted when they arrive, obeyed where a checkpoint can be written."""

    def __init__(self):
        self.process = None
        self.received = 0

    def listen(self) -> None:
        """From now on signals are noted, in the main thread of this process."""
        self.process, self.received = os.getpid(), 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.received or os.getpid() != self.process:
            _end_by(number)  # asked again, or a worker process, which has nothing to save
            return
        self.received = number
        # Logging may be what was interrupted, and cannot be entered a second time then.
        name = signal.Signals(number).name
        os.write(2, f"{name}: a checkpoint is saved after the running update, then this ends\n".encode())

    def agreed(self, trainer) -> int:
        """The signal that any rank received, or 0: the same answer on all ranks."""
        if trainer.data_parallel_world_size == 1:
            return self.received
        flag = torch.tensor([self.received], device=trainer.device)
        distributed_utils.all_reduce(flag, trainer.data_parallel_process_group, op="max")
        return int(flag)


requests = _Requests()


def saves_on_signal(cfg: omegaconf.DictConfig) -> bool:
    """Whether a run's model was given ``--save-on-signal``."""
    return _is_set(cfg, "save_on_signal")


def _is_set(cfg: omegaconf.DictConfig, field: str) -> bool:
    """Whether a run's model was given a flag of this package; models of others have no such field."""
    return isinstance(cfg.model, omegaconf.DictConfig) and bool(cfg.model.get(field, False))


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _validate_and_save(original, cfg, trainer, task, epoch_itr, *args, **kwargs):
    """After every update: save and end, if a signal has come."""
    if not saves_on_signal(cfg):
        return original(cfg, trainer, task, epoch_itr, *args, **kwargs)
    number = requests.agreed(trainer)
    if not number:
        try:
            return original(cfg, trainer, task, epoch_itr, *args, **kwargs)
        except Stopped:
            number = requests.agreed(trainer)
    if cfg.checkpoint.no_save or cfg.checkpoint.no_last_checkpoints:
        logger.warning("nothing is saved: --no-save or --no-last-checkpoints says so")
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    logger.info(
        f"ended by {signal.Signals(number).name} after {trainer.get_num_updates()} updates: the same command goes on"
    )
    raise SystemExit(128 + number)


def _valid_step(original, trainer, *args, **kwargs):
    if saves_on_signal(trainer.cfg) and requests.agreed(trainer):
        raise Stopped
    return original(trainer, *args, **kwargs)


def call_main(original, cfg, main, **kwargs):
    """Where fairseq starts one process for each GPU and waits, signals reach those processes."""
    if not saves_on_signal(cfg) or threading.current_thread() is not threading.main_thread():
        return original(cfg, main, **kwargs)
    forwarded = []

    def forward(number, frame):
        ranks = multiprocessing.active_children()
        if not ranks or forwarded:
            _end_by(number)
        forwarded.append(number)
        for rank in ranks:
            os.kill(rank.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return original(cfg, main, **kwargs)
    except torch.multiprocessing.ProcessExitedException:
        if not forwarded:
            raise
        raise SystemExit(128 + forwarded[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
