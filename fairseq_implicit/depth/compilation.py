"""The fields of a depth compiled by ``torch.compile``, block by block.

The network around them stays what it is: checkpoints keep their names (compiled as a whole they would start with
``_orig_mod.``), recomputation still sees one evaluation after the other, and a solver may stop when it likes.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

from fairseq_implicit.depth.output import Depth
from fairseq_implicit.options import OptionError

BACKEND = "inductor"


def compile_fields(depth: Depth) -> None:
    """From now on ``depth`` solves compiled fields.

    Raises:
        OptionError: what ``torch.compile`` needs is not installed, or there would be no end of compiling.
    """
    if depth.piecewise:
        raise OptionError(
            "--compile-blocks",
            "weights interpolated along the depth are others at every time, which would all be compiled: leave it out, "
            "or set `depth_weights` embedding.",
        )
    if BACKEND == "inductor":
        _check_compilers()
    depth.around = _compiled


def _check_compilers() -> None:
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise OptionError("--compile-blocks", "it needs triton on GPUs, which is not installed: leave it out.")
    elif not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise OptionError(
            "--compile-blocks", "it needs a C++ compiler, and there is no g++ or clang++ on the PATH: leave it out."
        )


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, backend=BACKEND)
