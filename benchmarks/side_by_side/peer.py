"""How a benchmark calls Ultralytics (AGPL), which lives in an environment of its own and is never a dependency."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("ultralytics_peer.py")
HOW = (
    "python -m venv PEER && PEER/bin/pip install ultralytics, then --peer-python PEER/bin/python "
    "(a .pth file in PEER that names our site-packages, and pip's --no-deps, save a second torch)"
)


def skipped(part: str) -> str:
    """Return the line that stands in place of a part without its peer."""
    return f"{part}: skipped, no Ultralytics given. {HOW}"


def call(python: Path, command: str, folder: Path) -> None:
    """Run a command of the peer's script in a folder.

    Raises:
        RuntimeError: it failed; the message has the end of what it wrote.
    """
    own = {
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(folder),
        "WANDB_MODE": "disabled",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, SCRIPT, command, folder],
        cwd=folder,
        env=inherited | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{python} {SCRIPT.name} {command}: exit {done.returncode}\n{done.stdout[-3000:]}")
