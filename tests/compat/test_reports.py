"""What a person reads of a run."""

import logging

import torch
from fairseq.nan_detector import NanDetector

import fairseq_implicit.models  # noqa: F401


class ReturnsStructure(torch.nn.Module):
    """A module that returns neither a tensor nor a tuple, as a depth does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return {"state": self.linear(x), "statistics": {}}


def test_nan_detector_survives_structured_outputs(caplog):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReturnsStructure()

        def forward(self, x):
            return [{}, self.inner(x)["state"].sum(dim=-1)][1]

    model = Outer()
    with NanDetector(model):
        model(torch.full((3, 2), float("nan"))).sum().backward()
    assert "NaN detected in output of inner.linear" in caplog.text


def test_nobody_reads_warnings_about_other_peoples_code(toy_flags, command_line, checkout, tmp_path):
    process = command_line(
        "fairseq-train", *toy_flags, "--cpu", "--user-dir", checkout / "fairseq_implicit", "--max-update", 1,
        "--disable-validation", "--no-save", "--save-dir", tmp_path, PYTHONWARNINGS="",
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert [line for line in output.splitlines() if "Warning" in line or "tensorboardX" in line] == []


def test_fairseqs_reset_of_logging_lets_no_debug_lines_through(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "level", logging.NOTSET)
    assert not logging.getLogger("hydra.core.utils").isEnabledFor(logging.DEBUG)
