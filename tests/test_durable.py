"""Atomic, sealed files: what a kill, a full disk, a flipped bit and a foreign file do to them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from detseg import atomic
from detseg.durable import (
    Damaged,
    Seal,
    WriteFailed,
    check_seal,
    link_or_copy,
    newest_valid,
    read_sealed,
    sweep,
    write_atomic,
    write_sealed,
)
from detseg.nn.weights import read_plain
from shared import REPO


def content(step: int = 3, size: int = 10) -> dict[str, Any]:
    return {"global_step": step, "w": torch.arange(float(size))}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def other_file_system(than: Path) -> Path | None:
    places = [Path("/dev/shm"), Path(tempfile.gettempdir()), Path.home()]
    return next((place for place in places if place.is_dir() and place.stat().st_dev != than.stat().st_dev), None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of its own; skips where that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(place)
        return place

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", str(place)], check=True)


def test_a_sealed_file_is_a_file_of_torchs(tmp_path):
    path = tmp_path / "a" / "last.ckpt"
    size = write_sealed(content(7), path)
    assert size == path.stat().st_size
    for mmap in (False, True):
        assert_close(torch.load(path, weights_only=True, mmap=mmap)["w"], torch.arange(10.0))
    assert zipfile.ZipFile(path).testzip() is None
    seal = check_seal(path)
    assert seal is not None and seal.step == 7 and seal.time > 1.7e18
    assert_close(read_sealed(path)["w"], torch.arange(10.0))
    assert names(path.parent) == {"last.ckpt"}


def test_rights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_sealed(content(), tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.ckpt").stat().st_mode) == 0o640


def test_every_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sealed(content(), path)
    whole, missed = path.read_bytes(), []
    positions = [(index, index % 8) for index in range(len(whole))]
    positions += [(index, bit) for index in range(len(whole) - 260, len(whole)) for bit in range(8)]
    for index, bit in positions:
        raw = bytearray(whole)
        raw[index] ^= 1 << bit
        path.write_bytes(raw)
        try:
            check_seal(path)
            missed.append((index, bit))
        except Damaged:
            pass
    assert missed == [] and len(positions) > 3000
    assert newest_valid(tmp_path) is None
    with pytest.raises(ValueError, match="damaged") as caught:
        read_plain(path, "checkpoint")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sealed(content(), path)
    whole = path.read_bytes()
    for length in [*range(0, 12), *range(12, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert newest_valid(tmp_path) is None, length
        with pytest.raises(ValueError, match=r"a\.ckpt") as caught:
            read_plain(path, "checkpoint")
        assert "\n" not in str(caught.value), length


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_foreign_files_are_refused_in_one_line_and_nothing_in_them_runs(tmp_path):
    canary = tmp_path / "canary"
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", "hello")
        archive.comment = b"made by another program"
    trapped = io.BytesIO()
    torch.save({"state_dict": Trap(canary)}, trapped)
    foreign = {
        "empty": b"",
        "text": b"learning rates and such\n" * 40,
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "zip": zipped.getvalue(),
        "pickle": pickle.dumps(Trap(canary), protocol=2),
        "torch": trapped.getvalue(),
        "noise": bytes(range(256)) * 8,
    }
    for name, raw in foreign.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name}.bin") as caught:
            read_plain(path, "checkpoint")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, name
    assert not canary.exists()
    with pytest.raises(ValueError, match="0 bytes"):
        read_plain(tmp_path / "empty.bin", "checkpoint")


def test_files_without_a_seal_still_load(tmp_path):
    for name, modern in (("zip", True), ("legacy", False)):
        path = tmp_path / f"{name}.pth"
        torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=modern)
        assert check_seal(path) is None
        assert_close(read_plain(path, "weights file")["w"], torch.ones(3))


def test_the_newest_is_by_steps_and_then_by_time_and_damaged_ones_are_passed_over(tmp_path, caplog):
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "missing") is None
    torch.save(content(99), tmp_path / "old.ckpt")
    assert newest_valid(tmp_path) == tmp_path / "old.ckpt"  # of an older version, without a seal
    write_sealed(content(20), tmp_path / "a.ckpt")
    write_sealed(content(10), tmp_path / "b.ckpt")
    assert newest_valid(tmp_path) == tmp_path / "a.ckpt"
    write_sealed(content(20), tmp_path / "0.ckpt")
    assert newest_valid(tmp_path) == tmp_path / "0.ckpt"
    for name in ("0.ckpt", "a.ckpt", "b.ckpt", "old.ckpt"):
        os.utime(tmp_path / name, (1, 1))  # as after copying
        assert newest_valid(tmp_path) == tmp_path / name
        raw = bytearray((tmp_path / name).read_bytes())
        raw[raw.find(torch.arange(10.0).numpy().tobytes()) + 9] ^= 16
        (tmp_path / name).write_bytes(raw)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            newest_valid(tmp_path)
        assert f"{name} is damaged" in caplog.text
    assert newest_valid(tmp_path) is None
    assert Seal(step=2, time=1) > Seal(step=1, time=9)


def test_what_is_replaced_can_be_kept(tmp_path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "last-1.ckpt"
    steps = []
    for step in (1, 2, 3):
        write_sealed(content(step), last, previous=previous)
        steps.append((check_seal(last).step, check_seal(previous).step if previous.exists() else None))
    assert steps == [(1, None), (2, 1), (3, 2)]
    assert names(tmp_path) == {"last.ckpt", "last-1.ckpt"}


def test_two_names_of_one_file(tmp_path):
    best, last, previous = (tmp_path / f"{name}.ckpt" for name in ("best", "last", "last-1"))
    write_sealed(content(1), last)
    write_sealed(content(2), best)
    for _ in range(2):  # the second changes nothing
        link_or_copy(best, last, previous=previous)
        assert best.samefile(last) and check_seal(previous).step == 1
    write_sealed(content(3), last, previous=previous)
    assert (check_seal(best).step, check_seal(last).step) == (2, 3) and best.samefile(previous)
    assert names(tmp_path) == {"best.ckpt", "last.ckpt", "last-1.ckpt"}


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    best, last, previous = (tmp_path / f"{name}.ckpt" for name in ("best", "last", "last-1"))
    write_sealed(content(1), last)
    write_sealed(content(2, size=2_000_000), best)  # of more than one block
    link_or_copy(best, last, previous=previous)
    assert not best.samefile(last) and best.read_bytes() == last.read_bytes()
    assert check_seal(last).step == 2 and check_seal(previous).step == 1
    assert names(tmp_path) == {"best.ckpt", "last.ckpt", "last-1.ckpt"}


def test_across_file_systems_files_are_copied(tmp_path):
    place = other_file_system(tmp_path)
    if place is None:
        pytest.skip("there is one file system alone")
    write_sealed(content(4), tmp_path / "best.ckpt")
    with tempfile.TemporaryDirectory(dir=place) as other:
        link_or_copy(tmp_path / "best.ckpt", Path(other) / "best.ckpt")
        assert check_seal(Path(other) / "best.ckpt").step == 4 and names(Path(other)) == {"best.ckpt"}


def test_a_sweep_spares_what_is_being_written(tmp_path):
    orphan, alive = tmp_path / ".last.ckpt.0a1b2c3d.part", tmp_path / ".best.ckpt.0a1b2c3d.part"
    orphan.write_bytes(b"half"), (tmp_path / ".hidden").write_bytes(b""), (tmp_path / "a.part").write_bytes(b"")
    with alive.open("wb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        assert sweep(tmp_path) == [orphan]
        assert alive.exists() and not orphan.exists()
    write_atomic(tmp_path / "note.txt", "grün")  # a writer sweeps too
    assert names(tmp_path) == {".hidden", "a.part", "note.txt"}
    assert (tmp_path / "note.txt").read_bytes() == "grün".encode()
    assert sweep(tmp_path / "missing") == []


def test_a_full_disk_says_what_is_needed_and_free_and_leaves_the_earlier_file(small_disk):
    place = small_disk("size=1m")
    path = place / "last.ckpt"
    write_sealed(content(1, size=100_000), path)  # 0.4 MB
    with pytest.raises(WriteFailed, match="No space left") as caught:
        write_sealed(content(2, size=1_000_000), path, previous=place / "last-1.ckpt")
    assert "4.0 MB are needed" in str(caught.value) and "0.6 MB are free" in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.errno == errno.ENOSPC
    assert check_seal(path).step == 1 and names(place) == {"last.ckpt"}
    with pytest.raises(WriteFailed, match=r"5\.0 MB are needed"):
        write_atomic(place / "table.csv", bytes(5_000_000))
    assert names(place) == {"last.ckpt"}


def test_a_file_too_large_for_the_disk_without_root(tmp_path):
    path = tmp_path / "last.ckpt"
    write_sealed(content(1), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match=r"File too large; 0\.4 MB are needed"):
            write_sealed(content(2, size=100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert check_seal(path).step == 1 and names(tmp_path) == {"last.ckpt"}


def test_a_read_only_directory_is_an_error(small_disk):
    place = small_disk("size=1m")
    write_sealed(content(1), place / "last.ckpt")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(WriteFailed, match="Read-only file system") as caught:
        write_sealed(content(2), place / "last.ckpt")
    assert "MB are free" in str(caught.value) and "\n" not in str(caught.value)
    assert newest_valid(place) == place / "last.ckpt" and check_seal(place / "last.ckpt").step == 1


def test_a_directory_that_one_may_not_write_is_an_error():
    place, root = Path(tempfile.mkdtemp()), os.geteuid() == 0  # of pytest's own only its owner may look into
    write_sealed(content(1), place / "last.ckpt")
    place.chmod(0o555)
    try:
        if root:
            os.seteuid(65534)  # nobody: root may write everywhere
        with pytest.raises(WriteFailed, match="Permission denied"):
            write_sealed(content(2), place / "last.ckpt")
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o700)
    assert check_seal(place / "last.ckpt").step == 1
    assert os.listdir(place) == ["last.ckpt"]
    shutil.rmtree(place)


def test_an_interruption_passes_through_and_leaves_nothing(tmp_path, monkeypatch):
    write_sealed(content(1), tmp_path / "last.ckpt")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sealed(content(2), tmp_path / "last.ckpt")
    assert check_seal(tmp_path / "last.ckpt").step == 1 and names(tmp_path) == {"last.ckpt"}


CALLS = ("open", "fsync", "link", "replace", "unlink")


def killed_at(number: int, directory: Path) -> bool:
    """Save in a process that kills itself before its ``number``-th step that the disk sees; say whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        atomic.Sink._emit = counted(atomic.Sink._emit)
        write_sealed(content(2), directory / "best.ckpt")
        link_or_copy(directory / "best.ckpt", directory / "last.ckpt", previous=directory / "last-1.ckpt")
        write_sealed(content(3), directory / "last.ckpt", previous=directory / "last-1.ckpt")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow  # 70 processes of the size of this one
