from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from detseg.data import proposal_cache
from detseg.data.proposal_cache import FORMAT, HEAD, ProposalCache, decode, digest_of, encode, may_write

DIGEST = "ab" + "0" * 30


def whole(count: int = 500) -> torch.Tensor:
    corner = torch.randint(0, 500, (count, 2))
    return torch.cat([corner, corner + torch.randint(1, 200, (count, 2))], dim=1).float()


@pytest.mark.parametrize(
    "boxes",
    [
        whole(),
        torch.rand(300, 4) * 700,
        torch.tensor([[0.0, 0, 65535, 65535], [65534, 3, 65535, 4]]),
        torch.tensor([[-3.0, 0, 70000, 0.1]]),
        torch.zeros(0, 4),
    ],
    ids=["whole", "real", "largest", "beyond", "none"],
)
def test_boxes_come_back_to_the_bit(boxes: torch.Tensor) -> None:
    found = decode(encode(boxes))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert_close(found, boxes, rtol=0, atol=0)


def test_a_file_is_smaller_than_an_array() -> None:
    """As ``.npy`` 2,000 boxes take 32 KB; whole pixels take 16 bits, of which the upper ones are much alike."""
    assert len(encode(whole(2000))) < 11_000
    assert len(encode(torch.rand(2000, 4) * 300)) < 32_000


def test_what_is_no_box_is_not_kept() -> None:
    for wrong in (torch.zeros(3), torch.zeros(3, 5), torch.tensor([[0.0, 0, 1, torch.nan]])):
        with pytest.raises(ValueError, match="finite boxes"):
            encode(wrong)


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    raw = encode(whole(12))
    for length in range(len(raw)):
        with pytest.raises(ValueError):
            decode(raw[:length])
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 0x10
        with pytest.raises(ValueError):
            decode(bytes(damaged))


def test_another_version_says_so() -> None:
    raw = encode(whole(3))
    magic, _, kind, count, checksum = HEAD.unpack_from(raw)
    later = HEAD.pack(magic, FORMAT + 1, kind, count, checksum) + raw[HEAD.size :]
    with pytest.raises(ValueError, match=f"of format {FORMAT + 1}, not {FORMAT}"):
        decode(later)


def test_the_digest_is_of_the_pixels_and_their_places() -> None:
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert digest_of(image) == digest_of(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    other = image.clone()
    other[2, 3, 5] ^= 1
    reshaped = image.permute(1, 2, 0).reshape(6, 4, 3).permute(2, 0, 1)  # the same bytes
    assert len({digest_of(image), digest_of(other), digest_of(reshaped)}) == 3
    assert len(digest_of(image)) == 32 and digest_of(image) == digest_of(image)


def test_boxes_lie_beside_the_data_under_their_maker(tmp_path: Path) -> None:
    cache, boxes = ProposalCache(key="maker", root=tmp_path / "data"), whole()
    (tmp_path / "data").mkdir()
    assert cache.read(DIGEST) is None
    path = cache.write(DIGEST, boxes)
    assert path is not None and path.relative_to(tmp_path / "data").parts[:2] == (".detseg", "proposals")
    assert (path.parents[1] / "maker.txt").read_text() == "maker\n"
    found = ProposalCache(key="maker", root=tmp_path / "data").read(DIGEST)
    assert found is not None and torch.equal(found, boxes)
    assert ProposalCache(key="another", root=tmp_path / "data").read(DIGEST) is None
    assert ProposalCache(key="maker", root=None).read(DIGEST) is None
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]  # no part files


def test_another_format_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ProposalCache(key="maker", root=tmp_path).write(DIGEST, whole())
    monkeypatch.setattr(proposal_cache, "FORMAT", FORMAT + 1)
    assert ProposalCache(key="maker", root=tmp_path).read(DIGEST) is None


@pytest.mark.parametrize("fault", ["half", "empty", "foreign", "version", "bits", "folder"])
def test_a_file_that_is_no_use_counts_as_absent_with_one_line(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProposalCache(key="maker", root=tmp_path)
    path = cache.write(DIGEST, whole())
    assert path is not None
    raw = path.read_bytes()
    if fault == "folder":
        path.unlink()
        path.mkdir()
    else:
        content = {
            "half": raw[: len(raw) // 2],
            "empty": b"",
            "foreign": b"\x93NUMPY" + raw,
            "version": raw[:13] + struct.pack("<H", 99) + raw[15:],
            "bits": raw[:-1] + bytes([raw[-1] ^ 1]),
        }
        path.write_bytes(content[fault])
    with caplog.at_level(logging.WARNING):
        assert cache.read(DIGEST) is None
    assert len(caplog.messages) == 1 and str(path) in caplog.text and "made again" in caplog.text
    if fault != "folder":
        boxes = whole()
        cache.write(DIGEST, boxes)
        found = cache.read(DIGEST)
        assert found is not None and torch.equal(found, boxes)


def test_a_folder_that_may_not_be_written_is_left_alone(own_cache: Path, tmp_path: Path) -> None:
    """Also by root, whom no permission stops."""
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o555)
    try:
        assert not may_write(root / ".detseg" / "proposals") and may_write(tmp_path / "new" / "er")
        cache = ProposalCache(key="maker", root=root)
        path = cache.write(DIGEST, whole())
        assert path is not None and path.is_relative_to(own_cache) and list(root.iterdir()) == []
        assert cache.read(DIGEST) is not None
        elsewhere = ProposalCache(key="maker", root=tmp_path / "other").read(DIGEST)
        assert elsewhere is not None  # found by its pixels alone
    finally:
        root.chmod(0o755)


def test_a_read_only_folder_that_was_filled_is_read(own_cache: Path, tmp_path: Path) -> None:
    boxes = whole()
    ProposalCache(key="maker", root=tmp_path / "data").write(DIGEST, boxes)
    for folder in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    found = ProposalCache(key="maker", root=tmp_path / "data").read(DIGEST)
    assert found is not None and torch.equal(found, boxes) and not own_cache.exists()
    for folder in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        os.chmod(folder, 0o755)


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETSEG_CACHE", str(tmp_path / "file"))
    cache = ProposalCache(key="maker", root=tmp_path / "file" / "data")
    assert cache.write(DIGEST, whole()) is None and cache.read(DIGEST) is None
    assert cache.write_split("x", [DIGEST]) is None and cache.read_split("x", 1) is None


class TestSplit:
    def test_a_note_gives_the_digests_again(self, tmp_path: Path) -> None:
        cache = ProposalCache(key="maker", root=tmp_path)
        assert cache.read_split("train", 2) is None
        cache.write_split("train", [DIGEST, "cd"])
        assert cache.read_split("train", 2) == [DIGEST, "cd"]
        assert cache.read_split("val", 2) is None

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "half", "other"])
    def test_a_damaged_one_counts_as_absent(
        self, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = ProposalCache(key="maker", root=tmp_path)
        path = cache.write_split("train", [DIGEST, "cd"])
        assert path is not None
        text = path.read_text()
        path.write_text({"half": text[:40], "other": text.replace("cd", "ce")}.get(content, content))
        assert cache.read_split("train", 2) is None and str(path) in caplog.text
        cache.write_split("train", ["a", "b", "c"])
        assert cache.read_split("train", 2) is None  # of another number of images
        assert cache.read_split("train", 3) == ["a", "b", "c"]
