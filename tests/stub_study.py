"""A study whose trials train nothing: their figure is a known function of the learning rate, whose best value is 1.

``python stub_study.py overrides...`` searches as ``detseg tune`` does.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from detseg.durable import read_sealed, write_sealed
from detseg.engine.sweeps.tune import tune
from detseg.experiment import Outcome

EPOCHS = 5
EPOCH_SECONDS = 0.03
CRASHES = {3: "raise", 8: "kill", 12: "exit"}  # by number of the trial


def quality(lr: float) -> float:
    return 1 - 0.1 * (math.log10(lr) + 3) ** 2


def objective(cfg: DictConfig) -> Outcome:
    """Take five epochs, each noted in a file; go on behind the last one with ``resume``."""
    from detseg.callbacks.pruning import Pruning  # with Lightning, which the trials' processes have loaded already

    directory = Path(cfg.paths.output_dir)
    (directory / "pid").write_text(str(os.getpid()))
    node = (cfg.callbacks or {}).get("pruning")
    pruning = None if node is None else Pruning(**{key: value for key, value in node.items() if key != "_target_"})
    if node is not None and os.environ.get("STUB_CRASHES"):
        crash(CRASHES.get(node.trial))
    notes = directory / "epochs"
    begun = 0 if cfg.resume is None else int(read_sealed(cfg.resume)["global_step"])
    noted = notes.read_text().splitlines(keepends=True) if notes.exists() else []
    assert begun <= len(noted) <= begun + 1, "more than the epoch under way was lost"
    notes.write_text("".join(noted[:begun]))
    best = quality(cfg.optimizer.lr) + 0.001 * (cfg.seed - 1)
    for epoch in range(begun + 1, EPOCHS + 1):
        time.sleep(EPOCH_SECONDS)
        with notes.open("a") as file:
            file.write(f"{epoch}\n")
        write_sealed({"global_step": epoch}, directory / "checkpoints" / "last.ckpt")
        if pruning is not None and pruning.report(epoch, best * (1 - 0.5**epoch)) and epoch < EPOCHS:
            pruning.stop(epoch)
            break
    return Outcome(directory=directory, figures={"map": best, "other": 1.0}, monitor="map")


def crash(how: str | None) -> None:
    if how == "raise":
        raise ValueError("planted: the loss\nwent to the moon")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)


def surroundings(cfg: DictConfig) -> Outcome:
    """Give back what the process may use."""
    import torch

    cores = os.sched_getaffinity(0)
    figures = {"map": float(min(cores)), "cores": float(len(cores)), "threads": float(torch.get_num_threads())}
    print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ["OMP_NUM_THREADS"])
    print("cores", sorted(cores), "torch", torch.get_num_threads(), "leader", os.getpgid(0) == os.getpid())
    return Outcome(directory=Path(cfg.paths.output_dir), figures=figures, monitor="map")


if __name__ == "__main__":
    import stub_study  # under its own name, by which the trials' processes find it

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    tune(*sys.argv[1:], objective=stub_study.objective)
