"""Any picture file becomes plain RGB, cut to size where it should be."""

import io

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.transforms import PictureError, captions_speak_of_sides, cut, decode, mirror

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def file_of(image, format="PNG", **options):
    """The bytes of an image saved as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def gradient(height, width):
    """Red grows to the right, green grows downwards, both from 0 to 255."""
    down, across = np.mgrid[0:height, 0:width]
    red, green = across * 255 / (width - 1), down * 255 / (height - 1)
    return np.stack([red, green, np.zeros_like(red)], axis=-1).round().astype(np.uint8)


def test_rgb_survives_unchanged():
    image = noise(5, 7)
    np.testing.assert_array_equal(decode(file_of(Image.fromarray(image))), image)


def test_transparency_is_laid_on_white():
    rgba = Image.new("RGBA", (4, 4), (*RED, 0))
    rgba.putpixel((1, 2), (*RED, 255))
    rgba.putpixel((0, 0), (*RED, 127))
    image = decode(file_of(rgba))
    assert tuple(image[2, 1]) == RED and tuple(image[3, 3]) == WHITE
    np.testing.assert_allclose(image[0, 0].astype(int), (255, 128, 128), atol=1)


def test_palette_with_a_transparent_colour_is_laid_on_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 2), 1)
    image = decode(file_of(palette, transparency=0))
    assert tuple(image[2, 1]) == GREEN and tuple(image[0, 0]) == WHITE


def test_cmyk_becomes_rgb():
    magenta_and_yellow = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(decode(file_of(magenta_and_yellow, "JPEG"))[4, 4].astype(int), RED, atol=3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_brightness(format):
    grey = np.array([[0, 0x1234], [0x80FF, 0xFFFF]], np.uint16)
    image = decode(file_of(Image.fromarray(grey), format))
    np.testing.assert_array_equal(image, np.repeat((grey >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_become_rgb(mode):
    assert tuple(decode(file_of(Image.new(mode, (4, 4), "white")))[0, 0]) == WHITE


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    animation = file_of(frames[0], format, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode(animation)[4, 4].astype(int), RED, atol=3)


# What a camera stores for each orientation, so that all look the same upright (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation):
    upright = noise(6, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    np.testing.assert_array_equal(decode(file_of(stored, exif=exif)), upright)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_cut_short_is_refused(format):
    whole = file_of(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(PictureError):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (file_of(Image.new("RGB", (1, 1))), "too small: 1x1"),
        (file_of(Image.new("RGB", (50, 1))), "too small: 50x1"),
        (file_of(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "html", "postscript", "1x1", "50x1", "float"],
)
def test_what_is_no_picture_is_refused_by_its_reason(content, reason):
    with pytest.raises(PictureError, match=reason) as refused:
        decode(content)
    assert "\n" not in str(refused.value) and " at 0x" not in str(refused.value)


@pytest.mark.parametrize("side", [20, 50])  # Pillow only warns about the first and refuses the second
def test_a_decompression_bomb_is_refused(side, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(PictureError, match="too many pixels|limit"):
        decode(file_of(Image.new("RGB", (side, side))))


def test_a_machine_out_of_memory_is_no_bad_picture(monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"a picture")


def test_the_right_size_is_returned_unchanged():
    image = noise(16, 16)
    np.testing.assert_array_equal(cut(image, 16, 16, 0.5, 0.5), image)


@pytest.mark.parametrize(
    ("across", "down", "rows", "columns"),
    [(0.5, 0.5, slice(0, 16), slice(8, 24)), (0.0, 0.7, slice(0, 16), slice(0, 16))],
)
def test_a_wide_picture_is_cut_where_asked(across, down, rows, columns):
    image = noise(16, 32)
    np.testing.assert_array_equal(cut(image, 16, 16, across, down), image[rows, columns])


def test_a_tall_picture_is_cut_where_asked():
    image = noise(32, 16)
    np.testing.assert_array_equal(cut(image, 16, 16, 0.3, 0.5), image[8:24])
    np.testing.assert_array_equal(cut(image, 16, 16, 0.3, np.nextafter(1.0, 0.0)), image[16:])


@pytest.mark.parametrize(
    ("tall", "wide", "rows", "columns"),
    [
        (40, 60, slice(0, 40), slice(0, 60)),  # the right shape already
        (40, 100, slice(0, 40), slice(20, 80)),
        (100, 60, slice(30, 70), slice(0, 60)),
        (20, 61, slice(0, 20), slice(16, 46)),
    ],
)
def test_the_largest_rectangle_of_a_shape_is_cut(tall, wide, rows, columns):
    """From the centre, of pictures that are too wide or too tall, at any scale."""
    image = noise(tall, wide)
    rectangle = np.ascontiguousarray(image[rows, columns])
    np.testing.assert_array_equal(cut(image, *rectangle.shape[:2], 0.5, 0.5), rectangle)
    np.testing.assert_array_equal(cut(image, 8, 12, 0.5, 0.5), cut(rectangle, 8, 12, 0.5, 0.5))


def test_a_rectangle_lies_where_asked():
    image = noise(20, 50)
    np.testing.assert_array_equal(cut(image, 20, 30, 0.0, 0.9), image[:, :30])
    np.testing.assert_array_equal(cut(image, 20, 30, np.nextafter(1.0, 0.0), 0.0), image[:, 20:])
    np.testing.assert_array_equal(cut(image, 10, 50, 0.3, 0.0), image[:10])


@pytest.mark.parametrize(("height", "width"), [(3, 300), (300, 3), (7, 5)])
def test_a_shape_far_from_the_picture_leaves_something(height, width):
    assert cut(noise(2, 2), height, width, 0.5, 0.5).shape == (height, width, 3)


def test_every_place_of_a_crop_is_as_likely():
    image = np.repeat(np.arange(5, dtype=np.uint8)[None, :, None], 2, axis=0).repeat(3, axis=2)
    lefts = [int(cut(image, 2, 2, across, 0.5)[0, 0, 0]) for across in np.arange(0, 1, 1 / 400)]
    assert np.bincount(lefts).tolist() == [100] * 4


@pytest.mark.parametrize("size", [16, 96])
def test_resizing_keeps_the_geometry(size):
    """A linear gradient stays one: new pixel centres fall at (i + 1/2) * side / size - 1/2."""
    side, width = 64, 128
    image = cut(gradient(side, width), size, size, 0.5, 0.5)
    centres = (np.arange(size) + 0.5) * side / size - 0.5
    inner = slice(size // 8, -size // 8)  # at the edge the filter lacks its outer half
    red = (centres + (width - side) / 2) * 255 / (width - 1)
    green = centres * 255 / (side - 1)
    np.testing.assert_allclose(image[size // 2, inner, 0], red[inner], atol=1.5)
    np.testing.assert_allclose(image[inner, size // 2, 1], green[inner], atol=1.5)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = cut(stripes, 8, 8, 0.5, 0.5)
    np.testing.assert_allclose(shrunk.astype(int), 127.5, atol=4)


def test_mirror_swaps_left_and_right_only():
    image = noise(3, 5)
    np.testing.assert_array_equal(mirror(image)[1, 0], image[1, 4])
    np.testing.assert_array_equal(mirror(mirror(image)), image)
    np.testing.assert_array_equal(mirror(image[None])[0], mirror(image))


@pytest.mark.parametrize(
    "caption",
    [
        "a circle to the left of a square",
        "Right arrow",
        "a left-handed man",
        "turning counterclockwise",
        "猫在狗的左边",
    ],
)
def test_captions_that_name_a_side(caption):
    assert captions_speak_of_sides(["a cat", caption])


@pytest.mark.parametrize("caption", ["a cat", "bright leftovers", "human rights", "a copyright sign", "猫"])
def test_captions_that_name_no_side(caption):
    assert not captions_speak_of_sides([caption])
