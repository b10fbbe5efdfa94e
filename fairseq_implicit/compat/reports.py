"""What a person reads: lines of metrics, the module with the first NaN, and no warnings that are not theirs."""

import collections
import logging
import re
import typing
import warnings

from fairseq import nan_detector
from fairseq.logging import progress_bar

from fairseq_implicit.compat.wrapping import wrap

#: What fairseq's libraries say of fairseq's own use of them, in every run: category, message, module.
_OTHERS_AFFAIRS = (
    (UserWarning, r"\s*(hydra\.experimental\.|The version_base parameter|The strict flag in the compose API)", ""),
    (UserWarning, r"\s*(In 'config': Usage of deprecated keyword|'config' is validated against ConfigStore)", ""),
    (UserWarning, r"\s*'pin_memory' argument is set as true but no accelerator is found", ""),
    (FutureWarning, r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated", r"fairseq\."),
    (DeprecationWarning, "", r"fairseq\."),
)
_PREDICTIONS = {"pred", "targ"}  # fairseq's sentence_prediction keeps all predictions of a validation under these names
_details: set[str] = set()


def register() -> None:
    for category, message, module in _OTHERS_AFFAIRS:
        warnings.filterwarnings("ignore", message, category, module)
    logging.getLogger("hydra").setLevel(logging.INFO)  # fairseq-validate resets the level that all loggers inherit
    wrap(nan_detector.NanDetector, "add_hooks", _add_hooks)
    wrap(progress_bar.BaseProgressBar, "_format_stats", _format_stats)


def keep_out_of_text_bars(names: typing.Iterable[str]) -> None:
    """Names of metrics that go to TensorBoard and JSON logs but not into lines that a person reads.

    They replace those of the call before: another model of the same process has others.
    """
    global _details
    _details = set(names)


def _format_stats(original, bar, stats, *args, **kwargs):
    hidden = _details | _PREDICTIONS
    kept = collections.OrderedDict(
        (name, value) for name, value in stats.items() if re.sub("^(train|valid)_", "", name) not in hidden
    )
    return original(bar, kept, *args, **kwargs)


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
