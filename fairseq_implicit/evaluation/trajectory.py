"""One batch of a data folder along the depth of a checkpoint."""

import torch

from fairseq_implicit.depth.diagnostics import Trajectory, trace
from fairseq_implicit.evaluation.checkpoints import open_checkpoint
from fairseq_implicit.evaluation.masked_lm import Blocks, batches


def trajectory(path: str, blocks: Blocks) -> tuple[str, Trajectory]:
    """The model's name and what its states go through on a batch of middling blocks.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or data, or a depth without a trajectory.
        ArithmeticError: a state on the way is no number.
    """
    opened = open_checkpoint(path, blocks.data, blocks.device)
    tokens = batches(opened.task, blocks._replace(limit=1))[0]["net_input"]["src_tokens"]
    encoder = opened.model.encoder
    with torch.no_grad():
        layout = encoder.layout(tokens)
        found = trace(encoder.depth, encoder.embed(tokens, layout), layout)
    for place, time in enumerate(found.times):
        error = found.local_error[place - 1] if place else torch.zeros(())
        if not (found.rms[place].isfinite().all() and error.isfinite().all()):
            raise ArithmeticError(
                f"the state is not finite at depth {time:g} of {found.times[-1]:g}: the model has diverged; take "
                "an earlier checkpoint"
            )
    return opened.cfg.model._name, found
