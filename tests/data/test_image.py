from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detseg.data.check import DataError
from detseg.data.image import ORIENTATION, image_size, read_image, read_map


def grey(path: Path) -> np.ndarray:
    """Read and check that the channels agree; return one."""
    image = read_image(path).numpy()
    assert image.dtype == np.uint8 and image.shape[0] == 3
    np.testing.assert_array_equal(image[0], image[1])
    np.testing.assert_array_equal(image[0], image[2])
    return image[0]


def test_rgb_stays_as_it_is_and_is_stored_by_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert image.stride() == (1, 21, 3)  # what makes resizing fast
    assert image_size(tmp_path / "a.png") == (5, 7)


def test_eight_bit_grey_and_one_bit(tmp_path: Path) -> None:
    values = np.array([[0, 10, 255]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "l.png")
    Image.fromarray(values > 20).save(tmp_path / "1.png")
    assert grey(tmp_path / "l.png").tolist() == [[0, 10, 255]]
    assert grey(tmp_path / "1.png").tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_and_not_cut(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{ending}")
    assert grey(tmp_path / f"deep.{ending}").tolist() == [[0, 0, 1, 1, 128, 255]]


def test_thirty_two_bit_values_beyond_sixteen_are_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(DataError, match="from 0 to 70000") as caught:
        read_image(tmp_path / "i.tif")
    assert "i.tif" in str(caught.value)
    Image.fromarray(np.array([[0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif: floating-point"):
        read_image(tmp_path / "f.tif")


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png")[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    Image.fromarray(np.array([[[40, 255], [40, 0]]], dtype=np.uint8), mode="LA").save(tmp_path / "la.png")
    assert grey(tmp_path / "la.png").tolist() == [[40, 255]]


def test_palette_gives_its_colours_and_its_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    image.putpalette([1, 2, 3, 40, 50, 60, 7, 8, 9])
    image.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[:, 0].T.tolist() == [[1, 2, 3], [40, 50, 60], [7, 8, 9]]
    image.save(tmp_path / "pt.png", transparency=1)
    assert read_image(tmp_path / "pt.png")[:, 0].T.tolist() == [[1, 2, 3], [255, 255, 255], [7, 8, 9]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 16, 4), dtype=np.uint8)
    cmyk[:, :, 0] = 255  # full cyan
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "c.jpg", quality=100)
    red, green, blue = (int(channel.float().mean()) for channel in read_image(tmp_path / "c.jpg"))
    assert red < 5 and green > 250 and blue > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # what a viewer shows of stored rows [[1, 2, 3], [4, 5, 6]] (x 40), by the EXIF standard's table
    upright = {
        1: [[1, 2, 3], [4, 5, 6]],
        2: [[3, 2, 1], [6, 5, 4]],
        3: [[6, 5, 4], [3, 2, 1]],
        4: [[4, 5, 6], [1, 2, 3]],
        5: [[1, 4], [2, 5], [3, 6]],
        6: [[4, 1], [5, 2], [6, 3]],
        7: [[6, 3], [5, 2], [4, 1]],
        8: [[3, 6], [2, 5], [1, 4]],
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8) * 40
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    assert (grey(tmp_path / "turned.png") // 40).tolist() == upright
    assert image_size(tmp_path / "turned.png") == np.array(upright).shape
    assert image_size(tmp_path / "turned.png", upright=False) == (2, 3)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "bmp"])
def test_truncated_file_is_an_error_that_names_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cut.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"cut\.{ending}"):
        read_image(path)


def test_missing_and_foreign_files_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jpg: no such image"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg: not an image"):
        read_image(tmp_path / "text.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.png"):
        image_size(tmp_path / "empty.png")


def test_maps_give_values_not_colours(tmp_path: Path) -> None:
    values = np.array([[0, 3, 255]], dtype=np.uint8)
    image = Image.fromarray(values, mode="P")
    image.putpalette([9] * 768)
    image.save(tmp_path / "p.png")
    assert read_map(tmp_path / "p.png").tolist() == [[0, 3, 255]]
    Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_map(tmp_path / "deep.png").tolist() == [[0, 300, 65535]]
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"rgb\.png: a map of labels must be grey or palette, this one is RGB"):
        read_map(tmp_path / "rgb.png")
