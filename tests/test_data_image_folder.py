"""Images from folders: listing, decoding, cache, refusals."""

import itertools
import logging
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixadv.data import image_folder
from mixadv.data.image_folder import ImageFolder
from mixadv.errors import UserError

JPEGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-jpeg.tar.gz"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def pixels(seed, height=5, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Classes of 8 and 4 training and 3 and 2 test images, 7 wide and 5 high; PNG and BMP lose nothing."""
    root = tmp_path / "flowers"
    seed = 0
    for split, sizes in (("train", {"rose": 4, "aster": 8}), ("test", {"aster": 3, "rose": 2})):
        for name, count in sizes.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                ending = ".BMP" if index % 2 else ".png"
                Image.fromarray(pixels(seed)).save(root / split / name / f"{index:02d}{ending}")
                seed += 1
    return root


def set_up_folder(root, **settings):
    data = ImageFolder(root, **{"num_val": 3, **settings})
    data.prepare_data()
    data.setup()
    return data


def by_hand(root, split):
    """The first image of every class, the second of every class, ...: classes and names sorted."""
    columns = [sorted(folder.iterdir()) for folder in sorted((root / split).iterdir())]
    images, labels = [], []
    for row in itertools.zip_longest(*columns):
        for label, path in enumerate(row):
            if path is not None:
                images.append(np.array(Image.open(path)).transpose(2, 0, 1))
                labels.append(label)
    return np.stack(images), np.array(labels)


def assert_complete(data, root, test="test"):
    images, labels = by_hand(root, test)
    np.testing.assert_array_equal(data.test_images.numpy(), images)
    np.testing.assert_array_equal(data.test_labels.numpy(), labels)
    images, labels = by_hand(root, "train")
    for split in ("train", "val"):
        rows = getattr(data, f"{split}_indices").numpy()
        np.testing.assert_array_equal(getattr(data, f"{split}_images").numpy(), images[rows])
        np.testing.assert_array_equal(getattr(data, f"{split}_labels").numpy(), labels[rows])


def count_decodings(monkeypatch):
    decoded = []
    original = ImageFolder.decode

    def counting(self, path):
        decoded.append(path)
        return original(self, path)

    monkeypatch.setattr(ImageFolder, "decode", counting)
    return decoded


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_images_and_labels(folder, monkeypatch, small):
    # Files below the limit are decoded in one thread, those above in several: same result.
    monkeypatch.setattr(image_folder, "_SMALL_FILE", small)
    monkeypatch.setattr(image_folder, "_CHUNK", 2)
    data = set_up_folder(folder)
    assert (data.name, data.class_names, data.image_shape) == ("flowers", ("aster", "rose"), (3, 5, 7))
    assert (data.num_train, data.num_val, data.num_test) == (9, 3, 5)
    assert_complete(data, folder)
    assert np.bincount(data.val_labels).tolist() == [2, 1]


def test_val_stands_in_for_a_missing_test_split(folder):
    (folder / "test").rename(folder / "val")
    assert_complete(set_up_folder(folder), folder, test="val")


def test_test_is_preferred_to_val_and_val_is_not_mixed_in(folder):
    for name in ("aster", "rose"):
        (folder / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels(99)).save(folder / "val" / name / "0.png")
    data = set_up_folder(folder)
    assert_complete(data, folder)
    assert data.num_train + data.num_val == 12


def test_what_is_not_an_image_is_passed_over(folder):
    for path in ("train/.hidden/0.png", "train/notes.txt", "train/rose/list.csv", "train/rose/._00.png"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"x")
    data = set_up_folder(folder, name="Flowers")
    assert (data.num_train + data.num_val, data.num_classes, data.name) == (12, 2, "Flowers")


