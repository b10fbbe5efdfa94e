"""What a CPU can multiply, told by torch or by Linux, and the precision that trainings get of it."""

from types import MappingProxyType

import pytest
import torch

from fairseq_implicit import machine

XEON = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True, "num_logical_cores": 2}
EPYC = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False, "avx2": True, "num_logical_cores": 1}
GRAVITON = {"architecture": "aarch64", "bf16": True, "sve_max_length": 32}


@pytest.mark.parametrize("told, fast", [(XEON, True), (EPYC, False), (GRAVITON, True)])
def test_bfloat16_by_what_torch_tells(monkeypatch, told, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(told))
    assert machine.multiplies_bfloat16() is fast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.training_precision() == ("--bf16" if fast else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.training_precision() == "--fp16"


@pytest.mark.parametrize(
    "listing, found",
    [
        ("bugs\t: amx_bf16\nflags\t\t: fpu avx2 avx512_bf16\n\nflags : none\n", {"fpu", "avx2", "avx512_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", {"fp", "asimd", "i8mm", "bf16"}),
        ("processor\t: 0\n", set()),
        (None, set()),
    ],
)  # fmt: skip
def test_an_older_torch_leaves_it_to_linux(monkeypatch, tmp_path, listing, found):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    file = tmp_path / "cpuinfo"
    if listing is not None:
        file.write_text(listing)
    assert machine.cpu_instructions(str(file)) == found


@pytest.mark.parametrize("flag", ["--fp16", "--bf16", ""])
def test_the_command_prints_the_flag_alone(command, monkeypatch, flag):
    monkeypatch.setattr("fairseq_implicit.commands.precision.training_precision", lambda: flag)
    assert command("precision") == (0, f"{flag}\n", "")
