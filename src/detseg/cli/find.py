"""``detseg find lr`` and ``detseg find batch``: what they print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from omegaconf import DictConfig

from detseg.config import ConfigError, load_config

WHAT = {
    "lr": "a learning rate, from a short run in which it rises",
    "batch": "the largest batch that fits, tried in processes of their own",
}


def find(arguments: Sequence[str]) -> None:
    """Find ``arguments[0]`` for what the overrides after it describe.

    Raises:
        ConfigError: there is nothing of that name to find.
    """
    what, overrides = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if what not in WHAT or [text for text in overrides if text.startswith("-")]:
        choices = "; ".join(f"detseg find {name} [key=value ...]: {meaning}" for name, meaning in WHAT.items())
        raise ConfigError(
            f"detseg find takes lr or batch, then overrides, not {' '.join(arguments) or 'nothing'}. {choices}"
        )
    cfg = load_config(*overrides, name="find")
    typed = shlex.join(["detseg", "train", *(text for text in overrides if not text.startswith("find."))])
    (find_rate if what == "lr" else find_size)(cfg, typed)


def find_rate(cfg: DictConfig, typed: str) -> None:
    """Find a learning rate and print it as an override."""
    from detseg.engine.finders.lr_finder import find_lr

    curve, picture = find_lr(cfg)
    print(f"{len(curve.losses)} steps from {curve.rates[0]:.3g} to {curve.rates[-1]:.3g}" + _because(curve.stopped))
    print(f"the loss falls between {curve.begins:.2g} and {curve.ends:.2g}")
    print(f"picture     {picture}")
    print(f"{typed} optimizer.lr={curve.suggestion:g}")


def find_size(cfg: DictConfig, typed: str) -> None:
    """Find a batch size and print it as an override.

    Raises:
        ConfigError: not even one image fits.
    """
    from detseg.engine.finders.batch_finder import Attempt, find_batch, override_line

    def tell(attempt: Attempt) -> None:
        told = (
            f"{attempt.bytes / 1e9:8.2f} GB  {attempt.seconds:8.3f} s"
            if attempt.fits
            else f"too large: {attempt.reason}"
        )
        print(f"{attempt.images:6d} images  {told}", flush=True)

    found = find_batch(cfg, tell=tell)
    height, width = found.worst.size
    print(f"worst batch: {height}x{width} pixels, {len(found.worst.target)} objects an image (of {found.worst.images})")
    if found.images == 0:
        raise ConfigError("not even one such image fits: make data.train_transform's images smaller, or the model")
    print(f"{typed} {override_line(found.images, cfg.data.batch_size, cfg.trainer.accumulate_grad_batches)}")


def _because(reason: str) -> str:
    return f"; ended early: {reason}" if reason else ""
