"""The image guard: every kind of picture that comes in, every kind that is refused."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.documents.images import (
    MAX_FILE_BYTES,
    SquareCrop,
    fit_square,
    open_image,
    to_array,
    upright_size,
)
from mm_interleaved.errors import ImageError


def encoded(picture, format="PNG", **settings):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **settings)
    return buffer.getvalue()


def gradient(width=32, height=24):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 8, y * 10, (x + y) * 4], axis=-1).astype(np.uint8)
    return PILImage.fromarray(pixels)


def png_of(width, height, data=b""):
    """A PNG file whose header claims a size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def colour(data):
    picture = open_image(data)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_picture_in_colour_comes_back_pixel_by_pixel(format):
    settings = {"lossless": True} if format == "WEBP" else {}
    data = encoded(gradient(), format, **settings)
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(gradient()))


def test_grey_black_and_white_and_palette_pictures_become_rgb():
    assert colour(encoded(PILImage.new("L", (2, 2), 77))) == (77, 77, 77)
    assert colour(encoded(PILImage.new("1", (2, 2), 1))) == (255, 255, 255)
    palette = PILImage.new("RGB", (2, 2), (10, 200, 30)).convert("P", palette=PILImage.Palette.ADAPTIVE)
    assert colour(encoded(palette)) == (10, 200, 30)