def test_killed_between_any_two_steps_there_is_a_valid_checkpoint(tmp_path):
    number, found = 0, []
    killed = True
    while killed:
        number += 1
        directory = tmp_path / str(number)
        write_sealed(content(1), directory / "best.ckpt")
        write_sealed(content(1), directory / "last.ckpt")
        killed = killed_at(number, directory)
        assert {"best.ckpt", "last.ckpt"} <= names(directory), number
        for name in ("best.ckpt", "last.ckpt"):
            assert check_seal(directory / name) is not None, (number, name)
        newest = newest_valid(directory)
        found.append(check_seal(newest).step)
        assert names(directory) <= {"best.ckpt", "last.ckpt", "last-1.ckpt"}, number
    assert number > 60 and found == sorted(found) and set(found) == {1, 2, 3}


@pytest.mark.slow
def test_fifty_kills_while_saving_with_the_temporary_directory_elsewhere(tmp_path):
    elsewhere = other_file_system(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO / "tests"), *sys.path])}
    if elsewhere is not None:
        environment["TMPDIR"] = str(elsewhere)
    program = [sys.executable, str(REPO / "tests" / "killed_saves.py"), str(tmp_path / "run"), "50"]
    process = subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    told = json.loads(out.splitlines()[-1])
    assert told["unreadable"] == 0 and told["orphans"] == 0
    assert len(told["steps"]) == 50 and told["steps"] == sorted(told["steps"]), told  # nothing saved is lost
    assert told["hit"] >= 10, told  # so many died with a file half written
    assert told["steps"][-1] > 40 and set(told["files"]) <= {"best.ckpt", "last.ckpt", "last-1.ckpt"}
