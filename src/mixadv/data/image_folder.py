"""Your own images: one folder per class, decoded once."""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mixadv.data.base import ImageCorpus, ImageDataModule, user_cache
from mixadv.errors import UserError
from mixadv.files import read_arrays, replacing
from mixadv.memory import free_memory, in_gib

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Only these decoders are used, whatever the file's name, because some of Pillow's decoders can start programs.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_CACHE_FORMAT = 2
_TRANSPARENT = "num_transparent"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CHUNK = 256
_SMALL_FILE = 8192
# Copies of the pixels in memory at once.
COPIES = 2

log = logging.getLogger(__name__)


class _Image(NamedTuple):
    """An image file of one split: its place in its class, its label, and (name, size, mtime) for the fingerprint."""

    place: int
    label: int
    path: Path
    stamp: tuple[str, int, int]


class ImageFolder(ImageDataModule):
    """Images in `root/train/CLASS/*` and `root/test/CLASS/*`, classes in sorted order.

    If there is no folder `test`, the folder `val` is the test set. If there are both, `val` is not used, because
    validation images are split from `train`, see `ImageDataModule`. Both folders must have the same classes, none of
    them empty. Files with the endings `ENDINGS` are read. A class may hold its images in a folder ``images``, as in
    Tiny-ImageNet. What is left out is counted in `left_out`, with the
    reason, and told in one line: other endings, deeper folders, files beside the classes, folders beside the splits,
    transparency. Names that begin with a dot are hidden files of the system, and not counted.

    The classes take turns, each with its next image by file name, so that the first n images hold all classes.

    The images are decoded once, large ones in parallel, and kept as arrays in `root/.mixadv-cache` (in the user's cache
    if `root` cannot be written). The cache is valid as long as the list of files (names, sizes, times of change) and
    the settings stay the same; otherwise it is replaced.

    Args:
        root: the folder.
        image_size: None keeps the size of the files, which must all have the same size; n resizes every image to n x n
            (bilinear with antialiasing; the aspect ratio is not kept).
        channels: 3 for RGB (grey images are repeated), 1 for grey (ITU-R 601 luma of coloured ones).
            Transparency is dropped, and counted in `left_out`; the orientation recorded in the file is applied.
        name: the name of the data in figures and tables; None for the folder's name.
        common: see `ImageDataModule`.

    Raises:
        ValueError: image_size or channels is outside its range.
        UserError: a missing or unreadable folder or image, missing or differing classes, differing sizes, images with
            more than 8 bits per channel or with several frames.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        channels: int = 3,
        name: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 or null, got {image_size}")
        if not str(root):
            raise ValueError("data.root is empty: name the folder that holds train/CLASS and test/CLASS")
        self.root = Path(root).expanduser().absolute()
        self.image_size = image_size
        self.channels = channels
        self.name = name or self.root.resolve().name
        self._prepared: ImageCorpus | None = None

    def prepare_data(self) -> None:
        """Decode the images unless their cache is up to date."""
        if not hasattr(self, "test_images"):
            self._prepared = self._read()

    def load(self) -> ImageCorpus:
        corpus = self._prepared or self._read()
        self._prepared = None
        return corpus

    def origin(self) -> str:
        """A digest of the settings and of the names, sizes and dates of all images."""
        return self._listing()[0]

    def _listing(self) -> tuple[str, list[str], list[_Image], list[_Image]]:
        """`origin`, the names of the classes, the training images and the test images; what is not one is counted."""
        self.left_out = {}
        try:
            test_name, class_names, train, test = self._list()
        except OSError as error:
            raise UserError(f"cannot read the images below {self.root}: {error}") from error
        self._check_memory([image.path for image in (*train, *test)])
        stamps = {"train": [image.stamp for image in train], test_name: [image.stamp for image in test]}
        content = json.dumps([self._cached(), class_names, stamps])
        return hashlib.blake2b(content.encode()).hexdigest(), class_names, train, test

    def _cached(self) -> dict[str, Any]:
        """The settings that decide what is in the cache."""
        return {"format": _CACHE_FORMAT, "image_size": self.image_size, "channels": self.channels}

    def _read(self) -> ImageCorpus:
        fingerprint, class_names, train, test = self._listing()
        settings = self._cached()
        candidates = self._cache_files(settings)
        arrays = next(filter(None, (_load_cache(path, fingerprint) for path in candidates)), {})
        if not arrays:
            images, num_transparent = self._decode([*train, *test])
            labels = np.array([image.label for image in (*train, *test)], dtype=np.int64)
            cut = len(train)
            parts = (images[:cut], labels[:cut], images[cut:], labels[cut:])
            arrays = {**dict(zip(_ARRAYS, parts, strict=True)), _TRANSPARENT: np.array(num_transparent)}
            _save_cache(candidates, arrays, fingerprint)
        self._leave_out("transparency of images", int(arrays.pop(_TRANSPARENT)))
        if self.left_out:
            counts = ", ".join(f"{reason} ({count:,})" for reason, count in self.left_out.items())
            log.warning("Not read in %s: %s.", self.root, counts)
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return ImageCorpus(**tensors, class_names=tuple(class_names))

    def _leave_out(self, reason: str, count: int = 1) -> None:
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def _check_memory(self, paths: Sequence[Path]) -> None:
        """Refuse folders whose decoded images cannot be in memory; all images have the size of the first.

        They need their size once more while validation images are split from the others.
        """
        free = free_memory()
        width, height = (self.image_size, self.image_size) if self.image_size else _size_of(paths[0])
        count = self.channels * len(paths)
        needed = COPIES * count * width * height
        if free is None or needed <= free:
            return
        fits = math.isqrt(free // (COPIES * count))
        remedy = f"data.image_size=N with N at most {fits}" if fits else "fewer images"
        raise UserError(
            f"{len(paths):,} images of {width}x{height} pixels in {self.root} need {in_gib(needed)} of memory, but "
            f"only {in_gib(free)} are free: use {remedy}"
        )

    def _cache_files(self, settings: dict[str, Any]) -> list[Path]:
        # One file for each choice of settings, replaced when the images change, so that old caches do not pile up.
        key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=6).hexdigest()
        place = hashlib.blake2b(str(self.root.resolve()).encode(), digest_size=12).hexdigest()
        return [
            self.root / ".mixadv-cache" / f"{key}.npz",
            user_cache() / "image_folder" / place / f"{key}.npz",
        ]

    def _list(self) -> tuple[str, list[str], list[_Image], list[_Image]]:
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}: set data.root to the folder that holds train/ and test/")
        test_name = next((name for name in ("test", "val") if (self.root / name).is_dir()), None)
        if not (self.root / "train").is_dir() or test_name is None:
            raise UserError(f"{self.root} must hold the folders train/CLASS and test/CLASS (or val/CLASS)")
        if test_name == "test" and (self.root / "val" / "val_annotations.txt").is_file():
            raise UserError(
                f"{self.root} is Tiny-ImageNet as published, whose test images have no labels: move the images of "
                "val/images into val/CLASS, as val/val_annotations.txt says, and remove test/"
            )
        names, in_test = self._class_names("train"), self._class_names(test_name)
        if differing := sorted({*names} ^ {*in_test}, key=lambda name: (name in in_test, name)):
            extra = differing[0]
            here, there = ("train", test_name) if extra in names else (test_name, "train")
            raise UserError(
                f"{self.root}: the class {extra!r} is in {here}/ but not in {there}/; both need the same classes: add "
                "or remove its folder"
            )
        if len(names) < 2:
            raise UserError(
                f"{self.root} has only the class {names[0]!r}, but a classifier needs two or more: give every class a "
                "folder in train/ and in test/"
            )
        splits = self._list_split("train", names), self._list_split(test_name, names)
        for other in sorted(e.name for e in os.scandir(self.root) if e.is_dir() and e.name[0] != "."):
            if other not in ("train", test_name):
                used = f"; {test_name}/ is the test set" if other == "val" else ""
                self._leave_out(f"images in {other}/ beside train/{used}", len(_images_below(self.root / other)))
        return test_name, names, *splits

    def _class_names(self, split: str) -> list[str]:
        folder = self.root / split
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if not names:
            raise UserError(f"{folder} holds no class folders: put the images into {folder}/CLASS/")
        return names

    def _list_split(self, split: str, names: Sequence[str]) -> list[_Image]:
        found = []
        beside = [e for e in os.scandir(self.root / split) if e.name[0] != "." and not e.is_dir()]
        self._leave_out(f"files in {split}/ beside the classes", len(beside))
        for label, name in enumerate(names):
            for place, path in enumerate(self._images_of(self.root / split / name)):
                stat = path.stat()
                if not S_ISREG(stat.st_mode):
                    raise UserError(f"cannot read the image {path} (it is not a file): replace or remove it")
                place_in_split = path.relative_to(self.root / split).as_posix()
                found.append(_Image(place, label, path, (place_in_split, stat.st_size, stat.st_mtime_ns)))
        # The first image of every class, then the second, and so on: then a limited evaluation has all classes.
        return sorted(found)

    def _images_of(self, folder: Path) -> list[Path]:
        """The images of a class in the order of their names; whatever else is there is counted as left out."""
        entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda e: e.name)
        images = [folder / e.name for e in entries if e.name.lower().endswith(ENDINGS)]
        if not images and [e.name for e in entries if e.is_dir()] == ["images"]:
            self._leave_out("files beside a folder images/", len(entries) - 1)
            return self._images_of(folder / "images")
        if not images:
            below = _images_below(folder)
            there = f", but {below[0]} is one in a folder below it: move those up" if below else ": add some"
            raise UserError(
                f"{folder} holds no images ({', '.join(ENDINGS)}){there}, or remove the class from both splits"
            )
        for entry in entries:
            if entry.name.lower().endswith(ENDINGS):
                continue
            if entry.is_dir():
                self._leave_out("images in folders below a class", len(_images_below(Path(entry.path))))
            else:
                ending = Path(entry.name).suffix.lower()
                self._leave_out(f"{ending} files" if ending else "files without an ending")
        return images

    def _decode(self, files: Sequence[_Image]) -> tuple[NDArray[np.uint8], int]:
        """The images uint8 [N, C, H, W], and the number of those that are transparent somewhere."""
        paths = [image.path for image in files]
        first, _ = self.decode(paths[0])
        images = np.empty((len(paths), *first.shape), dtype=np.uint8)

        def decode_chunk(start: int) -> int:
            num_transparent = 0
            for index in range(start, min(start + _CHUNK, len(paths))):
                image, transparent = self.decode(paths[index])
                num_transparent += transparent
                if image.shape != first.shape:
                    raise UserError(
                        f"images of different sizes: {paths[0]} is {first.shape[2]}x{first.shape[1]}, "
                        f"{paths[index]} is {image.shape[2]}x{image.shape[1]}; resize all of them "
                        "with data.image_size=32"
                    )
                images[index] = image
            return num_transparent

        # With small files most time is spent in Python under the interpreter lock, so threads do not help: 60,000
        # CIFAR images on two cores took 14 to 18 s in one thread, 13 to 21 s in two (three runs each).
        small = sum(size for _, _, _, (_, size, _) in files) < _SMALL_FILE * len(files)
        with ThreadPoolExecutor(max_workers=1 if small else min(32, os.cpu_count() or 1)) as pool:
            # In order, so that the reported error does not depend on the speed of threads. An error cancels the rest.
            return images, sum(pool.map(decode_chunk, range(0, len(paths), _CHUNK)))

    def decode(self, path: Path) -> tuple[NDArray[np.uint8], bool]:
        """An image file as those of the folder are read: uint8 [C, H, W], and whether a pixel of it is transparent.

        Raises:
            UserError: it cannot be read, or would lose more than its transparency.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            # One read instead of the decoder's many small ones.
            with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as opened:
                if opened.mode.startswith(("I", "F")) or _is_deep(opened):
                    raise UserError(
                        f"{path} has more than 8 bits per channel (mode {opened.mode}): convert it to 8 "
                        "bits, because an automatic conversion would clip its range"
                    )
                # Some cameras append previews to a JPEG, which are no images of their own.
                frames = 1 if opened.format in ("JPEG", "MPO") else getattr(opened, "n_frames", 1)
                if frames > 1:
                    raise UserError(f"{path} has {frames} frames, of which one would be read: save that one alone")
                transparent = opened.has_transparency_data and opened.convert("RGBA").getextrema()[3][0] < 255
                image = ImageOps.exif_transpose(opened).convert("RGB" if self.channels == 3 else "L")
                if self.image_size is not None and image.size != (self.image_size, self.image_size):
                    image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # The message of PIL names a buffer, not the file.
            known = f"it is not an image in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            reason = known if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"cannot read the image {path} ({reason}): replace or remove it") from error
        return pixels.transpose(2, 0, 1) if self.channels == 3 else pixels[None], transparent


