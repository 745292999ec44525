"""The augmented training set of VOC 2012, with the masks of SBD (Hariharan et al., ICCV 2011).

It has 10,582 images, none of which is in VOC's validation set. What papers call train_aug is all of SBD and VOC's train
without VOC's val; where VOC has a mask it is VOC's, with the border of 255 between objects, which SBD's lack. SBD's
masks are MATLAB files and become index PNGs once.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detseg.atomic import write_atomic
from detseg.data.check import DataError
from detseg.data.pairs import read_names
from detseg.data.source import merge


class TrainAug:
    """Writes ``SegmentationClassAug`` and ``ImageSets/Segmentation/train_aug.txt`` below the root of VOC 2012.

    Args:
        sbd: folder below the root with SBD's ``cls``, ``train.txt`` and ``val.txt``.
    """

    def __init__(self, *, sbd: str = "sbd") -> None:
        self.sbd = sbd

    def ready(self, root: Path) -> bool:
        """Say whether the list is there, which is written last."""
        return _lists(root).joinpath("train_aug.txt").is_file()

    def provide(self, root: Path) -> None:
        """Write masks and list.

        Raises:
            DataError: SBD or VOC is not there, a file of SBD is broken, or scipy, which reads it, is missing.
        """
        own = {split: _names(_lists(root) / f"{split}.txt") for split in ("train", "val")}
        others = [name for split in ("train", "val") for name in _names(root / self.sbd / f"{split}.txt")]
        held_out = set(own["val"])
        names = sorted({*own["train"], *others} - held_out)
        folder = Path(tempfile.mkdtemp(prefix=".unpack.", dir=root))
        try:
            for name in [*names, *own["val"]]:
                mask = root / "SegmentationClass" / f"{name}.png"
                if mask.is_file():
                    shutil.copyfile(mask, folder / f"{name}.png")
                else:
                    values = read_sbd(root / self.sbd / "cls" / f"{name}.mat")
                    Image.fromarray(values).save(folder / f"{name}.png")
            folder.chmod(0o755)  # mkdtemp's is for one user
            target = root / "SegmentationClassAug"
            if target.exists():  # a user's own, or of a start that was ended before the list was written
                merge(folder, target)
            else:
                folder.rename(target)
            write_atomic(_lists(root) / "train_aug.txt", "\n".join(names) + "\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def read_sbd(file: Path) -> NDArray[np.uint8]:
    """Return the classes ``(H, W)``, 0 background and 1 to 20 as in VOC, of a file of SBD's ``cls``.

    Raises:
        DataError: the file is missing or of another form, or scipy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{file}: scipy reads SBD's MATLAB files and is missing; install detseg[sbd]") from error
    if not file.is_file():
        raise DataError(f"{file}: no such file, but SBD's lists or VOC's train name it")
    try:
        values = loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # scipy raises what it happens upon in a broken file
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: not a mask of SBD ({why})") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise DataError(f"{file}: a mask of SBD is (H, W) of 8 bits, this is {values.shape} {values.dtype}")
    return np.asarray(values, np.uint8)


def _lists(root: Path) -> Path:
    return root / "ImageSets" / "Segmentation"


def _names(file: Path) -> list[str]:
    return read_names(file, set())
