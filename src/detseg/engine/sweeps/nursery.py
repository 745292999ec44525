"""What the process from which trials are forked does first, so that a trial starts in tenths of a second.

Importing PyTorch and Lightning takes five seconds. ``multiprocessing``'s fork server does it once, in a process
that has no threads, no GPU and no open study; every trial is a fork of it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

HEAVY = ("optuna", "lightning.pytorch", "torchmetrics", "detseg.tasks", "detseg.callbacks", "detseg.data")
"""What nearly every trial needs; none of it starts a thread or touches a GPU when imported."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone: a trial with this one, and this one with its study."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def lead_session() -> None:
    """Have this process lead a session, and with it a group, of its own, unless it does already.

    It does where the fork server was started before the study, by another part of the program and without this
    module: then a trial imports it, and so prepares, itself.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()


def prepare() -> None:
    """Import what trials need, and leave signals to the study: it tells its trials what to do."""
    die_with_parent()  # multiprocessing's own end takes seconds with all that is imported here
    lead_session()  # Ctrl-C in a terminal reaches a whole group of processes
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a cluster sends it to every process of a job
    for name in HEAVY:
        importlib.import_module(name)


if any("multiprocessing.forkserver" in text for text in sys.orig_argv):  # nowhere else may this do anything
    prepare()
