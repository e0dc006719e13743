"""The machine in words, and peak memory of work done in a process of its own.

``python -m benchmarks.machine MODULE:FUNCTION JSON`` is such a process: the function gets the JSON's entries as
keyword arguments and returns the work; the peak counts from there on.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STATUS = Path("/proc/self/status")


def machine() -> dict[str, Any]:
    """What the figures depend on; no host name, no path."""
    import psutil
    import torch

    cpu = _cpu_info()
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if f in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "os": _os_name(),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def peak_of(work: str, **arguments: Any) -> dict[str, int]:
    """Run ``MODULE:FUNCTION`` in a fresh process.

    Returns:
        ``before`` and ``peak``: resident bytes when the work began, and at most during it.
    """
    command = [sys.executable, "-m", "benchmarks.machine", work, json.dumps(arguments)]
    # Freed buffers go back to the system at once: the peak is of what was held, not of the allocator's habits.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{work} failed in its own process (exit {done.returncode})")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_line(name: str) -> int:
    """A memory line of this process's status, in bytes."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def _child(work: str, arguments: dict[str, Any]) -> None:
    module, _, function = work.partition(":")
    job = getattr(importlib.import_module(module), function)(**arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = memory_line("VmRSS")
    job()
    print(json.dumps({"before": before, "peak": memory_line("VmHWM")}))


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]))
