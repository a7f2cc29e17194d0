import cv2
import numpy as np
import pytest
from PIL import Image

from sclip_lab.images import read


@pytest.fixture
def picture():
    """Smooth colours, so that lossy files stay close."""
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([4 * x, 6 * y, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_files_are_read_as_pil_reads_them(picture, tmp_path, suffix):
    Image.fromarray(picture).save(tmp_path / f"picture.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"picture.{suffix}"), picture)
    np.testing.assert_array_equal(read(str(tmp_path / f"picture.{suffix}")), picture)


def test_jpeg_is_read_as_opencv_reads_it(picture, tmp_path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(picture).save(path)
    np.testing.assert_array_equal(read(path), cv2.imread(str(path))[:, :, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(picture).save(path, exif=exif)
    upright = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture),
    }[orientation]
    np.testing.assert_array_equal(read(path), upright)
    np.testing.assert_array_equal(read(Image.open(path)), upright)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_other_colour_modes_are_read_as_pil_converts_them(picture, tmp_path, mode):
    image = Image.fromarray(picture).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(picture[:, :, 0]))
    expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(read(tmp_path / "picture.png"), expected)
    np.testing.assert_array_equal(read(image), expected)


def test_cmyk_jpeg(picture, tmp_path):
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "picture.jpg", quality=95)
    assert np.abs(read(tmp_path / "picture.jpg").astype(int) - picture).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(picture, tmp_path, channels):
    grey = picture if channels == 3 else picture[:, :, 0]
    path = tmp_path / "deep.png"
    cv2.imwrite(str(path), (grey.astype(np.uint16) * 257)[..., ::-1] if channels == 3 else grey.astype(np.uint16) * 257)
    expected = grey if channels == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read(path), expected)
    np.testing.assert_array_equal(read(grey.astype(np.uint16) * 257), expected)
    if channels == 1:
        np.testing.assert_array_equal(read(Image.open(path)), expected)


def test_float_files_are_scaled(picture, tmp_path):
    cv2.imwrite(str(tmp_path / "float.tiff"), picture[:, :, ::-1].astype(np.float32) / 255)
    np.testing.assert_array_equal(read(tmp_path / "float.tiff"), picture)


def test_arrays(picture):
    grey = np.repeat(picture[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(read(picture), picture)
    np.testing.assert_array_equal(read(picture.astype(np.float32) / 255), picture)
    np.testing.assert_array_equal(read(np.dstack([picture, picture[:, :, 0]])), picture)
    np.testing.assert_array_equal(read(picture[:, :, 0]), grey)
    np.testing.assert_array_equal(read(picture[:, :, :1]), grey)


def nan(shape):
    image = np.zeros(shape)
    image[2, 3, 1] = np.nan
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (nan((4, 5, 3)), "1 NaN or infinite"),
        (np.full((4, 5, 3), 255.0), "values from 255 to 255: expected 0 to 1"),
        (np.full((4, 5, 3), -1.0), "values from -1"),
        (np.zeros((4, 5, 3), np.int64), "type int64"),
        (np.zeros((3, 40, 50), np.uint8), r"shape \[3, 40, 50\].*move the channels last"),
        (np.zeros((4, 5, 7), np.uint8), r"shape \[4, 5, 7\]: expected \[H W 3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \[0, 5, 3\]"),
        (np.zeros(5, np.uint8), r"shape \[5\]"),
    ],
)
def test_arrays_that_are_no_image_are_refused_in_one_line(image, message):
    with pytest.raises(ValueError, match=message) as error:
        read(image)
    assert "\n" not in str(error.value)


def test_files_that_are_no_image_are_refused_in_one_line(tmp_path, capfd):
    with pytest.raises(FileNotFoundError, match=r"absent.png.*no such file"):
        read(tmp_path / "absent.png")
    for content in (b"", b"not a picture"):
        (tmp_path / "text.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"text.png.*cannot be decoded") as error:
            read(tmp_path / "text.png")
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
