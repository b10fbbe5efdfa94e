"""What Trainer has to tell a depth with schedules, and what the depth has to tell Trainer's log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fairseq_implicit.huggingface.modeling import FeatureModel, ImplicitBertPreTrainedModel, ImplicitModelOutput


class DepthCallback(TrainerCallback):
    """Tells the model's depth the number of updates, and logs its statistics and penalties.

    The number is that of the weights' whole life, so a warm-up is not entered a second time by a model that is trained
    further; the weights of a checkpoint carry it. What is logged, under ``depth/…``, are means over the batches of
    training since the line before, and it stands in the line of the loss, for whatever callback Trainer asks later.
    """

    def __init__(self):
        self._origin = 0
        self._sums: dict[str, float | Tensor] = {}
        self._batches = 0
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: ImplicitBertPreTrainedModel = kwargs["model"]
        # The weights have seen the updates of this training before a resumption, and those of the trainings before it.
        self._origin = max(0, model.num_updates - state.global_step)
        self._forget()
        self._let_go()
        self._hook = model.features.register_forward_hook(self._hear)
        self._tell(model, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(kwargs["model"], state)

    on_step_end = on_step_begin  # what is saved after this update has seen it

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._batches:
            return
        means = {f"depth/{name}": float(value) / self._batches for name, value in self._sums.items()}
        logs.update(means)
        # Trainer has put its own copy of the line into the history already.
        state.log_history[-1].update(means)
        self._forget()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _tell(self, model: ImplicitBertPreTrainedModel, state: TrainerState) -> None:
        model.set_num_updates(self._origin + state.global_step)

    def _hear(self, module: FeatureModel, inputs: Any, output: ImplicitModelOutput) -> None:
        if not module.training:
            return
        for name, value in {**(output.statistics or {}), **(output.penalties or {})}.items():
            # Tensors stay on their device until a line is logged.
            value = value.detach().float() if torch.is_tensor(value) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._batches += 1

    def _forget(self) -> None:
        self._sums, self._batches = {}, 0