def test_what_is_transparent_is_seen_over_white():
    assert colour(encoded(PILImage.new("RGBA", (2, 2), (0, 0, 0, 0)))) == (255, 255, 255)
    assert colour(encoded(PILImage.new("RGBA", (2, 2), (0, 0, 0, 128)))) == (127, 127, 127)
    assert colour(encoded(PILImage.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    assert colour(encoded(PILImage.new("RGBA", (2, 2), (0, 0, 0, 0)), "WEBP", lossless=True)) == (
        255,
        255,
        255,
    )
    palette = PILImage.new("P", (2, 2), 3)
    palette.putpalette([9, 9, 9] * 4)
    assert colour(encoded(palette, transparency=3)) == (255, 255, 255)
    assert colour(encoded(palette)) == (9, 9, 9)
    assert colour(encoded(PILImage.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


def test_a_cmyk_jpeg_has_the_colours_that_were_put_in():
    red = PILImage.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = colour(encoded(red, "JPEG", quality=95))
    assert found[0] > 240 and found[1] < 15 and found[2] < 15


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, axis=0)
    picture = open_image(encoded(PILImage.fromarray(ramp)))
    found = np.asarray(picture)[0, :, 0].astype(int)
    assert np.array_equal(found, np.arange(256))


def test_a_picture_in_memory_passes_the_same_guard():
    assert open_image(PILImage.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="4 x 4 pixels, expected at most 15"):
        open_image(PILImage.new("RGB", (4, 4)), max_pixels=15)
    not_yet_decoded = PILImage.open(io.BytesIO(encoded(gradient())[:60]))
    with pytest.raises(ImageError, match="'p': damaged"):
        open_image(not_yet_decoded, name="p")


def test_a_mode_without_a_range_is_refused():
    with pytest.raises(ImageError, match="mode F"):
        open_image(PILImage.new("F", (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(orientation):
    upright = gradient(6, 4)
    stored_by_undoing = {
        1: None,
        2: PILImage.Transpose.FLIP_LEFT_RIGHT,
        3: PILImage.Transpose.ROTATE_180,
        4: PILImage.Transpose.FLIP_TOP_BOTTOM,
        5: PILImage.Transpose.TRANSPOSE,
        6: PILImage.Transpose.ROTATE_90,
        7: PILImage.Transpose.TRANSVERSE,
        8: PILImage.Transpose.ROTATE_270,
    }
    undo = stored_by_undoing[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    picture = open_image(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(picture), np.asarray(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"])
def test_damaged_exif_is_ignored(exif):
    assert open_image(encoded(gradient(), "JPEG", exif=exif)).size == gradient().size


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format):
    frames = [PILImage.new("RGB", (4, 4), c) for c in ("red", "blue", "lime")]
    settings = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **settings)
    assert colour(data) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_or_whole_but_never_filled_up(format):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    data = encoded(PILImage.fromarray(noise), format)
    whole = np.asarray(open_image(data))
    cuts = range(0, len(data), max(1, len(data) // 200))
    refused = 0
    for end in cuts:
        try:
            picture = open_image(data[:end])
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(np.asarray(picture), whole), end
    assert refused > 0.9 * len(cuts)


@given(data=st.data())
def test_damaged_bytes_raise_one_kind_of_error_only(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    damaged = bytearray(encoded(gradient(), format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(damaged)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("size", [(30_000, 30_000), (13_000, 13_000), (9_000, 9_000), (6_400, 6_400)])
def test_a_bomb_is_refused_from_its_header(size):
    data = png_of(*size, data=bytes(1000))
    begin = time.process_time()
    with pytest.raises(ImageError, match="40000000"):
        open_image(data, name="bomb.png")
    assert time.process_time() - begin < 0.5


def test_a_text_chunk_that_unpacks_to_much_is_refused_or_skipped():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * 3_000_000, zip=True)
    data = encoded(gradient(), pnginfo=info)
    try:
        assert open_image(data).size == gradient().size
    except ImageError as error:
        assert "damaged" in str(error)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<svg xmlns='x'></svg>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF", "PostScript"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\x00\x01\x02\x03", "unknown data beginning with 00 01 02 03"),
    ],
)
def test_what_is_no_image_is_named(data, found):
    with pytest.raises(ImageError, match=found):
        open_image(data, name="a.jpg")


@pytest.mark.parametrize(("format", "name"), [("JPEG2000", "JPEG 2000 image"), ("ICO", "Windows icon")])
def test_other_formats_are_refused_by_name(format, name):
    with pytest.raises(ImageError, match=f"a {name}, expected PNG, JPEG, WebP, GIF, BMP or TIFF"):
        open_image(encoded(gradient(), format))


def test_gif_bmp_and_tiff_come_back_pixel_by_pixel():
    for format in ("BMP", "TIFF"):
        assert np.array_equal(np.asarray(open_image(encoded(gradient(), format))), np.asarray(gradient()))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        data = encoded(gradient(), "TIFF", compression=compression)
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(gradient()))
    palette = gradient().quantize(16)
    assert np.array_equal(np.asarray(open_image(encoded(palette, "GIF"))), np.asarray(palette.convert("RGB")))
    ramp = PILImage.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None])
    assert np.array_equal(np.asarray(open_image(encoded(ramp, "TIFF")))[0, :, 0], np.arange(256))
    red = encoded(PILImage.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")
    assert colour(red) == (255, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_frames_behind_the_first_are_never_decoded(format):
    """Cut behind the first frame, or damaged there: the first one is all that is looked at."""
    frames = [PILImage.new("RGB", (8, 8), c) for c in ("red", "blue", "lime")]
    settings = {"compression": "tiff_lzw"} if format == "TIFF" else {}
    single = encoded(frames[0], format, **settings)
    data = bytearray(encoded(frames[0], format, save_all=True, append_images=frames[1:], **settings))
    assert colour(bytes(data)) == (255, 0, 0)
    for index in range(len(single) + 40, len(data)):
        data[index] ^= 0x55
    assert colour(bytes(data)) == (255, 0, 0)


BOMBS = {
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0x80, 0, 0) + b"\0" * 6
    + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x01\x04\0;",
    "GIF, a frame larger than its screen": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6
    + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x01\x04\0;",
    "BMP": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0),
    "TIFF": b"II*\0\x08\0\0\0" + struct.pack("<H", 5)
    + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 60000), (257, 60000), (258, 8), (262, 1), (273, 8))
    ) + b"\0\0\0\0",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_no_header_makes_pixels_before_they_are_counted(name):
    begin = time.perf_counter()
    for read in (open_image, upright_size):
        with pytest.raises(ImageError, match=r"60000 x 60000 pixels, expected at most|more than 40000000"):
            read(BOMBS[name])
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_upright_size_is_that_of_the_opened_picture(format, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(6, 4), format, exif=exif)
    assert upright_size(data) == open_image(data).size
    with pytest.raises(ImageError, match="expected PNG"):
        upright_size(b"{}")


def test_the_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(gradient()))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(gradient()))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(ImageError, match=word):
            open_image(path)
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        open_image(tmp_path / ("long" * 200))


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match="bytes, expected at most"):
        open_image(path)


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path):
    with pytest.raises(ImageError) as caught:
        open_image(b"nothing", name="a\n\x1b[31mb\u202e.png")
    assert (
        "\n" not in str(caught.value)
        and "\x1b" not in str(caught.value)
        and "\u202e" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3), (7, 5), (32, 32), (200, 67), (500, 500), (1, 20_000), (3000, 2)]
)
@pytest.mark.parametrize("rule", ["released", "clip"])
def test_any_size_becomes_a_square(size, rule):
    pixels = SquareCrop(32, rule)(PILImage.new("RGB", size, (0, 128, 255)))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    assert np.allclose(pixels[:, 16, 16], [0, 128 / 255, 1], atol=1e-6)


@pytest.mark.parametrize("size", [(100, 80), (64, 64), (65, 130), (31, 200), (500, 333)])
def test_the_released_rule_is_halving_then_bicubic_then_the_centre(size):
    rng = np.random.default_rng(0)
    picture = PILImage.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = picture
    while min(expected.size) >= 64:
        expected = expected.resize((expected.width // 2, expected.height // 2), PILImage.Resampling.BOX)
    scale = 32 / min(expected.size)
    expected = expected.resize(
        (round(expected.width * scale), round(expected.height * scale)), PILImage.Resampling.BICUBIC
    )
    array = np.asarray(expected)
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    array = array[top : top + 32, left : left + 32]
    assert np.array_equal(np.asarray(fit_square(picture, 32)), array)
    assert np.array_equal(
        SquareCrop(32)(picture), array.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    )


def test_an_array_is_made_of_rgb_only():
    with pytest.raises(ValueError, match="mode 'L'"):
        to_array(PILImage.new("L", (2, 2)))
    with pytest.raises(ValueError, match="'nearest'"):
        SquareCrop(4, "nearest")