def test_grey_and_colour(folder):
    grey = set_up_folder(folder, channels=1)
    assert grey.image_shape == (1, 5, 7)
    path = folder / "test" / "aster" / "00.png"
    red, green, blue = np.array(Image.open(path)).transpose(2, 0, 1).astype(float)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(grey.test_images[0, 0].numpy() - luma).max() <= 1
    Image.open(path).convert("L").save(path)
    first = set_up_folder(folder).test_images[0].numpy()
    np.testing.assert_array_equal(first, np.broadcast_to(np.array(Image.open(path)), (3, 5, 7)))


def test_image_size_resizes_all(folder):
    Image.fromarray(np.full((9, 4, 3), (10, 200, 30), dtype=np.uint8)).save(folder / "test" / "aster" / "00.png")
    data = set_up_folder(folder, image_size=6)
    assert data.image_shape == (3, 6, 6)
    np.testing.assert_array_equal(data.test_images[0, :, 3, 2].numpy(), [10, 200, 30])


def test_recorded_orientation_is_applied(folder):
    upright = pixels(5, height=5, width=7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the file holds the image lying on its side
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    lying.save(folder / "test" / "aster" / "00.png", exif=exif)
    np.testing.assert_array_equal(set_up_folder(folder).test_images[0].numpy(), upright.transpose(2, 0, 1))


@pytest.mark.skipif(not JPEGS.exists(), reason=f"needs {JPEGS.name} beside the repository")
def test_real_jpegs(tmp_path):
    # Members near the beginning of the archive: eight images of a class to train on, the next four to test.
    wanted = {f"test/{name}/{i:04d}.jpg" for name in ("airplane", "automobile", "bird") for i in range(12)}
    with tarfile.open(JPEGS) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in wanted:
                wanted.remove(name)
                _, label, file = name.split("/")
                path = tmp_path / ("train" if file < "0008" else "test") / label / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
                if not wanted:
                    break
    data = set_up_folder(tmp_path, name="CIFAR-10 (JPEG)")
    assert (data.name, data.image_shape, data.class_names) == (
        "CIFAR-10 (JPEG)",
        (3, 32, 32),
        ("airplane", "automobile", "bird"),
    )
    assert (data.num_train, data.num_val, data.num_test) == (21, 3, 12)
    # One image of every class after the other, so that a part of the test set holds all classes.
    for index, name in enumerate(sorted((tmp_path / "test").glob("*/*.jpg"), key=lambda p: (p.name, p.parent.name))):
        expected = np.array(Image.open(name).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.test_images[index].numpy(), expected)


# --- what is left out --------------------------------------------------------------------------------------


def test_endings_that_are_read(folder):
    expected = []
    for k, (name, format_name) in enumerate({"a.tif": "TIFF", "b.tiff": "TIFF", "c.ppm": "PPM"}.items()):
        image = Image.fromarray(pixels(200 + k))
        image.save(folder / "test" / "aster" / name, format_name, **({"compression": "tiff_lzw"} if k else {}))
        expected.append(pixels(200 + k).transpose(2, 0, 1))
    Image.fromarray(pixels(7)).save(folder / "test" / "aster" / "d.JFIF", "JPEG")
    data = set_up_folder(folder)
    asters = data.test_images[data.test_labels == 0].numpy()
    assert len(asters) == 7
    np.testing.assert_array_equal(asters[3:6], expected)
    assert data.left_out == {}


def test_files_that_are_not_read_are_counted_by_reason(folder, caplog):
    image = (folder / "train" / "rose" / "00.png").read_bytes()
    for path in (
        *("train/rose/a.gif", "train/aster/b.GIF", "test/rose/c.txt", "test/rose/README", "train/notes.csv"),
        *("train/rose/more/0.png", "train/rose/more/deep/1.jpg", "train/rose/more/x.csv", "val/rose/0.png"),
        *("val/aster/0.png", "extra/0.png", "train/rose/.DS_Store", ".git/0.png", "train/rose/.thumbs/0.png"),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image)
    for number in range(2):
        clear = Image.fromarray(pixels(3)).convert("RGBA")
        # An opaque alpha channel loses nothing.
        clear.putpixel((4, 2), (9, 9, 9, 255 if number else 254))
        clear.save(folder / "train" / "aster" / f"{2 * number:02d}.png")
    found = {
        ".gif files": 2,
        ".txt files": 1,
        "files without an ending": 1,
        "files in train/ beside the classes": 1,
        "images in folders below a class": 2,
        "images in val/ beside train/; test/ is the test set": 2,
        "images in extra/ beside train/": 1,
        "transparency of images": 1,
    }
    # The second reading finds the images in the cache.
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mixadv"):
            data = set_up_folder(folder)
        assert data.left_out == found
        (line,) = caplog.messages
        assert line.startswith(f"Not read in {folder}: ")
        assert all(f"{reason} ({count})" in line for reason, count in found.items())
        assert (data.num_train + data.num_val, data.num_test) == (12, 5)


def test_classes_with_a_folder_of_images_are_read(folder):
    for split in ("train", "test"):
        for place in (folder / split).iterdir():
            files = list(place.iterdir())
            (place / "images").mkdir()
            for path in files:
                path.rename(place / "images" / path.name)
            (place / "boxes.txt").write_text("0 0 3 3")
    data = set_up_folder(folder)
    assert (data.num_train + data.num_val, data.num_test) == (12, 5)
    assert data.left_out == {"files beside a folder images/": 4}
    first = np.array(Image.open(folder / "test" / "aster" / "images" / "00.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.test_images[0].numpy(), first)


def test_tiny_imagenet_as_published_is_named(folder):
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\trose\t0\t0\t4\t4\n")
    refused_folder(folder, "is Tiny-ImageNet as published.* move the images of val/images into val/CLASS")


def test_images_one_folder_too_deep_are_named(folder):
    for split in ("train", "test"):
        (folder / split / "tulip" / "raw").mkdir(parents=True)
        Image.fromarray(pixels(1)).save(folder / split / "tulip" / "raw" / "7.png")
    refused_folder(folder, r"train/tulip holds no images .* but .*tulip/raw/7\.png is one in a folder below it")


def png_with_16_bits(channels):
    """A PNG of 7 x 5 pixels, written by hand: Pillow writes none with 16 bits in colour."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.random.default_rng(0).integers(0, 2**16, (5, 7 * channels), dtype=np.uint16).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 7, 5, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_with_16_bits():
    """An RGB TIFF of 7 x 5 pixels."""
    data = np.arange(105, dtype="<u2").tobytes()
    tags = ((256, 3, 1, 7), (257, 3, 1, 5), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128))
    tags += ((277, 3, 1, 3), (278, 3, 1, 5), (279, 4, 1, len(data)))
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, 9) + listed + struct.pack("<IHHH", 0, 16, 16, 16) + data


@pytest.mark.parametrize("form", ["grey", "grey with alpha", "RGB", "RGBA", "TIFF", "PPM", "plain PPM"])
def test_sixteen_bits_in_any_form_are_refused(folder, form):
    channels = {"grey": 1, "grey with alpha": 2, "RGB": 3, "RGBA": 4}
    content = {
        "TIFF": tiff_with_16_bits,
        "PPM": lambda: b"P6 7 5 65535 " + bytes(210),
        "plain PPM": lambda: b"P3 7 5 1023 " + b"1000 " * 105,
    }.get(form, lambda: png_with_16_bits(channels[form]))
    (folder / "train" / "rose" / "02.png").write_bytes(content())
    refused_folder(folder, r"rose/02\.png has more than 8 bits per channel")


def test_bitmaps_with_16_bits_per_pixel_have_less_than_8_per_channel(folder):
    rows = np.full((5, 8), 0b0_11111_00000_00000, dtype="<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 7, 5, 1, 16, 0, len(rows), 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows
    (folder / "test" / "aster" / "00.png").write_bytes(content)
    assert set_up_folder(folder).test_images[0, :, 2, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG"])
def test_files_with_several_frames_are_refused(folder, form):
    frames = [Image.fromarray(pixels(k)) for k in range(3)]
    frames[0].save(folder / "train" / "rose" / "02.png", form, save_all=True, append_images=frames[1:])
    refused_folder(folder, r"rose/02\.png has 3 frames, of which one would be read: save that one alone")


# --- cache -----------------------------------------------------------------------------------------------


def test_images_are_decoded_once(folder, monkeypatch):
    decoded = count_decodings(monkeypatch)
    set_up_folder(folder)
    assert len(set(decoded)) == 17
    decoded.clear()
    assert_complete(set_up_folder(folder, seed=4), folder)
    assert decoded == []
    (cache,) = (folder / ".mixadv-cache").iterdir()
    # Other settings have a cache of their own; changed files replace the old one.
    set_up_folder(folder, channels=1)
    assert len(set(decoded)) == 17
    assert len(list((folder / ".mixadv-cache").iterdir())) == 2
    decoded.clear()
    set_up_folder(folder)
    assert decoded == []
    assert cache.exists()


@pytest.mark.parametrize("change", ["content", "time", "added", "renamed", "moved to another class"])
def test_a_changed_folder_is_decoded_again(folder, monkeypatch, change):
    set_up_folder(folder)
    path = folder / "train" / "rose" / "00.png"
    if change == "content":
        # Same size in bytes and same name: only the time of change differs.
        Image.fromarray(pixels(77)).save(path)
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "added":
        Image.fromarray(pixels(78)).save(path.with_name("zz.png"))
    elif change == "renamed":
        path.rename(path.with_name("zz.png"))
    else:
        path.rename(folder / "train" / "aster" / "zz.png")
    decoded = count_decodings(monkeypatch)
    assert_complete(set_up_folder(folder), folder)
    assert decoded
    assert len(list((folder / ".mixadv-cache").iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_cache_is_made_anew(folder, monkeypatch, damage):
    set_up_folder(folder)
    (cache,) = (folder / ".mixadv-cache").iterdir()
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        place = content.index(by_hand(folder, "train")[0].tobytes()) + 100
        content[place] ^= 255
    elif damage == "empty":
        content = b""
    else:
        content = b"PK but not a cache"
    cache.write_bytes(content)
    decoded = count_decodings(monkeypatch)
    assert_complete(set_up_folder(folder), folder)
    assert decoded
    decoded.clear()
    set_up_folder(folder)
    assert decoded == []


def test_without_a_writable_root_the_user_cache_is_used(folder, monkeypatch, tmp_path):
    # A file in the place of the folder stands for a read-only disk, which a test run by root cannot make.
    (folder / ".mixadv-cache").write_bytes(b"in the way")
    decoded = count_decodings(monkeypatch)
    set_up_folder(folder)
    assert len(list((tmp_path / "user-cache").rglob("*.npz"))) == 1
    decoded.clear()
    assert_complete(set_up_folder(folder), folder)
    assert decoded == []


def test_without_any_cache_it_says_so_and_goes_on(folder, monkeypatch, tmp_path, caplog):
    (folder / ".mixadv-cache").write_bytes(b"in the way")
    (tmp_path / "user-cache").write_bytes(b"in the way")
    decoded = count_decodings(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="mixadv"):
        assert_complete(set_up_folder(folder), folder)
    assert "could not be cached" in caplog.text
    # prepare_data and setup in one process share what was decoded.
    assert len(decoded) == 18


# --- refusals --------------------------------------------------------------------------------------------


def refused_folder(root, message, **settings):
    with pytest.raises(UserError, match=message) as raised:
        set_up_folder(root, **settings)
    return str(raised.value)


def test_missing_folders(folder, tmp_path):
    refused_folder(tmp_path / "nowhere", r"there is no folder .*nowhere: set data\.root")
    refused_folder(folder / "train", "must hold the folders train/CLASS and test/CLASS")
    (folder / "empty" / "train").mkdir(parents=True)
    (folder / "empty" / "test").mkdir()
    refused_folder(folder / "empty", "train holds no class folders: put the images into .*train/CLASS")
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        ImageFolder("")


def test_an_unreadable_path(folder):
    loop = folder / "train" / "rose" / "loop.png"
    loop.symlink_to(loop)
    refused_folder(folder, r"cannot read the images below .*loop\.png")


def test_the_classes_of_both_splits_must_agree(folder):
    (folder / "test" / "tulip").mkdir()
    refused_folder(folder, "the class 'tulip' is in test/ but not in train/")
    (folder / "test" / "tulip").rmdir()
    (folder / "train" / "iris").mkdir()
    refused_folder(folder, "the class 'iris' is in train/ but not in test/")


def test_a_class_without_images(folder):
    for split in ("train", "test"):
        (folder / split / "tulip").mkdir()
        (folder / split / "tulip" / "photo.gif").write_bytes(b"x")
    refused_folder(folder, r"train/tulip holds no images \(\.png, .*\): add some, or remove")


def test_mixed_sizes(folder):
    Image.fromarray(pixels(1, height=6)).save(folder / "train" / "rose" / "02.png")
    message = refused_folder(folder, r"data\.image_size=32")
    assert "aster/00.png is 7x5" in message
    assert "rose/02.png is 7x6" in message
    assert not (folder / ".mixadv-cache").exists()
    set_up_folder(folder, image_size=5)


@pytest.mark.parametrize("damage", ["truncated", "not an image", "folder"])
def test_a_corrupt_image_is_named(folder, damage):
    path = folder / "train" / "rose" / "02.png"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>")
    message = refused_folder(folder, r"cannot read the image .*rose/02\.png .*: replace or remove it")
    assert ("it is not an image" in message) == (damage == "not an image")


def test_more_than_eight_bits_are_not_cut_off_silently(folder):
    deep = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    Image.fromarray(deep).save(folder / "train" / "rose" / "02.png")
    refused_folder(folder, r"rose/02\.png has more than 8 bits per channel .* convert it to 8 bits")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 4}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"image_size": 0}, "image_size must be at least 1 or null, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"val_fraction": 1.5}, "val_fraction must be between 0 and 1"),
        ({"num_val": 12}, "flowers has 12 training images, too few"),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        set_up_folder(folder, **settings)


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [2 * 17 * 3 * 5 * 7 - 1, 2 * 17 * 3 - 1])
def test_images_that_memory_cannot_hold_are_refused_before_they_are_decoded(folder, monkeypatch, free):
    """17 images of 7x5 pixels with 3 channels, twice."""
    monkeypatch.setattr(image_folder, "free_memory", lambda: free)
    monkeypatch.setattr(ImageFolder, "_decode", None)
    with pytest.raises(
        UserError, match=r"^17 images of 7x5 pixels in .* need 0\.0 GiB of memory, but only "
    ) as refused:
        ImageFolder(folder).prepare_data()
    fits = "data.image_size=N with N at most 5" if free > 2 * 17 * 3 else "fewer images"
    assert str(refused.value).endswith(f"use {fits}")


@pytest.mark.parametrize("free", [None, 2 * 17 * 3 * 5 * 7])
def test_images_that_fit_are_read(folder, monkeypatch, free):
    monkeypatch.setattr(image_folder, "free_memory", lambda: free)
    assert set_up_folder(folder).num_test == 5


def test_the_size_that_is_asked_for_counts(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "free_memory", lambda: 2 * 17 * 3 * 4 * 4)
    assert set_up_folder(folder, image_size=4).image_shape == (3, 4, 4)
    with pytest.raises(UserError, match="at most 4"):
        ImageFolder(folder, image_size=5).prepare_data()
