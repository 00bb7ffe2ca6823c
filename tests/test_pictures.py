"""Pictures as the tower's input, from folders and zips, beside transformers' processors."""

import io
import json
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tiny import MEAN, STD, damage, damages, encoded, noise, write
from transformers import AutoProcessor, CLIPImageProcessor
from transformers.image_utils import load_image

import data
from data import PictureTransform

SIZES = [(336, 336), (640, 480), (333, 1000), (1001, 337), (1, 1), (2, 7), (335, 337), (50, 900)]

MODES = ["L", "LA", "RGBA", "P", "1", "CMYK"]


@pytest.mark.parametrize(
    "size, mode", [*((s, "RGB") for s in SIZES), *(((300, 200), m) for m in MODES)]
)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_equal_transformers(tiny, size, mode, aspect):
    processor = AutoProcessor.from_pretrained(tiny).image_processor
    assert processor.do_pad
    if aspect == "square":
        processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
    file = encoded(noise(*size, mode), "TIFF" if mode == "CMYK" else "PNG")
    ours = PictureTransform(336, MEAN, STD, aspect)(data.decode_picture(file))
    theirs = processor(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"][0]
    assert ours.shape == (3, 336, 336) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5


# What a viewer does with an array (height, width, 3) that is stored with an EXIF orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


def decoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return np.asarray(data.decode_picture(file.getvalue())).astype(int)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_stand_as_exif_says(orientation, kind, tmp_path):
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:10, :16], stored[12:, 30:], stored[:, 18:20] = (250, 9, 9), (9, 9, 250), 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, "lossless": True} if kind == "WEBP" else {"exif": exif}
    if kind == "JPEG":
        options |= {"quality": 100, "subsampling": 0}
    seen = decoded(Image.fromarray(stored), kind, **options)
    wanted = UPRIGHT[orientation](stored).astype(int)
    assert seen.shape == wanted.shape and np.abs(seen - wanted).max() <= 3 * (kind == "JPEG")
    Image.fromarray(stored).save(tmp_path / "a", kind, **options)
    assert (seen == np.asarray(load_image(str(tmp_path / "a")))).all()  # transformers'


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12", b"x"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_says_nothing(exif, kind):
    picture = noise(30, 20).resize((60, 40))
    assert (decoded(picture, kind, exif=exif) == decoded(picture, kind)).all()


