"""Ultralytics as a black box: run by a Python that has it, never imported by anything of ours.

    PEER-PYTHON benchmarks/side_by_side/ultralytics_peer.py assign FOLDER
    PEER-PYTHON benchmarks/side_by_side/ultralytics_peer.py train FOLDER

Tensors and numbers come and go through files of the folder; only its documented interface is called. ``assign``
reads ``assign.pt`` and writes ``assigned.pt``; ``train`` reads ``train.json`` and writes ``trained.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def assign(folder: Path) -> None:
    """Assign the objects of a batch several times; keep the seconds and the last result."""
    from ultralytics.utils.tal import TaskAlignedAssigner

    given = torch.load(folder / "assign.pt", weights_only=True)
    torch.set_num_threads(given.pop("threads"))
    rounds, settings = given.pop("rounds"), given.pop("settings")
    assigner = TaskAlignedAssigner(**settings)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        _, _, scores, foreground, objects = assigner(**given)
        seconds.append(time.perf_counter() - start)
    # (B, N) each; the first round does not count.
    result = {"scores": scores.amax(-1), "matched": torch.where(foreground, objects, -1), "seconds": seconds[1:]}
    torch.save(result, folder / "assigned.pt")


def train(folder: Path) -> None:
    """Train and keep the moment at which each epoch ended, its validation included."""
    import ultralytics

    given = json.loads((folder / "train.json").read_text())
    ends: list[float] = []
    threads = given.pop("threads")
    model = ultralytics.YOLO(given.pop("model"))
    # It sets the threads itself when training begins: to one fewer than there are cores.
    model.add_callback("on_train_epoch_start", lambda trainer: torch.set_num_threads(threads))
    model.add_callback("on_fit_epoch_end", lambda trainer: ends.append(time.perf_counter()))
    model.train(**given)
    epochs = ends[: given["epochs"]]  # the best weights are measured once more afterwards
    (folder / "trained.json").write_text(json.dumps({"ends": epochs, "version": ultralytics.__version__}))


if __name__ == "__main__":
    {"assign": assign, "train": train}[sys.argv[1]](Path(sys.argv[2]))
