"""Train every experiment from its own command, one after the other, and print what it cost and reached.

Run: python benchmarks/learning.py [pattern ...] [key=value ...], such as ``"orchard_*"`` or ``bccd_fcos seed=2``.
Default: every ``orchard_*``, ``bccd_*`` and ``dsb2018_*`` of conf/experiment. Minutes are wall-clock from command to
its end, starting Python and the last evaluation included. The table is written after every experiment, so that an
interrupted run keeps its rows; the runs themselves stay beside it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PATTERNS = ("orchard_*", "bccd_*", "dsb2018_*")
FIGURES = ("map", "map_50", "mask_map", "mask_map_50", "miou", "dice")  # shown where the task has them


def machine() -> str:
    """Return the processor, its cores and the load, which decides what the minutes are worth."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    name = names[0] if names else platform.processor() or platform.machine()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{name}, {os.cpu_count()} cores, load before {load}"


def train(name: str, overrides: list[str], root: Path) -> dict[str, Any]:
    """Run one experiment; return its command, minutes, exit code and figures."""
    script = shutil.which("detseg", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("the command detseg is not installed beside this Python; run make setup")
    shown = ["detseg", "train", f"experiment={name}", *overrides]
    print(f"\n== {' '.join(shown)}\n", flush=True)
    start = time.perf_counter()
    code = subprocess.run([script, *shown[1:], f"paths.root={root}"], cwd=REPO).returncode
    minutes = (time.perf_counter() - start) / 60
    found = sorted(root.glob("*/*/metrics.json"))
    figures = json.loads(found[-1].read_text()) if found else {}
    return {"command": " ".join(shown), "minutes": minutes, "code": code, "figures": figures}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, with a column for every figure that some task has."""
    columns = [name for name in FIGURES if any(row["figures"].get(name) is not None for row in rows)]
    lines = ["| command | minutes | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for row in rows:
        values = [row["figures"].get(name) for name in columns]
        cells = ["n/a" if value is None else f"{value:.3f}" for value in values]
        failed = f" (exit {row['code']})" if row["code"] else ""
        lines.append(f"| `{row['command']}`{failed} | {row['minutes']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    overrides = [text for text in arguments if "=" in text]
    patterns = [text for text in arguments if "=" not in text] or list(PATTERNS)
    names = sorted(path.stem for path in (REPO / "conf" / "experiment").glob("*.yaml"))
    chosen = [name for pattern in patterns for name in names if fnmatch(name, pattern)]
    if not chosen:
        raise SystemExit(f"no experiment matches {', '.join(patterns)}; there are {', '.join(names)}")
    folder = REPO / "runs" / "learning" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    head, report, rows = machine(), folder / "table.md", []
    for name in chosen:
        rows.append(train(name, overrides, folder / name))
        report.write_text(f"{head}\n\n{table(rows)}\n", encoding="utf-8")
    print(f"\n{report.read_text(encoding='utf-8')}\nwritten to {report.relative_to(REPO)}")
    return int(any(row["code"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
