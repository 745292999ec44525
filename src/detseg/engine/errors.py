"""What a process says and returns when a run fails: errors that a user can mend take one line."""

from __future__ import annotations

import logging
import warnings
from urllib.error import URLError

from detseg.config import ConfigError
from detseg.secrecy import redact

MENDABLE = (ConfigError, ValueError, FloatingPointError, ImportError, MemoryError, OSError)
"""Errors that a user can mend: one line instead of a traceback."""


class WorkerFailed(ChildProcessError):
    """A process of a run with several ended with an error; the message names its rank.

    Attributes:
        code: exit code of that process, which the command passes on.
        kind: name of the error's class there, such as ``"ConfigError"``; empty where a signal ended it.
        follows: whether it only lost its connection to a process that had failed before.
        trace: where the error arose in that process; empty where a user can mend it.
    """

    def __init__(self, message: str, *, code: int = 1, kind: str = "", follows: bool = False, trace: str = "") -> None:
        super().__init__(message)
        self.code, self.kind, self.follows, self.trace = code, kind, follows, trace


def said(error: BaseException) -> str:
    """Return an error's message without secrets; of one from a data worker, which has a traceback, its own part."""
    if str(error).startswith("Unable to configure handler") and error.__cause__ is not None:
        error = error.__cause__  # Hydra's train.log: what matters is why
    text = redact(str(error))
    if isinstance(error, URLError):
        return f"cannot download ({text}); for published weights give a file instead, or null"
    if not (text.startswith("Caught ") and "Original Traceback" in text):
        return text
    kind = type(error)
    names = (f"{kind.__module__}.{kind.__qualname__}: ", f"{kind.__qualname__}: ")
    return next((text.rpartition(f"\n{name}")[2].strip() for name in names if f"\n{name}" in text), text)


def exit_code(error: BaseException) -> int:
    """Return 2 where what was asked for does not exist, what a failed process returned, or 1."""
    if isinstance(error, WorkerFailed):
        return error.code
    return 2 if isinstance(error, ConfigError | FileNotFoundError) else 1


def quiet() -> None:
    """Keep Lightning's tips and device lines out of a run's output; warnings stay."""
    import lightning.pytorch  # it sets its loggers' levels when it is imported

    assert lightning.pytorch
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.14 in the old way; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # The task logs such epochs all the same: once each.
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    # The task's figures are of all ranks before they are logged.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
