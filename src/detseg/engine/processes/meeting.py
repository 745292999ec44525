"""Launchers of one run on several machines: who is first, what is run, and how it ended.

The same command is typed on every machine. The one that has ``rdzv``'s address and can listen on its port is the
first; the others take the config from it, whatever they composed themselves, so that also a value drawn at random is
the same everywhere. Then every launcher starts an agent of ``torch.distributed.run`` and watches over the others: a
machine that fails or falls silent ends the run on all.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detseg.config import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

log = logging.getLogger(__name__)

WAIT = 600.0
"""Seconds that the first machine waits for the others, and the others for the first."""

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 10.0
"""Seconds without a sign of life after which a machine counts as lost."""

_stores: dict[str, tuple[TCPStore, bool]] = {}
"""``host:port`` -> store and whether this process is the first: kept, as a sweep's trials meet one after the other."""

_trials: dict[str, int] = {}


@dataclass
class Meeting:
    """One run's place in the store that the machines share.

    Attributes:
        store: used by the calling thread alone; the watch has a connection of its own.
        place: ``host:port``.
        trial: how many runs met there before this one.
        nodes: how many machines there are.
        node: number of this machine; 0 is the first.
        failed: what the watch found out about another machine.
    """

    store: TCPStore
    place: str
    trial: int
    nodes: int
    node: int
    failed: str = ""
    _over: threading.Event = field(default_factory=threading.Event)

    def put(self, name: str, content: Any) -> None:
        """Tell the others something."""
        self.store.set(f"{self.trial}/{name}", json.dumps(content))

    def has(self, name: str) -> bool:
        """Say whether somebody put something under ``name``."""
        return bool(self.store.check([f"{self.trial}/{name}"]))

    def take(self, name: str, seconds: float) -> Any:
        """Return what somebody put under ``name``, or ``None`` after so many seconds, or where the first is gone."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError):  # torch's errors about a connection
            while True:
                if self.has(name):
                    return json.loads(self.store.get(f"{self.trial}/{name}"))
                if time.monotonic() > end or "sign of life" in self.failed:
                    return None
                time.sleep(0.1)
        return None

    def watch(self, stop: Callable[[], None]) -> None:
        """Give signs of life, and call ``stop`` once where another machine failed or gives none."""
        threading.Thread(target=self._watch, args=(stop,), name="detseg-meeting", daemon=True).start()

    def _watch(self, stop: Callable[[], None]) -> None:
        others = [node for node in range(self.nodes) if node != self.node]
        heard = dict.fromkeys(others, (0, time.monotonic()))
        try:
            store = connect(self.place)
            while not self._over.wait(BEAT):
                store.add(f"{self.trial}/beat/{self.node}", 1)
                for node in others:
                    beats = store.add(f"{self.trial}/beat/{node}", 0)
                    if beats != heard[node][0]:
                        heard[node] = (beats, time.monotonic())
                    if store.check([f"{self.trial}/failed/{node}"]):
                        self.failed = f"machine {node} failed"
                    elif time.monotonic() - heard[node][1] > SILENCE:
                        self.failed = f"machine {node} gave no sign of life for {SILENCE:.0f} s"
                if self.failed:
                    break
        except (RuntimeError, ConfigError):
            self.failed = f"the machine that has {self.place} is gone"
        if self.failed and not self._over.is_set():
            stop()

    def close(self) -> None:
        """Give no more signs of life."""
        self._over.set()


def meet(place: str, nodes: int) -> Meeting:
    """Join the other machines of a run.

    Args:
        place: ``host:port``.
        nodes: how many machines there are, this one included.

    Raises:
        ConfigError: there is no place, or more machines than ``nodes`` came.
        TimeoutError: nobody listens there.
    """
    address(place)
    trial = _trials[place] = _trials.get(place, -1) + 1
    if place not in _stores:
        _stores[place] = open_store(place)
    store, first = _stores[place]
    node = 0 if first else int(store.add(f"{trial}/nodes", 1))
    if node >= nodes:
        raise ConfigError(f"{node + 1} machines came to rdzv={place}, but nodes={nodes}")
    return Meeting(store=store, place=place, trial=trial, nodes=nodes, node=node)


def wait_for_others(meeting: Meeting) -> None:
    """Wait until all machines are there.

    Raises:
        TimeoutError: some do not come.
    """
    end, said = time.monotonic() + WAIT, 0.0
    while (come := 1 + int(meeting.store.add(f"{meeting.trial}/nodes", 0))) < meeting.nodes:
        if time.monotonic() > end:
            raise TimeoutError(
                f"{come} of {meeting.nodes} machines came to rdzv={meeting.place} within {WAIT:.0f} s; type the same "
                "command on each, and let the others reach that port"
            )
        if not said:
            said = time.monotonic()
            log.info("waiting for %d of %d machines at %s", meeting.nodes - come, meeting.nodes, meeting.place)
        time.sleep(0.1)


def address(place: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        ConfigError: ``place`` is not ``host:port``.
    """
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"rdzv={place or 'null'}: several machines need host:port where they meet, an address of one of them and a "
            "port that is free there, such as rdzv=node1:29400"
        )
    return host.strip("[]"), int(port)


def open_store(place: str) -> tuple[TCPStore, bool]:
    """Return the store at ``place``, and whether this process is the one that holds it."""
    from torch._C._distributed_c10d import TCPStore

    host, port = address(place)
    if is_own(host):
        with suppress(RuntimeError):  # the port is taken: another launcher on this machine was here before
            wait = timedelta(seconds=WAIT)
            return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=wait, use_libuv=True), True
    return connect(place), False


def connect(place: str) -> TCPStore:
    """Return a connection to the store at ``place``.

    Raises:
        TimeoutError: nobody listens there.
    """
    from torch._C._distributed_c10d import TCPStore

    host, port = address(place)
    end = time.monotonic() + WAIT
    while True:  # torch's own attempts print a warning each
        with suppress(OSError), socket.create_connection((host, port), timeout=5):
            break
        if time.monotonic() > end:
            raise TimeoutError(f"rdzv={place}: nobody listens there after {WAIT:.0f} s")
        time.sleep(0.2)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


def is_own(host: str) -> bool:
    """Say whether ``host`` is an address of this machine."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True


def own_address(place: str) -> str:
    """Return the address of this machine from which ``place`` is reached."""
    host, port = address(place)
    family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def interface(own: str) -> str:
    """Return the network interface that has an address, or nothing where that cannot be found out."""
    try:
        import fcntl
        import struct
    except ImportError:  # Windows
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return ""


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def discard(directory: Path) -> None:
    """Remove the directory that Hydra made on a machine which is not the first, and whose run has another.

    It holds what was composed here, which was not what ran. Anything else in it stays.
    """
    shutil.rmtree(directory / ".hydra", ignore_errors=True)
    for name in ("train.log", "overrides.json"):
        (directory / name).unlink(missing_ok=True)
    sweep = {directory.parent / name for name in ("multirun.yaml", "overrides.json")}
    if set(directory.parent.iterdir()) <= {*sweep, directory}:
        for path in sweep:
            path.unlink(missing_ok=True)
    for folder in (directory, directory.parent):
        with suppress(OSError):  # not empty
            folder.rmdir()
