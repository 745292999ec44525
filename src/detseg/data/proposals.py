"""Samples with proposals: made once per image, kept on disk, read by whoever loads the image.

A split is filled by several processes before training; what is missing later is made where it is missed.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from detseg.data.loader import LateLoader, calm_worker
from detseg.data.proposal_cache import FORMAT, ProposalCache, digest_of
from detseg.data.sample import Sample, SampleDataset
from detseg.data.watch import Watch
from detseg.ops.proposer import Proposer

REPORT_SECONDS = 30
"""Between two lines about a filling, where nobody watches a terminal."""

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """What a filling says of one image.

    Attributes:
        image: its number in the split.
        digest: the name of its pixels.
        boxes: how many proposals it has.
        seconds: what their making took; 0 where they were there.
    """

    image: int
    digest: str
    boxes: int
    seconds: float


@dataclass
class Filling:
    """What a filling came to.

    Attributes:
        images: in the split.
        made: of these, those whose proposals were not there.
        boxes: of the images that were looked at, all together.
        seconds: of work on those that were made, over all processes.
        finished: whether the split was known to be complete, so that no image was looked at.
    """

    images: int
    made: int = 0
    boxes: int = 0
    seconds: float = 0.0
    finished: bool = False


class ProposedDataset(SampleDataset):
    """The samples of a split, each with ``target.proposals``.

    Args:
        samples: untransformed, without proposals.
        proposer: makes them, from the image as it is in the files.
        name: of the split, for messages.
    """

    def __init__(self, *, samples: SampleDataset, proposer: Proposer, name: str = "") -> None:
        self.samples, self.proposer, self.name = samples, proposer, name
        self.class_names, self.category_ids = samples.class_names, samples.category_ids
        root: Path | None = getattr(samples, "root", None)
        self.cache = ProposalCache(key=proposer.key, root=root)
        self._digests: list[str] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, target, truth = self.samples[index]
        digest = digest_of(image) if self._digests is None else self._digests[index]
        return Sample(image, replace(target, proposals=self._boxes(digest, image)), truth)

    def file_of(self, index: int) -> str:
        """Return where image ``index`` comes from, for messages."""
        return self.samples.file_of(index)

    def prepare(self) -> None:
        """Let the samples do what pays before workers start."""
        self.samples.prepare()

    def make(self, index: int) -> Made:
        """See to it that the proposals of image ``index`` are kept."""
        image = self.samples[index].image
        digest = digest_of(image)
        kept, start = self.cache.read(digest), time.perf_counter()
        boxes = self._make(digest, image) if kept is None else kept
        return Made(index, digest, len(boxes), 0.0 if kept is not None else time.perf_counter() - start)

    def fill(self, *, workers: int = 0, rank: int = 0, world_size: int = 1) -> Filling:
        """Make all proposals that are missing.

        Several processes, and several runs, may do so at once: each goes through the images in another order and
        leaves out what the others have made. Killed at any moment, a later filling goes on where this one was.

        Args:
            workers: processes that make them; 0 does so in this one.
            rank: of this process among those of its run, the first of which says how far it is.
            world_size: their number.

        Raises:
            DataError: an image cannot be read, or a worker died; the message names the image.
        """
        images, identity = len(self), self._identity()
        if identity is not None:
            self._digests = self.cache.read_split(identity, images)
            if self._digests is not None:
                return Filling(images=images, finished=True)
        filling, digests = Filling(images=images), [""] * images
        self.prepare()
        places = np.roll(np.arange(images), -(rank * images // world_size))  # ranks meet where all is done
        if world_size == 1:  # in one order, runs that met would make the rest side by side, each image twice
            places = np.random.default_rng(secrets.randbits(64)).permutation(images)
        with _progress(self.name, images, show=rank == 0) as tell:
            for done, made in enumerate(self._all(places.tolist(), workers), start=1):
                digests[made.image] = made.digest
                filling.made, filling.boxes = filling.made + (made.seconds > 0), filling.boxes + made.boxes
                filling.seconds += made.seconds
                tell(filling, done)
        self._digests = digests
        if identity is not None:
            self.cache.write_split(identity, digests)
        if filling.made and rank == 0:
            each = filling.seconds / filling.made
            log.info(
                "proposals of split %s: %d images, %.2f s each, by %s", self.name, filling.made, each, self.cache.key
            )
        return filling

    def _boxes(self, digest: str, image: Tensor) -> Tensor:
        """Return the proposals ``(N, 4)`` of an image, made and kept if they were not."""
        boxes = self.cache.read(digest)
        return self._make(digest, image) if boxes is None else boxes

    def _make(self, digest: str, image: Tensor) -> Tensor:
        boxes = self.proposer(image.as_subclass(Tensor))  # (N, 4)
        self.cache.write(digest, boxes)
        return boxes

    def _all(self, indices: list[int], workers: int) -> Iterable[Made]:
        """Yield every image in the order of ``indices``, each as soon as it is done and those before it."""
        work = _Work(self, indices)
        if workers == 0:
            return (work[place] for place in range(len(indices)))
        work.watch = Watch(workers=workers, split=self.name, file_of=self.file_of)
        loader = LateLoader(
            cast(Dataset[Sample], work),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=calm_worker,
            collate_fn=cast(Any, _as_it_is),
        )
        return cast(Iterable[Made], loader)

    def _identity(self) -> str | None:
        """Return a name that is another one as soon as an image changes; ``None`` where only pixels could tell."""
        told = [self.samples.identity(index) for index in range(len(self))]
        if not all(told):
            return None
        return hashlib.blake2b("\0".join([str(FORMAT), *told]).encode(), digest_size=16).hexdigest()


class _Work(Dataset[Made]):
    """What the workers of a filling are given."""

    def __init__(self, split: ProposedDataset, indices: list[int]) -> None:
        self.split, self.indices = split, indices
        self.watch: Watch | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Made:
        index = self.indices[place]
        with nullcontext() if self.watch is None else self.watch.reading(0, index):
            return self.split.make(index)


def _as_it_is(made: Made) -> Made:
    return made


@contextmanager
def _progress(name: str, images: int, *, show: bool) -> Iterator[Callable[[Filling, int], None]]:
    """Yield what is told about every image: a bar on a terminal, elsewhere a line now and then."""
    if not show:
        yield lambda filling, done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"proposals of split {name}", total=images)
            yield lambda filling, done: bar.update(task, completed=done)
    else:
        last = time.monotonic()

        def tell(filling: Filling, done: int) -> None:
            nonlocal last
            if time.monotonic() - last > REPORT_SECONDS:
                last = time.monotonic()
                log.info("proposals of split %s: %d of %d images, %d made", name, done, images, filling.made)

        yield tell
