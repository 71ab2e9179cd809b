"""Own pictures: picture files become the right pixels, and errors list every bad row.

The three kinds of table (`captions.csv`, `metadata.csv` and `metadata.jsonl`) go through the same
tests where they have the same rules.
"""

import csv
import functools
import io
import json
import os
import struct
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from t2ilearn.data import CaptionedPictures, CaptionError
from t2ilearn.data import folder as module
from t2ilearn.data.caption_tables import COLUMNS, read_table
from t2ilearn.data.folder import Folder, FolderError, split_by_content
from t2ilearn.data.picture_files import MOST_PIXELS, find_picture, read_picture, shrink

TABLES = tuple(COLUMNS)


def seed(number):
    return torch.Generator().manual_seed(number)


@functools.cache
def noise(number, width=24, height=20):
    """A picture unlike any with another number."""
    values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, suffix, **options):
    data = io.BytesIO()
    image.save(data, suffix, **options)
    return data.getvalue()


@functools.cache
def noise_png(number):
    return encoded(noise(number), "PNG")


def written(name, rows):
    """The text of a table of this kind with (file, caption) rows."""
    columns = COLUMNS[name]
    if name.endswith(".jsonl"):
        return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


@pytest.fixture
def make(tmp_path):
    """Write a folder: pictures (or bytes) by file name, and a table as text, bytes or rows."""

    def write(files, table, name="captions.csv"):
        for file, content in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.save(path)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(table, list):
            table = written(path.name, table)
        path.write_bytes(table if isinstance(table, bytes) else table.encode("utf-8"))
        return tmp_path

    return write


@pytest.fixture
def many(make):
    """A folder of 60 pictures with a caption each."""
    rows = [(f"{i}.png", f"number {i}") for i in range(60)]
    return make({f"{i}.png": noise_png(i) for i in range(60)}, rows)


def refusal(path, **options):
    with pytest.raises(FolderError) as caught:
        Folder(path, **options)
    return str(caught.value)


def pixels(path, image, **save):
    """What `read_picture` makes of a saved picture, as an array (height, width, 3)."""
    image.save(path, **save)
    picture = read_picture(path)
    assert picture.mode == "RGB"
    return np.array(picture).astype(int)


def png_chunk(kind, data):
    length, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
    return length + kind + data + check


# --- every kind of picture file ---

RED, WHITE = (255, 0, 0), (255, 255, 255)


def two_halves(mode, left, right):
    if mode == "I;16":  # which Pillow cannot paste into
        values = np.full((16, 16), left, dtype=np.uint16)
        values[:, 8:] = right
        return Image.fromarray(values)
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


@pytest.mark.parametrize(
    ("mode", "left", "right", "wanted_left", "wanted_right"),
    [
        ("1", 0, 1, (0,) * 3, WHITE),
        ("L", 10, 200, (10,) * 3, (200,) * 3),
        ("LA", (10, 255), (10, 0), (10,) * 3, WHITE),
        ("RGB", RED, (1, 2, 3), RED, (1, 2, 3)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), RED, WHITE),
        ("RGBA", (0, 0, 0, 51), (255, 0, 0, 102), (204,) * 3, (255, 153, 153)),
        ("I;16", 0, 65535, (0,) * 3, WHITE),
        ("I;16", 257 * 100, 257 * 7 + 128, (100,) * 3, (7,) * 3),
        ("I;16", 257 * 7 + 129, 300, (8,) * 3, (1,) * 3),
    ],
)
def test_every_colour_mode_is_converted_to_rgb(
    tmp_path, mode, left, right, wanted_left, wanted_right
):
    for suffix in ("png", "tif"):
        got = pixels(tmp_path / f"a.{suffix}", two_halves(mode, left, right))
        assert (got[:, :8] == wanted_left).all() and (got[:, 8:] == wanted_right).all(), suffix