def _images_below(folder: Path) -> list[Path]:
    """The files with endings of images in a folder and in the folders below it, hidden ones excluded."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(place, file) for file in sorted(files) if file.lower().endswith(ENDINGS) and file[0] != "."]
    return found


def _is_deep(opened: Any) -> bool:
    """Whether a file has more than 8 bits per channel, which Pillow's decoders cut to 8 in colours without a word.

    Their arguments name the layout in the file, as RGB;16B, and for PPM the largest value.
    """
    if opened.format == "BMP":
        # There BGR;16 stands for 16 bits per pixel.
        return False
    for decoder, _, _, arguments in opened.tile:
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if decoder.startswith("ppm") and values[-1] > 255:
            return True
        if any(isinstance(value, str) and re.search(r";(?:16|32|64)", value) for value in values):
            return True
    return False


def _size_of(path: Path) -> tuple[int, int]:
    """Width and height from the header of a file; (0, 0) if it cannot be read: decoding the file then reports that."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            return opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0


def _load_cache(path: Path, fingerprint: str) -> dict[str, NDArray[Any]] | None:
    """The arrays, if the file is not damaged (zip checks its sums) and belongs to these images."""
    try:
        arrays = read_arrays(path) or {}
    except ValueError:
        return None
    return arrays if str(arrays.pop("fingerprint", "")) == fingerprint else None


def _save_cache(candidates: Sequence[Path], arrays: dict[str, NDArray[Any]], fingerprint: str) -> None:
    """Write the first of the paths that can be written; not compressed, so that it loads fast."""
    contents: dict[str, Any] = {"fingerprint": np.array(fingerprint), **arrays}
    failure: OSError | None = None
    for path in candidates:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **contents)
            return
        except OSError as error:  # noqa: PERF203
            failure = error
    log.warning("The decoded images could not be cached (%s): every run will decode them again.", failure)
