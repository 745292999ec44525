"""Entry point of ``detseg``. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

VERBS = {
    "train": "train a model, measure its best checkpoint, draw its predictions",
    "tune": "search over hyperparameters; trials in processes of their own, a table at the end",
    "find": "find a learning rate (find lr) or the largest batch that fits (find batch)",
    "propose": "make the proposals of a data set once, keep them, and say what they cover",
    "anchors": "find the anchors that cover the boxes of a data set best, by k-means",
    "evaluate": "measure a checkpoint; write predictions.json and metrics.json",
    "predict": "find things in photos; write pictures and JSON",
    "dashboard": "open TensorBoard or MLflow on the runs below a directory",
    "replay": "do a step again whose loss or gradient was not finite; name the first layer",
}

USAGE = """detseg: detection and segmentation experiments, every system a choice in a config

usage: detseg <verb> [group=choice ...] [key=value ...]

{verbs}

examples:
  detseg train                                      a small FCOS on the embedded data set
  detseg train model=unet_small trainer.max_epochs=3
  detseg train -m model=fcos_small,retinanet_small seed=1,2
  detseg tune 'optimizer.lr=tag(log,interval(1e-4,1e-2))' tune.trials=20
  detseg evaluate ckpt=runs/<name>/<id>/checkpoints/best.ckpt
  detseg predict ckpt=runs/<name>/<id>/checkpoints/best.ckpt source=photos/

`detseg <verb> --help` lists groups, choices and keys. `detseg --version` prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code: 0 done, 1 failed, 2 asked for something that does not exist.

    Args:
        arguments: default: those of the command line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"detseg {version('detseg')}")
        return 0
    verb, rest = given[0], given[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"detseg: there is no verb '{verb}'.{hint} Verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    from detseg.cli.verbs import run_verb

    return run_verb(verb, rest)


def usage() -> str:
    """Return the text of ``detseg --help``."""
    return USAGE.format(verbs="\n".join(f"  {verb:<10}{meaning}" for verb, meaning in VERBS.items()))


if __name__ == "__main__":
    sys.exit(main())