def test_cmyk_and_every_file_format_are_converted_to_rgb(tmp_path):
    got = pixels(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.abs(got - (255, 0, 0)).max() <= 3
    formats = [("webp", {"lossless": True}), ("gif", {}), ("bmp", {}), ("ppm", {}), ("jp2", {})]
    for suffix, options in formats:
        got = pixels(tmp_path / f"a.{suffix}", two_halves("RGB", RED, (0, 0, 255)), **options)
        assert (got[:, :8] == RED).all() and (got[:, 8:] == (0, 0, 255)).all(), suffix


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["one index", "a table"])
def test_transparent_palette_entries_become_white(tmp_path, transparency):
    image = two_halves("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    got = pixels(tmp_path / "a.png", image, transparency=transparency)
    assert (got[:, :8] == RED).all() and (got[:, 8:] == WHITE).all()
    got = pixels(tmp_path / "a.gif", image, transparency=1)
    assert (got[:, :8] == RED).all() and (got[:, 8:] == WHITE).all()


def test_a_transparent_colour_without_alpha_channel_becomes_white(tmp_path):
    for mode, left, right in (("L", 9, 10), ("RGB", (9,) * 3, (10,) * 3), ("I;16", 257 * 9, 10)):
        data = encoded(two_halves(mode, left, right), "PNG")
        shown = right if mode == "RGB" else (right,)
        clear = png_chunk(b"tRNS", struct.pack(f">{len(shown)}H", *shown))
        (tmp_path / "a.png").write_bytes(data[:33] + clear + data[33:])  # behind the header
        got = np.array(read_picture(tmp_path / "a.png"))
        assert (got[:, :8] == 9).all() and (got[:, 8:] == WHITE).all(), mode


# Where the stored picture's corners (top left, top right, bottom left, bottom right) stand once it
# is upright. EXIF 2.32, tag 0x0112, says on which side row 0 and column 0 belong.
CORNERS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, suffix):
    shades = {"a": 0, "b": 80, "c": 160, "d": 240}
    stored = Image.new("L", (48, 32))
    for letter, corner in zip("abcd", ((0, 0), (24, 0), (0, 16), (24, 16)), strict=True):
        stored.paste(shades[letter], (*corner, corner[0] + 24, corner[1] + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    got = pixels(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
    height, width, _ = got.shape
    assert (width, height) == ((48, 32) if orientation < 5 else (32, 48))
    seen = [got[y, x, 0] for y in (4, height - 5) for x in (4, width - 5)]
    wanted = [shades[letter] for letter in CORNERS[orientation]]
    assert np.abs(np.array(seen) - wanted).max() <= 2


def test_a_damaged_exif_block_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for block in (b"Exif\0\0junk", exif.tobytes()[:-9], exif.tobytes()[:9], b""):
        for suffix in ("jpg", "png", "webp"):
            pixels(tmp_path / f"a.{suffix}", noise(0), exif=block)


def test_a_jpeg_with_two_pictures_is_read_as_its_first(tmp_path):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "blue")
    got = pixels(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert np.abs(got - RED).max() <= 3


# --- from a file to a tensor ---


def test_a_picture_of_the_right_size_keeps_its_pixels(make):
    picture = noise(3, 32, 32)
    world = Folder(make({"a.png": picture}, "file,caption\na.png,noise\n"), 32)
    got = world.sample(2, generator=seed(0))
    wanted = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(got.pictures[0], wanted) and got.captions == ["noise", "noise"]
    assert got.pictures.dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (65, 32), (32, 67)])
def test_pictures_are_cropped_to_the_central_square(make, size):
    """Red beside a blue square in the middle: after cropping, all is blue."""
    width, height = size
    image = Image.new("RGB", size, RED)
    left, top = (width - 32) // 2, (height - 32) // 2
    image.paste((0, 0, 255), (left, top, left + 32, top + 32))
    world = Folder(make({"a.png": image}, "file,caption\na.png,blue\n"), 16)
    got = world.sample(1, generator=seed(0)).pictures[0]
    assert (got[0] == -1).all() and (got[2] == 1).all()


def test_resampling_is_antialiased_and_stays_in_range(make):
    """Lines of one pixel become their mean, not one of their colours; hard edges do not ring out
    of [−1, 1]."""
    lines = np.zeros((256, 256, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    files = {"lines.png": Image.fromarray(lines), "small.png": two_halves("L", 0, 255)}
    table = "file,caption\nlines.png,lines\nsmall.png,small\n"
    world = Folder(make(files, table), 64)
    for split in ("train", "test"):
        (picture,), (caption,) = world.sample(1, split, generator=seed(0))
        if caption == "lines":
            assert picture[:, 4:-4, 4:-4].abs().max() < 0.05
        else:
            assert picture.min() == -1 and picture.max() == 1 and picture[0, 0, 0] == -1


def test_file_names_in_any_script_with_subfolders_and_both_slashes(make):
    decomposed = unicodedata.normalize("NFD", "été.png")
    files = {"猫/рыжий кот.png": noise(0), decomposed: noise(1), "a/b/c.png": noise(2)}
    table = '\ufefffile,caption\n猫/рыжий кот.png,"кот, рыжий"\nété.png,été\na\\b\\c.png,🦤\n'
    world = Folder(make(files, table))
    captions = {*world.captions, *world.test_set("test").captions}
    assert captions == {"кот, рыжий", "été", "🦤"}


def test_column_order_blank_lines_line_ends_and_white_space_do_not_matter(make):
    table = 'id, caption ,file\r\n\r\n7,"  a\r\n  star ", a.png \r\n\r\n'
    world = Folder(make({"a.png": noise(0)}, table))
    assert world.captions == ["a star"]


def test_several_rows_for_one_file_are_captions_of_one_picture(make):
    table = "file,caption\na.png,one\nb.png,other\na.png,two\n./a.png,three\n"
    world = Folder(make({"a.png": noise(0), "b.png": noise(1)}, table), 16)
    assert "2 distinct pictures" in repr(world) and "4 captions" in repr(world)
    batches = [world.sample(300, split, generator=seed(0)) for split in ("train", "test")]
    by_caption = {c: p for b in batches for p, c in zip(b.pictures, b.captions, strict=True)}
    assert set(by_caption) == {"one", "two", "three", "other"}
    assert torch.equal(by_caption["one"], by_caption["three"])
    assert not torch.equal(by_caption["one"], by_caption["other"])
    ours = next(b.captions for b in batches if "one" in b.captions)
    assert all(70 < ours.count(caption) < 130 for caption in ("one", "two", "three"))


def test_captions_are_those_of_the_training_split_in_the_tables_order(many):
    world = Folder(many, 16)
    numbers = [int(caption.split()[1]) for caption in world.captions]
    assert numbers == sorted(numbers)
    tested = world.test_set("test").captions
    assert not set(tested) & set(world.captions)
    assert len(tested) + len(numbers) == 60


def test_repr_states_the_totals(many):
    text = repr(Folder(many, 32, shift=2))
    for part in ("60 files", "60 distinct pictures", "60 captions", "32×32", "0.2 MiB"):
        assert part in text, text


# --- sampling ---


def test_equal_generators_draw_equal_batches(many):
    for shift in (0, 2):
        world = Folder(many, 16, shift)
        first = world.sample(40, generator=seed(5))
        again = Folder(many, 16, shift).sample(40, generator=seed(5))
        other = world.sample(40, generator=seed(6))
        assert torch.equal(first.pictures, again.pictures) and first.captions == again.captions
        assert first.captions != other.captions
        assert first.pictures.shape == (40, 3, 16, 16) and first.pictures.abs().max() <= 1


def test_pictures_keep_their_captions(many):
    world = Folder(many, 20)
    for split in ("train", "test"):
        for picture, caption in zip(*world.sample(50, split, generator=seed(1)), strict=True):
            wanted = shrink(noise(int(caption.split()[1])), 20).float() / 127.5 - 1
            assert torch.equal(picture, wanted)


def test_training_pictures_are_drawn_uniformly(many):
    world = Folder(many, 16)
    drawn = world.mixed_captions(world.scenes(6000, generator=seed(2)), seed(3))
    counts = {caption: drawn.count(caption) for caption in world.captions}
    mean = 6000 / len(counts)
    assert set(drawn) == set(counts)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())


def test_shift_moves_training_pictures_only(make):
    """The picture at the size it is stored in is known, so that every move can be checked."""
    ramp = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)
    files = {"a.png": Image.fromarray(ramp), "b.png": Image.fromarray(ramp[::-1])}
    world = Folder(make(files, "file,caption\na.png,up\nb.png,down\n"), 16, shift=2)
    for split in ("train", "test"):
        pictures, captions = world.sample(400, split, generator=seed(0))
        stored = ramp if captions[0] == "up" else ramp[::-1].copy()
        wanted = torch.from_numpy(stored).permute(2, 0, 1).float() / 127.5 - 1
        windows = {(y, x): wanted[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        found = [next(at for at, w in windows.items() if torch.equal(w, p)) for p in pictures]
        assert set(found) == (set(windows) if split == "train" else {(2, 2)})
    assert torch.equal(world.test_set("test").pictures[0], pictures[0])


def test_changing_a_batch_in_place_does_not_change_the_folder(many):
    world = Folder(many, 16)
    world.sample(60, generator=seed(0)).pictures.zero_()
    world.test_set("test").pictures.zero_()
    assert world.sample(60, generator=seed(0)).pictures.abs().mean() > 0.1
    assert world.test_set("test").pictures.abs().mean() > 0.1


def test_unknown_splits_and_values_out_of_range_are_refused(many):
    world = Folder(many)
    with pytest.raises(ValueError, match="Unknown split 'trian'; one of train, test"):
        world.sample(2, "trian", generator=seed(0))
    with pytest.raises(ValueError, match="Unknown test set 'full'; one of test"):
        world.test_set("full")
    with pytest.raises(ValueError, match="0 pictures or more"):
        world.test_set("test", -1)
    with pytest.raises(ValueError, match="at least 16"):
        Folder(many, 8)
    for shift in (-1, 9):
        with pytest.raises(ValueError, match="0 … 8 pixels at 64"):
            Folder(many, 64, shift)
    assert world.sample(0, generator=seed(0)).captions == []
    assert world.test_set("test", 0).pictures.shape == (0, 3, 64, 64)


# --- splits ---


def digest(fraction):
    return int(fraction * 2**64).to_bytes(8, "big") + bytes(24)


def test_one_picture_in_ten_is_in_the_test_split():
    generator = np.random.default_rng(0)
    train, test = split_by_content([generator.bytes(32) for _ in range(4000)])
    assert sorted(train + test) == list(range(4000))
    assert abs(len(test) - 400) < 4 * (4000 * 0.09) ** 0.5


def test_the_split_of_few_pictures():
    assert split_by_content([digest(0.5)]) == ([0], [])
    assert split_by_content([digest(0.01)]) == ([0], [])
    assert split_by_content([digest(0.9), digest(0.5)]) == ([0], [1])
    assert split_by_content([digest(0.02), digest(0.01)]) == ([0], [1])
    fractions = (0.5, 0.0999, 0.1001, 0.05)
    assert split_by_content([digest(f) for f in fractions]) == ([2, 0], [3, 1])


def test_splits_do_not_depend_on_resolution_order_or_file_names(many):
    tested = set(Folder(many, 16).test_set("test").captions)
    assert tested == set(Folder(many, 24, shift=1).test_set("test").captions)
    assert 1 <= len(tested) <= 15
    rows = "".join(f"{i}.png,number {i}\n" for i in reversed(range(60)))
    (many / "captions.csv").write_text("file,caption\n" + rows, encoding="utf-8")
    assert tested == set(Folder(many, 16).test_set("test").captions)
    for i in range(60):
        (many / f"{i}.png").rename(many / f"renamed {i}.png")
    (many / "captions.csv").write_text(
        "file,caption\n" + rows.replace(".png,", ".png,\n").replace("\n\n", "\n"), encoding="utf-8"
    )
    assert "bad rows" in refusal(many)
    rows = "".join(f"renamed {i}.png,number {i}\n" for i in range(60))
    (many / "captions.csv").write_text("file,caption\n" + rows, encoding="utf-8")
    assert tested == set(Folder(many, 16).test_set("test").captions)


def test_pictures_stay_in_their_split_when_others_are_added(many):
    tested = set(Folder(many, 16).test_set("test").captions)
    with open(many / "captions.csv", "a", encoding="utf-8") as table:
        for i in range(60, 90):
            (many / f"{i}.png").write_bytes(noise_png(i))
            table.write(f"{i}.png,number {i}\n")
    later = set(Folder(many, 16).test_set("test").captions)
    assert {c for c in later if int(c.split()[1]) < 60} == tested


def test_identical_pictures_are_in_one_split(make):
    """The same pixels under other names and in other formats: one picture, one split."""
    files, rows = {}, []
    for i in range(40):
        for suffix in ("png", "bmp", "tif"):
            files[f"{suffix}/{i}.{suffix}"] = noise(i)
            rows.append(f"{suffix}/{i}.{suffix},number {i} in {suffix}\n")
    world = Folder(make(files, "file,caption\n" + "".join(rows)), 16)
    assert "120 files, 40 distinct pictures" in repr(world) and "120 captions" in repr(world)
    tested = {caption.split()[1] for caption in world.test_set("test").captions}
    trained = {caption.split()[1] for caption in world.captions}
    assert tested and not tested & trained and len(tested | trained) == 40


def test_pictures_with_equal_bytes_and_different_shapes_are_distinct(make):
    """The same bytes as 16×32 and as 32×16: the size is part of what is hashed."""
    files = {"a.png": Image.new("RGB", (16, 32), RED), "b.png": Image.new("RGB", (32, 16), RED)}
    world = Folder(make(files, "file,caption\na.png,tall\nb.png,wide\n"))
    assert "2 distinct pictures (1 train, 1 test)" in repr(world)


def test_the_test_set_shows_every_picture_once_before_any_twice(many):
    with open(many / "captions.csv", "a", encoding="utf-8") as table:
        table.writelines(f"{i}.png,again {i}\n" for i in range(60))
    world = Folder(many, 16)
    pictures, captions = world.test_set("test")
    assert torch.equal(pictures, Folder(many, 16).test_set("test").pictures)
    half = len(captions) // 2
    assert [c.split()[0] for c in captions] == ["number"] * half + ["again"] * half
    assert torch.equal(pictures[:half], pictures[half:])
    assert len({p.numpy().tobytes() for p in pictures[:half]}) == half
    first = world.test_set("test", 1)
    assert first.captions == captions[:1] and torch.equal(first.pictures, pictures[:1])


def test_a_single_distinct_picture_is_for_training_and_leaves_no_test_split(make):
    files = {"a.png": noise(0), "b.bmp": noise(0)}
    world = Folder(make(files, "file,caption\na.png,one\nb.bmp,two\n"))
    assert world.captions == ["one", "two"]
    for use in (lambda: world.test_set("test"), lambda: world.sample(1, "test", generator=seed(0))):
        with pytest.raises(FolderError, match="one distinct picture.*add a second"):
            use()


# --- bad rows: each one listed, with the line it begins in ---


def png_header(width, height):
    """The first chunks of a PNG whose pixels are a few bytes of nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def cut(image, suffix):
    data = encoded(image, suffix)
    return data[: len(data) * 3 // 4]


SIDES = struct.pack("<HH", 65535, 65535)
HUGE_GIF = b"GIF89a" + SIDES + bytes(3) + b"," + bytes(4) + SIDES + b"\0\2\0;"
FRAMES = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]


def moving(suffix):
    return encoded(FRAMES[0], suffix, save_all=True, append_images=FRAMES[1:])


BAD_FILES = {
    "empty.png": (b"", "is an empty file"),
    "text.png": (b"these are not the pixels", "is not a picture (PNG, JPEG"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is not a picture"),
    "start.png": (encoded(noise(0), "PNG")[:20], "damaged or cut off"),
    "start.gif": (encoded(noise(0), "GIF")[:99], "only the first bytes of one"),
    "cut.png": (cut(noise(0), "PNG"), "damaged or cut off"),
    "cut.jpg": (cut(noise(0, 99, 99), "JPEG"), "damaged or cut off"),
    "cut.webp": (cut(noise(0), "WEBP"), "damaged or cut off"),
    "cut.gif": (cut(noise(0), "GIF"), "damaged or cut off"),
    "cut.bmp": (cut(noise(0), "BMP"), "damaged or cut off"),
    "cut.tif": (cut(noise(0), "TIFF"), "damaged or cut off"),
    "moving.gif": (moving("GIF"), "is animated"),
    "moving.png": (moving("PNG"), "is animated"),
    "moving.webp": (moving("WEBP"), "is animated"),
    "pages.tif": (moving("TIFF"), "several pages"),
    "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "is 1×1 pixels; a side has at least 8"),
    "low.png": (encoded(Image.new("RGB", (900, 7)), "PNG"), "is 900×7 pixels"),
    "long.png": (png_header(20_001, 9), "is 20001×9 pixels; a side has at most 20,000"),
    "large.png": (png_header(10_001, 10_000), "more than 100,000,000 pixels"),
    "bomb.png": (png_header(60_000, 60_000), "more than 100,000,000 pixels"),
    "bomb.gif": (HUGE_GIF, "more than 100,000,000 pixels"),
    "float.tif": (encoded(Image.new("F", (16, 16)), "TIFF"), "32-bit pixels"),
    "deep.tif": (encoded(Image.new("I", (16, 16)), "TIFF"), "32-bit pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_pictures_are_reported_with_their_line(make, name):
    content, reason = BAD_FILES[name]
    files = {"good.png": noise(1), name: content}
    text = refusal(make(files, f"file,caption\ngood.png,good\n{name},bad\ngood.png,good too\n"))
    assert "captions.csv has 1 bad row;" in text
    assert f"\n  line 3: {name!r} " in text and reason in text and text.count("\n") == 1
    assert "object at" not in text


def test_pictures_of_a_refused_size_are_not_decoded(make, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for name in ("long.png", "large.png", "bomb.png", "dot.png"):
        content, reason = BAD_FILES[name]
        assert reason in refusal(make({name: content}, f"file,caption\n{name},bad\n"))


OUTSIDE = ["../a.png", "sub/../../a.png", "sub/../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png"]
OUTSIDE += ["C:a.png", "\\\\server\\share\\a.png", "//server/a.png", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_existing_files_outside_the_folder_are_refused(make, name):
    files = {"sub/a.png": noise(0), "a.png": noise(0)}
    root = make(files, f"file,caption\nsub/a.png,x\n{name},y\n")
    text = refusal(root)
    assert "line 3: " in text and "outside the folder" in text and "line 2" not in text


def test_missing_files_folders_and_impossible_names_are_reported(make):
    names = ["none.png", "sub", ".", "captions.csv", "x" * 3000 + ".png", "good.png/x.png", "*"]
    table = "file,caption\n" + "".join(f"{name},bad\n" for name in [*names, ""])
    text = refusal(make({"sub/a.png": noise(0), "good.png": noise(1)}, table))
    assert "8 bad rows" in text and max(map(len, text.split("\n")[1:])) < 200
    reasons = dict(line.strip().split(": ", 1) for line in text.split("\n")[1:])
    assert reasons["line 2"] == "'none.png' is missing, or is not a file."
    assert reasons["line 5"].startswith("'captions.csv' is not a picture")
    # Python 3.14 no longer tells a name too long from a missing file.
    assert reasons["line 6"].startswith(f"'{'x' * 59}…' ")
    assert "cannot be opened: " in reasons["line 6"] or "is missing" in reasons["line 6"]
    assert reasons["line 9"].endswith("the name is empty.")


@pytest.mark.parametrize("name", ["a.png", "captions.csv"])
def test_files_without_read_permission_are_named(make, monkeypatch, name):
    """By a stand-in for the system's refusal: whoever runs the tests may be allowed everything."""
    really_open = module.Path.open

    def refuse(self, *args, **options):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return really_open(self, *args, **options)

    root = make({"a.png": noise(0)}, "file,caption\na.png,x\n")
    monkeypatch.setattr(module.Path, "open", refuse)
    monkeypatch.setattr(module.Path, "read_bytes", lambda self: self.open("rb").read())
    text = refusal(root)
    assert f"{name}" in text and "cannot be opened: Permission denied." in text


def test_every_bad_csv_row_is_listed_in_order_with_its_line(make):
    """Captions over several lines, blank lines and other line ends, then faults of every kind."""
    table = (
        "file,caption\r\n"  # 1
        'good.png,"over\r\n\r\nthree lines"\r\n'  # 2–4
        "\r\n"  # 5
        "none.png,a missing file\r\n"  # 6
        "good.png,   \r\n"  # 7
        'cut.png,"two\nlines"\r\n'  # 8–9
        "good.png,a star, large\r\n"  # 10
        "../out.png,\r\n"  # 11: two faults
        "good.png\r\n"  # 12
        "cut.png,another caption of it\r\n"  # 13
        ",no file\r\n"  # 14
        "good.png,fine\r\n"  # 15
    )
    text = refusal(make({"good.png": noise(0), "cut.png": cut(noise(1), "PNG")}, table))
    assert "captions.csv has 8 bad rows; correct or remove:" in text
    found = [line.strip().split(": ", 1) for line in text.split("\n")[1:]]
    assert [line for line, _ in found] == [f"line {n}" for n in (6, 7, 8, 10, 11, 11, 12, 13, 14)]
    wanted = [
        "missing",
        "caption of 'good.png' is empty",
        "damaged",
        "columns: 3 here, 2 in",
        "'../out.png'",
    ]
    wanted += ["'../out.png'", "columns: 1 here, 2 in", "damaged", "the name is empty"]
    for (_, reason), part in zip(found, wanted, strict=True):
        assert part in reason
    assert "goes in quotes" in found[3][1] and "goes in quotes" not in found[6][1]


@pytest.mark.parametrize(("bad", "more"), [(20, None), (21, "… and 1 more"), (1500, "1,480 more")])
def test_a_long_list_of_bad_rows_is_shortened(make, bad, more):
    text = refusal(make({}, "file,caption\n" + "none.png,x\n" * bad))
    lines = text.split("\n")[1:]
    assert f"{bad:,} bad rows" in text and lines[19].startswith("  line 21: ")
    assert len(lines) == 20 if more is None else (len(lines) == 21 and more in lines[20])


# --- captions.csv as a file ---


def test_a_missing_folder_or_table_is_reported(tmp_path):
    assert "There is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "picture.png").write_bytes(b"")
    assert "picture.png is a file; name the folder" in refusal(tmp_path / "picture.png")
    missing = "holds no captions.csv (and no metadata.csv or metadata.jsonl). Write one"
    assert missing in refusal(str(tmp_path))
    (tmp_path / "captions.csv").mkdir()
    assert "holds no captions.csv" in refusal(tmp_path)


BAD_TABLES = {
    "nothing": (b"", "is empty"),
    "blank lines": (b"\r\n\n", "is empty"),
    "a header alone": (b"file,caption\n\n", "has a header and no rows"),
    "another header": (b"name,text\na.png,x\n", "once each; found: 'name', 'text'."),
    "no header": (b"a.png,a star\n", "found: 'a.png', 'a star'."),
    "capitals": (b"File,Caption\na.png,x\n", "found: 'File', 'Caption'."),
    "a column twice": (b"file,caption,caption\na.png,x,y\n", "once each"),
    "semicolons": (b"file;caption\na.png;x\n", "columns is ';': save it with commas"),
    "tabs": (b"file\tcaption\na.png\tx\n", "columns is '\\t'"),
    "UTF-16": ("file,caption\na.png,x\n".encode("utf-16"), "is in UTF-16, not UTF-8. Save it"),
    "UTF-16 big": (b"\xfe\xff" + "file,caption\n".encode("utf-16-be"), "is in UTF-16"),
    "UTF-16 bare": ("file,caption\n".encode("utf-16-le"), "NUL byte in line 1; it may be UTF-16"),
    "a NUL": (b"file,caption\na.png,x\na.png,y\0\n", "NUL byte in line 3"),
    "Latin-1": ("file,caption\na.png,x\n,\na.png,été\n".encode("latin-1"), "from line 4 on"),
    "Latin-1, marked": (b"\xef\xbb\xbffile,caption\n\xe9\n", "not in UTF-8 from line 2 on"),
    "an unclosed quote": (b'file,caption\na.png,x\na.png,"y\na.png,z\n', "begins in line 3 "),
    "quotes in quotes": (b'file,caption\na.png,"a\nb"\na.png,"a "big" cat"\n', "begins in line 4 "),
    "an unclosed header": (b'file,"caption\na.png,x\n', "begins in line 1 "),
    "a long unclosed quote": (b'file,caption\na.png,"x\n' + b"b\n" * 99_999, "begins in line 2 "),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_unreadable_csv_files_are_refused(make, name):
    table, reason = BAD_TABLES[name]
    text = refusal(make({"a.png": noise(0)}, table))
    assert reason in text and "captions.csv" in text and "\n" not in text


LETTERS = st.sampled_from([*'",;\n\r\t a{}:[]\\', "file", "caption", "a.png", "é", "\u2028"])


@pytest.mark.parametrize("name", TABLES)
@given(parts=st.lists(LETTERS))
@settings(max_examples=40, deadline=None)
def test_any_text_is_read_as_a_table_or_refused(tmp_path_factory, name, parts):
    """Never another error than FolderError, and never one that is too long to read."""
    root = tmp_path_factory.getbasetemp() / f"any {name}"
    root.mkdir(exist_ok=True)
    (root / "a.png").write_bytes(noise_png(0))
    begin = written(name, [("a.png", "x")] if name.endswith(".jsonl") else [])
    (root / name).write_bytes((begin * (len(parts) % 4 > 0) + "".join(parts)).encode())
    try:
        assert Folder(root, 16).captions
    except FolderError as error:
        assert 10 < len(str(error)) < 4000


def test_quotes_inside_a_caption_are_kept(make):
    table = 'file,caption\na.png,a 12" record\na.png,"a ""big"" cat"\n'
    assert Folder(make({"a.png": noise(0)}, table)).captions == ['a 12" record', 'a "big" cat']


# --- the three kinds of table ---

ROWS = [("a.png", "a red star"), ("sub/b.png", 'a "big", blue 猫'), ("a.png", "one\nmore  star ")]
FILES = {"a.png": noise_png(0), "sub/b.png": noise_png(1)}


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_table_gives_the_same_world(make, tmp_path_factory, name):
    """Not even a resumed training run sees a difference: the fingerprint is the same."""
    root = make(FILES, ROWS, name)
    world = Folder(root, 16)
    assert world.table == root / name and world._captions == [
        ["a red star", "one more star"],
        ['a "big", blue 猫'],
    ]
    other = tmp_path_factory.mktemp("other")
    for file, content in FILES.items():
        (other / file).parent.mkdir(exist_ok=True)
        (other / file).write_bytes(content)
    (other / "captions.csv").write_text(written("captions.csv", ROWS), encoding="utf-8")
    assert world.fingerprint() == Folder(other, 16).fingerprint()
    (other / "captions.csv").write_text(written("captions.csv", ROWS[:2]), encoding="utf-8")
    assert world.fingerprint() != Folder(other, 16).fingerprint()


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("captions.csv", ["id,caption,file", "", "1,a,a.png", "", '2,"b,c",b.png']),
        ("metadata.csv", ["split,text,file_name", "", "x,a,a.png", "", 'y,"b,c",b.png']),
        ("metadata.csv", ["file_name,width,height,text", "", "a.png,,,a", "", 'b.png,1,2,"b,c"']),
        (
            "metadata.jsonl",
            [
                '{"text": "a", "file_name": "a.png"}',
                "",
                '  {"file_name": " b.png ", "objects": {"text": [1, null]}, "text": " b,c"}  ',
            ],
        ),
        (
            "metadata.jsonl",
            [
                '{"file_name": "a.png", "text": "\\u0061", "id": 7}',
                " ",
                '{"id": 7, "id": 8, "text": "b,c", "file_name": "b.png"}',
            ],
        ),
    ],
)
def test_other_columns_and_empty_lines_are_ignored(make, name, lines, end, marked):
    table = "\ufeff" * marked + end.join(lines)
    table = read_table(make({}, table, name))
    assert not table.faults
    assert [row[1:] for row in table.rows] == [("a.png", "a"), ("b.png", "b,c")]
    assert [row.line for row in table.rows] == ([1, 3] if name.endswith(".jsonl") else [3, 5])


@pytest.mark.parametrize("name", TABLES)
def test_bad_rows_name_their_file_and_line_in_every_kind_of_table(make, name):
    rows = [("a.png", "a"), ("none.png", "b"), ("a.png", " "), ("../a.png", "c"), ("cut.png", "d")]
    rows += [("", "e"), ("a.png", "f")]
    files = {"a.png": noise_png(0), "cut.png": cut(noise(1), "PNG")}
    root = make(files, rows, name)
    text = refusal(root)
    assert text.startswith(f"{root / name} has 5 bad rows; correct or remove:\n  line ")
    first = 1 if name.endswith(".jsonl") else 2
    parts = ["'none.png' is missing", "caption of 'a.png' is empty", "outside the folder"]
    parts += ["'cut.png' is damaged", "'' is not a file's name"]
    for number, (line, part) in enumerate(zip(text.split("\n")[1:], parts, strict=True), 1):
        assert line.startswith(f"  line {first + number}: ") and part in line


@pytest.mark.parametrize(
    "both", [TABLES, TABLES[:2], TABLES[1:], TABLES[::2]], ids=lambda names: " + ".join(names)
)
def test_two_tables_in_one_folder_are_refused(make, both):
    for name in both:
        root = make(FILES, ROWS, name)
    text = refusal(root)
    assert f"holds {' and '.join(both)}, which may contradict" in text and "Keep the one" in text
    for name in both[1:]:
        (root / name).unlink()
    assert Folder(root, 16).table.name == both[0]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_folder_below_is_pointed_out(make, name):
    """As in data sets with splits, where `train` and `test` have a table each."""
    for split in ("train", "test"):
        root = make({}, ROWS, f"{split}/{name}")
    text = refusal(root)
    assert text.endswith(f"There is {root / 'test' / name}: name the folder that holds it.")


BAD_METADATA = {
    "nothing": ("metadata.csv", "", "Begin it with the line file_name,text."),
    "a header alone": ("metadata.csv", "file_name,text\n", "has a header and no rows"),
    "no captions": ("metadata.csv", "file_name,label\na,x\n", 'must be called "text".'),
    "no files": ("metadata.csv", "image,text\na,x\n", "columns file_name and text, once each; f"),
    "a column twice": ("metadata.csv", "file_name,text,text\na,x,y\n", "once each; found: "),
    "ours": ("metadata.csv", "file,caption\na,x\n", "columns of a captions.csv: rename the file"),
    "theirs": ("captions.csv", "text,file_name\nx,a\n", "columns of a metadata.csv: rename the f"),
    "semicolons": ("metadata.csv", "file_name;text\na;x\n", "columns is ';': save it with commas"),
    "a quote": ("metadata.csv", 'file_name,text\na,x\na,"y\n', "row that begins in line 3 "),
    "empty": ("metadata.jsonl", "", 'Write one line like {"file_name": "rex.jpg", "text": "a brow'),
    "blank lines": ("metadata.jsonl", "\r\n\n", "is empty. Write one line like"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_unreadable_metadata_files_are_refused(make, case):
    name, table, reason = BAD_METADATA[case]
    text = refusal(make(FILES, table, name))
    assert reason in text and name in text.split(" ")[0] and "\n" not in text


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("ä\nx".encode("utf-16"), "is in UTF-16, not UTF-8. Save it again as UTF-8"),
        (b"a\nb\0", "NUL byte in line 2"),
        (b"a\n\n\xe9\n", "not in UTF-8 from line 3 on"),
    ],
)
def test_tables_in_other_encodings_are_refused(make, name, data, reason):
    text = refusal(make({}, data, name))
    assert reason in text and name in text and ("Excel" in text) == name.endswith(".csv")


GOOD_LINE = '{"file_name": "a.png", "text": "x"}'
BAD_LINES = {
    "not JSON": ("a.png,x", "not a JSON object of its own (Expecting value, character 1)"),
    "a comma too many": (GOOD_LINE + ",", "(Extra data, character 36)"),
    "two objects": (GOOD_LINE + GOOD_LINE, "(Extra data, character 36)"),
    "an open object": (GOOD_LINE[:-1], "not a JSON object of its own (Expecting ',' delimiter"),
    "a list": ('["a.png", "x"]', "begins without {"),
    "a text": ('"a.png"', "begins without {"),
    "null": ("null", "begins without {"),
    "brackets": ("[" * 100_000, "not a JSON object of its own"),
    "digits": ('{"id": ' + "9" * 9999 + "}", "too long a number"),
    "no file": ('{"text": "x"}', "the key file_name occurs 0 times; it must occur once"),
    "no caption": ('{"file_name": "a.png", "label": 3}', "the key text occurs 0 times"),
    "the keys of captions.csv": ('{"file": "a.png", "caption": "x"}', "file_name occurs 0 times"),
    "a key twice": ('{"file_name": "a.png", "text": "x", "text": "y"}', "text occurs 2 times"),
    "no text": ('{"file_name": "a.png", "text": null}', "value of text must be a text in double"),
    "a number": ('{"file_name": 7, "text": "x"}', "value of file_name must be a text in double"),
    "a list of texts": ('{"file_name": "a.png", "text": ["x"]}', "value of text must be a text"),
    "half a pair": ('{"file_name": "a.png", "text": "\\ud83d"}', "half a surrogate pair"),
    "a NUL": ('{"file_name": "a\\u0000.png", "text": "x"}', "value of file_name holds a NUL"),
    "an empty caption": ('{"file_name": "a.png", "text": " \\n "}', "caption of 'a.png' is empty"),
    "an empty name": ('{"file_name": "", "text": "x"}', "'' is not a file's name: the name is e"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_of_json_are_reported_with_their_number(make, case):
    line, reason = BAD_LINES[case]
    text = refusal(make(FILES, f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n", "metadata.jsonl"))
    assert "metadata.jsonl has 1 bad row; correct or remove:\n  line 3: " in text
    assert reason in text and text.count("\n") == 1 and len(text) < 400


def test_every_bad_line_of_json_is_listed_in_order(make):
    lines = [line for line, _ in BAD_LINES.values()]
    text = refusal(make(FILES, "\n".join(lines), "metadata.jsonl"))
    found = [int(line.split(":")[0].removeprefix("  line ")) for line in text.split("\n")[1:]]
    assert found == list(range(1, len(lines) + 1))


def test_json_keeps_surrogate_pairs_and_unicode_line_separators(make):
    """JSON may write "😀" as two escapes, and only a line feed ends a line of the table."""
    table = '{"file_name": "a.png", "text": "\\ud83d\\ude00 or 😀\u2028\x85smile"}\n'
    assert Folder(make(FILES, table, "metadata.jsonl"), 16).captions == ["😀 or 😀 smile"]


# --- what worlds offer to judges ---


def test_a_folder_has_the_parts_of_a_world_and_no_judge(many):
    world = Folder(many, 16)
    assert isinstance(world, CaptionedPictures) and world.worlds == (world,)
    assert world.judge is None and world.reader is None and not world.measures
    with pytest.raises(CaptionError, match="No grammar reads .* 'a star'"):
        world.read("a star")
    for compare in (world.facts, world.covers, world.unseen):
        with pytest.raises(ValueError, match="state no facts"):
            compare("a star")
    with pytest.raises(ValueError, match="Readers cannot be tested"):
        world.reader_test()


def test_test_scenes_and_groups_belong_to_the_test_set(many):
    with open(many / "captions.csv", "a", encoding="utf-8") as table:
        table.writelines(f"{i}.png,again {i}\n" for i in range(60))
    world = Folder(many, 16, shift=2)
    pictures, captions = world.test_set("test")
    scenes, same = world.test_scenes("test")
    assert same == captions and torch.equal(world.pictures(scenes, seed(0)), pictures)
    groups = world.groups("test")
    half = len(groups) // 2
    assert torch.equal(groups[:half], groups[half:]) and len(groups[:half].unique()) == half


def test_the_reference_set_is_made_of_training_pictures_and_repeats(many):
    world = Folder(many, 16)
    pictures = world.reference_set(50)
    assert pictures.shape == (50, 3, 16, 16) and torch.equal(pictures, world.reference_set(50))
    tested = {p.numpy().tobytes() for p in world.test_set("test").pictures}
    assert tested and not tested & {p.numpy().tobytes() for p in pictures}


# --- limits ---


def test_too_many_pictures_for_memory_are_refused_before_any_is_read(many, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_LIMIT", 60 * 3 * 64**2 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_picture", lambda path: pytest.fail("read"))
        text = refusal(many, resolution=64)
    assert "60 pictures of 64×64 need" in text and "resolution of 63 or less" in text
    assert Folder(many, 63).resolution == 63
    assert "or less" not in refusal(many, resolution=1024, shift=128)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 60 * 3 * 64**2)
    Folder(many, 64)
    assert "64×64" in refusal(many, resolution=64, shift=1)


@pytest.mark.parametrize("before", [(None, True), (10, False)])
def test_pillows_global_limits_are_neither_used_nor_changed(make, monkeypatch, before):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before[0])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", before[1])
    filters = list(warnings.filters)
    Folder(make({"a.png": noise(0)}, "file,caption\na.png,x\n"))
    for name in ("bomb.png", "cut.jpg", "text.png"):
        content, reason = BAD_FILES[name]
        assert reason in refusal(make({name: content}, f"file,caption\n{name},x\n"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before
    assert warnings.filters == filters


def test_an_interrupt_restores_pillows_limits(tmp_path, monkeypatch):
    def load(self):
        assert Image.MAX_IMAGE_PIXELS == MOST_PIXELS
        raise KeyboardInterrupt

    noise(0).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(KeyboardInterrupt):
        read_picture(tmp_path / "a.png")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_pillows_warnings_are_not_shown(make):
    image = two_halves("P", 0, 1)
    files = {name: content for name, (content, _) in BAD_FILES.items()}
    files["palette.png"] = encoded(image, "PNG", transparency=bytes([255, 0]))
    files["exif.jpg"] = encoded(noise(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09junk")
    table = "file,caption\n" + "".join(f"{name},x\n" for name in files)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        text = refusal(make(files, table))
    assert not leaked and "palette.png" not in text and "exif.jpg" not in text
    with pytest.warns(UserWarning), Image.open(io.BytesIO(files["exif.jpg"])) as image:
        image.getexif()  # so that there is something to leak


def test_links_are_followed_and_pipes_are_not_waited_for(make, tmp_path_factory):
    if os.name == "nt":
        pytest.skip("links need a privilege there")
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    noise(0).save(outside)
    root = make({}, "file,caption\nlink.png,x\n")
    (root / "link.png").symlink_to(outside)
    assert Folder(root).captions == ["x"]
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    for name in ("pipe.png", "loop.png"):
        with pytest.raises(FolderError, match="missing, or is not a file"):
            find_picture(root, name)
