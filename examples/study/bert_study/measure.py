"""Parameters, time of an update and peak memory of the trained models, measured side by side in one run."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer as FairseqTrainer
from fairseq.utils import move_to_cuda

import fairseq_implicit.models  # noqa: F401  (registers task and models before flags are read)
from bert_study.plan import Plan, Run
from bert_study.training import command, run_folder
from fairseq_implicit.commands.wording import counted
from scripts.side_by_side import median_seconds, peak_bytes


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        parameters: of the whole model.
        depth_parameters: of the depth alone: blocks, or cell, and what combines them.
        seconds: of one update, median over the rounds.
        bytes: most that forward and backward pass hold beyond weights and gradients.
    """

    parameters: int
    depth_parameters: int
    seconds: float
    bytes: int


class TrainedModel:
    """A run's model, optimiser and first batch, as fairseq-train has left them: one more update costs what the last one
    did, solver iterations included. The learning rate has fallen to 0, so that updates change nothing."""

    def __init__(self, plan: Plan, run: Run, data: str, out: str):
        folder = run_folder(out, run)
        words = command(plan, run, data, folder)[3:]
        parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
        cfg = convert_namespace_to_omegaconf(parsed)
        self.task = tasks.setup_task(cfg.task)
        self.task.load_dataset("train")
        model, criterion = self.task.build_model(cfg.model), self.task.build_criterion(cfg.criterion)
        self.trainer = FairseqTrainer(cfg, self.task, model, criterion)
        self.trainer.load_checkpoint(os.path.join(folder, "checkpoint_last.pt"))
        batches = self.trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=True)
        self.batch = next(iter(batches))
        self.device = self.trainer.device

    def update(self) -> None:
        with metrics.aggregate(new_root=True):
            self.trainer.train_step([self.batch])

    def gradients(self) -> None:
        batch = move_to_cuda(self.batch) if self.device.type == "cuda" else self.batch
        self.trainer.criterion(self.trainer.model, batch)[0].backward()

    def peak(self) -> int:
        self.trainer.model.train()
        for parameter in self.trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return peak_bytes(self.gradients, str(self.device))


def measure(plan: Plan, runs: dict[str, Run], data: str, out: str) -> dict[str, Any]:
    """The finished ``runs``, one per model, taking turns; with what they were measured on, as plain data."""
    torch.set_num_threads(plan.threads)
    models = {name: TrainedModel(plan, run, data, out) for name, run in runs.items()}
    seconds = median_seconds({name: model.update for name, model in models.items()}, plan.rounds)
    found = {}
    for name, model in models.items():
        own = model.trainer.model
        depth = sum(parameter.numel() for parameter in own.encoder.depth.parameters())
        total = sum(parameter.numel() for parameter in own.parameters())
        found[name] = asdict(Measured(total, depth, seconds[name], model.peak()))
    device = next(iter(models.values())).device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {counted(plan.threads, 'thread')}" if device.type == "cpu" else ""
    return {"models": found, "machine": f"torch {torch.__version__}, {where}{threads}, {counted(plan.rounds, 'round')}"}
