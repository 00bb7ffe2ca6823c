"""Pictures as the tower's input, from folders and zips, beside transformers' processors."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import MEAN, STD, damage, damages, encoded, noise, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor

import data
from data import PictureTransform

SIZES = [(336, 336), (640, 480), (333, 1000), (1001, 337), (1, 1), (2, 7), (335, 337), (50, 900)]

MODES = ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"]


@pytest.mark.parametrize(
    "size, kind", [*((size, "RGB") for size in SIZES), *(((300, 200), kind) for kind in MODES)]
)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_equal_transformers(tiny, size, kind, aspect):
    processor = AutoProcessor.from_pretrained(tiny).image_processor
    assert processor.do_pad
    if aspect == "square":
        processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
    file = encoded(noise(*size, kind), "TIFF" if kind == "CMYK" else "PNG")
    ours = data.PictureTransform(336, MEAN, STD, aspect)(data.decode_picture(file))
    theirs = processor(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="np")[
        "pixel_values"
    ][0]
    assert ours.shape == (3, 336, 336) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5


def test_padding_has_the_mean_colour_and_square_loses_the_ends():
    red = Image.new("RGB", (672, 336), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 100, 336))
    pad, square = (
        data.PictureTransform(336, MEAN, STD, aspect)(red) for aspect in ("pad", "square")
    )
    background = (np.float32([122, 116, 104]) / 255 - MEAN) / STD
    assert np.allclose(pad[:, 0, 0], background, atol=1e-6) and np.allclose(
        pad[:, 335, 335], background, atol=1e-6
    )
    assert (np.ptp(square, axis=(1, 2)) == 0).all()  # the blue end is gone


@pytest.mark.parametrize("size", [(40_000, 3), (2, 90_000), (1, 60_000)])
def test_extreme_aspect_ratio_costs_no_memory(size, monkeypatch):
    picture, made = data.decode_picture(encoded(Image.new("RGB", size, (250, 250, 250)))), []
    new, resize = Image.new, Image.Image.resize
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: made.append(size) or new(mode, size, *a)
    )
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a: made.append(size) or resize(self, size, *a)
    )
    for aspect in ("pad", "square"):
        pixels = data.PictureTransform(336, MEAN, STD, aspect)(picture)
        assert (
            pixels.shape == (3, 336, 336)
            and 0 < pixels[:, 168, 168].mean()
            and abs(pixels).max() < 3
        )
    assert max(wide * high for wide, high in made) <= 2**24


def test_what_is_no_picture_is_one_clear_error():  # trap 32
    bomb = bytearray(encoded(noise(9, 9)))
    bomb[16:24] = struct.pack(">2I", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    whole = encoded(noise(300, 300), "JPEG")
    for bad in (
        b"",
        b"no picture",
        whole[:2000],
        bytes(bomb),
        encoded(noise(64, 64))[:-40],
        b"\x89PNG\r\n\x1a\n",
    ):
        with pytest.raises(ValueError, match="picture a.png: not one that can be read") as error:
            data.decode_picture(bad, "a.png")
        assert "\n" not in str(error.value) and "0x" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_that_is_packed_as_few_are_says_so(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", encoded(noise(9, 9)))
    with pytest.raises(ValueError, match=f"packed by method {method}; zip it with deflate"):
        data.Pictures(tmp_path / "a.zip").read("a.png")


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "content, error",
    [
        ("[]", "does not say how"),
        ("{", "does not say how"),
        ("[" * 99_999, "does not say how"),
        (PROCESSOR | {"crop_size": 14, "image_mean": [1e999] * 3}, "does not say how"),
        (PROCESSOR | {"crop_size": 14, "image_std": "x"}, "does not say how"),
        (PROCESSOR, "does not say how"),
        (PROCESSOR | {"size": {"longest_edge": 14}}, "does not say how"),
        (PROCESSOR | {"size": {"height": 14, "width": 14}}, "neither padded .* nor cropped"),
        (PROCESSOR | {"crop_size": 14, "do_center_crop": False}, "neither padded .* nor cropped"),
        ({"size": 14}, "no preprocessor_config.json, which"),
    ],
)
def test_processor_files_of_other_kinds_are_refused_in_one_line(tmp_path, content, error):
    content = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        PictureTransform.from_pretrained(tmp_path)


def test_zip_is_read_as_the_folder_is(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    files = {
        "a.png": encoded(noise(30, 20)),
        "deep/b.jpg": encoded(noise(20, 30), "JPEG"),
        "deep/é ü.bin": b"x" * 5000,
    }
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    os.mkfifo(tmp_path / "folder" / "pipe")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
            for name in files:
                archive.write(tmp_path / "folder" / name, name)
        for place in ("folder", "z.zip"):
            pictures = data.Pictures(tmp_path / place)
            assert {name: pictures.read(name) for name in files} == files
            for missing in ("c.png", "deep", "pipe", "/dev/zero", "x" * 5000, "\0"):
                with pytest.raises(FileNotFoundError, match="picture "):
                    pictures.read(missing)
        whole = bytearray((tmp_path / "z.zip").read_bytes())
        far = whole.index(b"PK\1\2") + 42  # in the directory, where the first picture begins
        for at, wrong in ((35, b"\xff" * 20), (60, b"?" * 20), (far, b"\xff\xff\xff\x7f")):
            bad = write(tmp_path / "bad.zip", bytes(whole[:at] + wrong + whole[at + len(wrong) :]))
            with pytest.raises(ValueError, match="picture a.png in .*: damaged"):
                data.Pictures(bad).read("a.png")
    for name, content in {
        "cut.zip": whole[:900],
        "text.zip": b"hello",
        "directory.zip": whole.replace(b"PK\1\2", b"PK\1\3"),
    }.items():
        write(tmp_path / name, bytes(content))
        with pytest.raises(ValueError, match="neither a folder nor a whole .zip"):
            data.Pictures(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such folder or .zip"):
        data.Pictures(tmp_path / "nowhere")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(damages, st.booleans())
def test_damaged_zip_gives_whole_files_or_one_clear_error(workdir, changes, deflated):
    files = {"a.jpg": encoded(noise(20, 10), "JPEG"), "b/ü.png": b"x" * 300}
    with zipfile.ZipFile(workdir / "z.zip", "w", zipfile.ZIP_DEFLATED * deflated) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = write(workdir / "z.zip", damage((workdir / "z.zip").read_bytes(), changes))
    for name, content in files.items():
        try:
            assert data.Pictures(path).read(name) == content
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