def transparent_files():
    """(name, file, array on white): every kind of transparency, drawn here."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 255, (20, 30, 4), np.uint8)
    share = rgba[..., 3:] / 255
    mixed = rgba[..., :3] * share + 255 * (1 - share)
    grey = np.repeat(rgba[..., :1] * share + 255 * (1 - share), 3, axis=2)
    yield "RGBA", encoded(Image.fromarray(rgba)), mixed
    yield "RGBA, WebP", lossless(Image.fromarray(rgba), format="WEBP", exact=True), mixed
    yield "LA", encoded(Image.fromarray(rgba[..., [0, 3]], "LA")), grey
    steps = rgba // 64 * 85  # few colours, in which one stands for clear
    key = tuple(map(int, steps[3, 4, :3]))
    keyed = np.where((steps[..., :3] == key).all(2, keepdims=True), 255, steps[..., :3])
    yield "RGB", lossless(Image.fromarray(steps[..., :3]), format="PNG", transparency=key), keyed
    one = np.where(steps[..., :1] == 85, 255, steps[..., :1]).repeat(3, 2)
    yield "L", lossless(Image.fromarray(steps[..., 0]), format="PNG", transparency=85), one
    bits = Image.fromarray(steps[..., 0] > 100)
    yield "1", lossless(bits, format="PNG", transparency=0), np.full((20, 30, 3), 255)
    indices = rng.integers(0, 4, (20, 30), np.uint8)
    colours = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200)])
    palette = Image.fromarray(indices, "P")
    palette.putpalette(colours.astype(np.uint8).tobytes())
    shares = np.array([0, 255, 128, 255])[indices][..., None] / 255
    on_white = colours[indices] * shares + 255 * (1 - shares)
    alphas = bytes([0, 255, 128, 255])
    yield "P, alphas", lossless(palette, format="PNG", transparency=alphas), on_white
    clear = np.where(indices[..., None] == 0, 255, colours[indices])
    yield "P, one clear", lossless(palette, format="PNG", transparency=0), clear
    yield "GIF", lossless(palette, format="GIF", transparency=0), clear
    frames = {"save_all": True, "append_images": [Image.new("RGBA", (30, 20), "red")]}
    yield "animated PNG", lossless(Image.fromarray(rgba), format="PNG", **frames), mixed
    yield "animated WebP", lossless(
        Image.fromarray(rgba), format="WEBP", exact=True, **frames
    ), mixed  # fmt: skip


def lossless(picture, **options):
    file = io.BytesIO()
    picture.save(file, **options, **{"lossless": True} if options["format"] == "WEBP" else {})
    return file.getvalue()


@pytest.mark.parametrize(
    "name, file, wanted", [pytest.param(*t, id=t[0]) for t in transparent_files()]
)
def test_transparency_is_laid_on_white(name, file, wanted):
    picture = data.decode_picture(file)
    assert np.abs(np.asarray(picture) - wanted).max() <= 1
    crop = {"height": 336, "width": 336}
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=crop)
    theirs = processor(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"][0]
    assert np.abs(PictureTransform(336, MEAN, STD, "square")(picture) - theirs).max() < 1e-5


def greys(array, kind):
    seen = decoded(Image.fromarray(array), kind)
    assert (seen == seen[..., :1]).all()
    return seen[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_divided_by_257(kind):
    deep = np.linspace(0, 65535, 900).astype(np.uint16).reshape(30, 30)
    assert (greys(deep, kind) == np.round(deep / 257)).all()
    assert (greys(np.full((9, 9), 257 * 40, np.uint16), kind) == 40).all()  # not by its own range
    big_endian = deep.astype(">u2")
    assert (greys(big_endian, "TIFF") == np.round(deep / 257)).all()


def test_integers_and_floats_go_from_lowest_to_highest():
    ramp = np.linspace(-300, 900, 900).reshape(30, 30)
    for dtype in (np.int32, np.float32):
        values = ramp.astype(dtype)
        wanted = np.round((values.astype(float) + 300) / 1200 * 255)
        assert (greys(values, "TIFF") == wanted).all()
        assert (greys(np.full((9, 9), 7, dtype), "TIFF") == 0).all()  # a constant
    holes = ramp.astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    wanted = np.round((holes.astype(float) - holes[0, 3]) / (900 - float(holes[0, 3])) * 255)
    wanted[0, :3] = 0
    assert (greys(holes, "TIFF") == wanted).all()
    assert (greys(np.full((9, 9), np.nan, np.float32), "TIFF") == 0).all()


def test_long_texts_and_profiles_harm_no_picture():
    picture, words = noise(30, 20), PngImagePlugin.PngInfo()
    words.add_text("comment", "x" * 3_000_000, zip=True)
    random = np.random.default_rng(0).bytes(2_000_000)
    for options in ({"pnginfo": words}, {"icc_profile": random}):
        assert (decoded(picture, **options) == np.asarray(picture)).all()


def test_padding_has_the_mean_colour_and_square_loses_the_ends():
    red = Image.new("RGB", (672, 336), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 100, 336))
    pad, square = (PictureTransform(336, MEAN, STD, aspect)(red) for aspect in ("pad", "square"))
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
        pixels = PictureTransform(336, MEAN, STD, aspect)(picture)
        assert (
            pixels.shape == (3, 336, 336)
            and 0 < pixels[:, 168, 168].mean()
            and abs(pixels).max() < 3
        )
    assert max(wide * high for wide, high in made) <= 2**24


NO_PICTURES = {
    b"": "the file is empty",
    b"no picture": "cannot identify",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC: convert it to JPEG",
    b"\n<!DOCTYPE html><html>": "a web page: the download failed",
    b"<html>Not found": "a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7": "Git LFS pointer: run `git lfs pull`",
    encoded(noise(300, 300), "JPEG")[:2000]: "truncated",
    encoded(noise(64, 64))[:-40]: "",
    b"\x89PNG\r\n\x1a\n": "",
}


@pytest.mark.parametrize("file", NO_PICTURES)
def test_what_is_no_picture_says_what_it_is(file):
    says = f"picture a.png: not one that can be read .*{NO_PICTURES[file]}"
    with pytest.raises(ValueError, match=says) as error:
        data.decode_picture(file, "a.png")
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_large_pictures_are_read_without_a_word_or_refused(monkeypatch):
    picture = encoded(noise(15, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from there, refuses twice it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.decode_picture(picture).size == (15, 10)
    with pytest.raises(ValueError, match=r"a.png: .* \(it has too many pixels: shrink it\)"):
        data.decode_picture(encoded(noise(25, 10)), "a.png")


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "content",
    [
        PROCESSOR,
        PROCESSOR | {"size": {"longest_edge": 14}},
        PROCESSOR | {"size": {"height": 14, "width": 14}},
        PROCESSOR | {"crop_size": 14, "do_center_crop": False},
        {"size": 14, "do_pad": True},
    ],
)
def test_processors_that_make_nothing_square_are_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no preprocessor_config.json that has"):
        PictureTransform.from_pretrained(tmp_path)


def test_transform_alone_reads_either_processor_file(tmp_path):
    said = PROCESSOR | {"do_pad": True, "size": {"shortest_edge": 14}}
    for name, content in (
        ("preprocessor_config.json", said),
        ("processor_config.json", {"image_processor": said, "processor_class": "LlavaProcessor"}),
    ):
        path = write(tmp_path / name, json.dumps(content))
        transform = PictureTransform.from_pretrained(tmp_path)
        assert (transform.size, transform.aspect_ratio) == (14, "pad")
        assert PictureTransform.from_pretrained(tmp_path, "square").aspect_ratio == "square"
        white = transform(Image.new("RGB", (28, 14), "white"))  # bars of the mean colour, 127
        assert np.allclose(white[:, 7], 1) and np.allclose(white[:, 0], 127 / 127.5 - 1)
        path.unlink()


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
            for name in ("./a.png", ".//a.png", "deep\\b.jpg", "deep//b.jpg", "x/../a.png"):
                assert pictures.read(name) == files["deep/b.jpg" if "b" in name else "a.png"]
            assert pictures.read("a.png", 10) == files["a.png"][:10]
            for missing in ("c.png", "deep", "deep/", "pipe", "/dev/zero", "x" * 5000, "\0"):
                with pytest.raises(FileNotFoundError, match="picture "):
                    pictures.read(missing)
            with pytest.raises(FileNotFoundError, match="that is a URL, download it first"):
                pictures.read("https://example.com/a.png")
        whole = bytearray((tmp_path / "z.zip").read_bytes())
        far = whole.index(b"PK\1\2") + 42  # in the directory, where the first picture begins
        for at, wrong in ((31, b"\xff" * 20), (60, b"?" * 20), (far, b"\xff\xff\xff\x7f")):
            bad = write(tmp_path / "bad.zip", bytes(whole[:at] + wrong + whole[at + len(wrong) :]))
            with pytest.raises(ValueError, match="picture a.png in .*: damaged"):
                data.Pictures(bad).read("a.png")
    for name, content in {
        "cut.zip": whole[:900],
        "text.zip": b"hello",
        "directory.zip": whole.replace(b"PK\1\2", b"PK\1\3"),
    }.items():
        write(tmp_path / name, bytes(content))
        with pytest.raises(ValueError, match="nor a whole .zip"):
            data.Pictures(tmp_path / name)
    with pytest.raises(ValueError, match="neither a folder nor .*No such file"):
        data.Pictures(tmp_path / "nowhere")


class Reads(torch.utils.data.Dataset):
    def __init__(self, pictures, names):
        self.pictures, self.names = pictures, names

    def __getitem__(self, i):
        return self.pictures.read(self.names[i])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_forked_workers_read_one_zip_at_the_same_time(tmp_path, method):
    files = {f"{i}.bin": np.random.default_rng(i).bytes(50_000) for i in range(60)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    pictures = data.Pictures(tmp_path / "z.zip")
    batches = [[k + j for j in range(4)] for k in range(56)]
    forked = {"num_workers": 4, "multiprocessing_context": "fork", "collate_fn": list}
    rows = torch.utils.data.DataLoader(
        Reads(pictures, list(files)), batch_sampler=batches, **forked
    )
    for found, batch in zip(rows, batches, strict=True):
        assert found == [files[f"{i}.bin"] for i in batch]
        assert pictures.read("7.bin") == files["7.bin"]  # this process reads on, too


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


WHOLE_PICTURES = [("JPEG", encoded(noise(70, 50), "JPEG")), ("PNG", encoded(noise(40, 30))),
                  ("GIF", encoded(noise(20, 20, "P"), "GIF")), ("WEBP", encoded(noise(30, 20), "WEBP")),
                  ("TIFF", encoded(noise(20, 10), "TIFF")), ("BMP", encoded(noise(10, 9), "BMP"))]  # fmt: skip


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.sampled_from(WHOLE_PICTURES), damages)
def test_damaged_picture_is_a_picture_or_one_clear_error(whole, changes):
    try:
        picture = data.decode_picture(damage(whole[1], changes), "a.jpg")
    except ValueError as error:
        assert str(error).startswith("picture a.jpg: not one that can be read") and "\n" not in str(
            error
        )
        return
    assert picture.mode == "RGB" and PictureTransform(336, MEAN, STD, "pad")(picture).shape == (
        3,
        336,
        336,
    )
