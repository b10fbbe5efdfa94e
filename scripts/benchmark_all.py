"""All benchmarks of speed, one after the other, with what each printed kept as it was printed.

Each goes to ``OUT/NAME.txt`` below its command and the machine. It takes about a quarter of an hour, of a machine that
does nothing else: the load that others made at its start stands beside the machine.

    python -m scripts.benchmark_all --out examples/benchmarks
    python -m scripts.benchmark_all --out /tmp/again --only loop deq
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from fairseq_implicit.machine import cpu_instructions, multiplies_bfloat16

SMALL = "scripts.benchmark_throughput --size small --layers 4 --batch 16 --length 128 --rounds 5"
BASE = "scripts.benchmark_throughput --size base --layers 2 --length 512 --rounds 3"
HALF = "--dtype bfloat16-weights"
COMMANDS: dict[str, str] = {
    "small-float32": SMALL,
    "small-bfloat16": f"{SMALL} {HALF}",
    "base-float32": f"{BASE} --batch 2",
    "base-bfloat16": f"{BASE} --batch 8 {HALF}",
    "base-bfloat16-no-dropout": f"{BASE} --batch 8 {HALF} --dropout 0",
    "loop": "scripts.benchmark_loop",
    "deq": "scripts.benchmark_deq --part overhead step",
    "ode": "scripts.benchmark_ode --sizes base --steps 1 --rounds 8",
    "busy": "scripts.benchmark_busy",
}
#: What of a CPU's instructions says how fast it multiplies.
TELLING = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "neon", "bf16", "sve")


def machine() -> str:
    """One paragraph on what the numbers depend on."""
    flags = [name for name in TELLING if name in cpu_instructions()]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {' '.join(flags)}; GPU: {', '.join(gpus) or 'none'}\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, load of the last minute "
        f"{os.getloadavg()[0]:.2f}"
    )


def cpu_name() -> str:
    """As Linux tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            told = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.machine()
    family = " ".join(f"{key.strip()} {told[key].strip()}" for key in told if key.strip() in ("cpu family", "model"))
    name = next((value.strip() for key, value in told.items() if key.strip() == "model name"), platform.machine())
    return f"{name} ({family})" if family else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what they print")
    parser.add_argument("--only", nargs="+", choices=sorted(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the benchmarks that have a choice")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    emulated = not multiplies_bfloat16() and options.device != "cuda"
    failed = []
    for name in options.only:
        command = ["python", "-m", *shlex.split(COMMANDS[name])]
        if options.device and name != "busy":
            command += ["--device", options.device]
        head = f"$ {shlex.join(command)}\n{machine()}\n\n"
        print(f"== {name}\n{head}", end="", flush=True)
        if "bfloat16" in name and emulated:
            text = "not measured: this CPU has no instructions for bfloat16 and emulates it.\n"
        else:
            done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
            text = done.stdout
            if done.returncode:
                failed.append(name)
                text += done.stderr
        print(text, flush=True)
        (options.out / f"{name}.txt").write_text(head + text, encoding="utf-8")
    if failed:
        sys.exit(f"benchmark_all: {', '.join(failed)} failed, see above")


if __name__ == "__main__":
    main()
