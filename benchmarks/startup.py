"""Seconds until ``import detseg`` and ``detseg --help`` are done, with warm files.

Run: python benchmarks/startup.py [repeats]. Wanted: import < 0.15 s, help < 0.3 s. A bare interpreter is measured
beside them, since it is part of both.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMITS = {"import detseg": 0.15, "detseg --help": 0.3}  # seconds


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(repeats: int) -> None:
    script = shutil.which("detseg", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("the command detseg is not installed beside this Python; run make setup")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import detseg": [sys.executable, "-c", "import detseg"],
        "detseg --help": [script, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "detseg train --help": [script, "train", "--help"],
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {repeats} repeats\n")
    print(f"| {'command':<20} | {'median s':>8} | {'best s':>8} | {'wanted':>8} |")
    print(f"|{'-' * 22}|{'-' * 9}:|{'-' * 9}:|{'-' * 9}:|")
    for name, command in commands.items():
        seconds(command)  # warms the file cache
        times = [seconds(command) for _ in range(repeats)]
        wanted = f"< {LIMITS[name]}" if name in LIMITS else ""
        print(f"| {name:<20} | {statistics.median(times):>8.3f} | {min(times):>8.3f} | {wanted:>8} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
