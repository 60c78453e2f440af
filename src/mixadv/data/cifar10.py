"""CIFAR-10 from its official archive, wherever that is found."""

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10 as Reader
from torchvision.datasets.utils import calculate_md5

from mixadv.data.base import ImageCorpus, ImageDataModule, user_cache
from mixadv.errors import UserError

# Seconds that an address may take to answer, and that its data may pause.
TIMEOUT = 15.0


class CIFAR10(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 3x32x32, ten classes.

    `root` is a folder that holds `cifar-10-python.tar.gz` or the unpacked `cifar-10-batches-py`, or is itself
    one of the two. If neither is there, the archive is downloaded into `root`: from its home, then from `mirrors`
    in order. If the folder of the archive cannot be written to, it is unpacked into the user's cache.

    The batch files are pickles, which run code when they are read. torchvision's reader reads them, and only after
    the published md5 of each file was checked.

    Args:
        root: see above; relative to the working directory.
        download: whether a missing archive is downloaded.
        mirrors: further addresses (URLs) of the same archive.
        val_fraction: 0.02 by default, the 1,000 images that Rice et al. (2020) select on.
        common: see `ImageDataModule`.

    Raises:
        UserError: the archive is missing, damaged or not CIFAR-10; the message says what to do.
    """

    name = "CIFAR-10"

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        mirrors: Sequence[str] | str = (),
        *,
        val_fraction: float | None = 0.02,
        **common: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, **common)
        if not str(root):
            raise ValueError("data.root is empty: name the folder that holds (or shall hold) CIFAR-10")
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.mirrors = (mirrors,) if isinstance(mirrors, str) else tuple(mirrors or ())
        self._verified = False

    @classmethod
    def reader(cls) -> type[Reader]:
        """torchvision's reader: the names, addresses and md5 sums of the archive and of every file in it."""
        return Reader

    def prepare_data(self) -> None:
        """Find or fetch the archive, unpack it if need be, and check every batch file."""
        try:
            folder = self._unpacked()
            if folder is None:
                archive = self._archive() or self._downloaded()
                folder = self._unpack(archive)
            self._verify(folder)
            self._verified = True
        except OSError as error:
            raise UserError(f"CIFAR-10: cannot use {self.root}: {error}. {self._remedy()}") from error

    def load(self) -> ImageCorpus:
        try:
            folder = self._unpacked()
            if folder is None:
                raise UserError(f"CIFAR-10 is not in {self.root}. {self._remedy()}")
            if not self._verified:
                self._verify(folder)
            # The reader checks the sums once more, immediately before it unpickles.
            reader = self.reader()
            located = type(reader.__name__, (reader,), {"base_folder": folder.name})
            train, test = (located(folder.parent, train=part) for part in (True, False))
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-10: cannot read it in {self.root}: {error}. {self._remedy()}") from error
        # [N, H, W, C] -> [N, C, H, W].
        images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
        labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
        return ImageCorpus(images, labels, test_images, test_labels, tuple(train.classes))

    @property
    def _home(self) -> Path:
        """The folder in which the archive and its unpacked folder lie side by side."""
        is_part = self.root.is_file() or self.root.name == self.reader().base_folder
        return self.root.parent if is_part else self.root

    @property
    def _cache(self) -> Path:
        return user_cache() / f"cifar10-{self.reader().tgz_md5}"

    def _sums(self) -> dict[str, str]:
        reader = self.reader()
        return {**dict(reader.train_list + reader.test_list), reader.meta["filename"]: reader.meta["md5"]}

    def _unpacked(self) -> Path | None:
        base = self.reader().base_folder
        for folder in (self.root, self._home / base, self._cache / base):
            if all((folder / name).is_file() for name in self._sums()):
                return folder
        return None

    def _verify(self, folder: Path) -> None:
        for name, expected in self._sums().items():
            if wrong := _mismatch(folder / name, expected):
                raise UserError(
                    f"CIFAR-10: {folder / name} {wrong}. "
                    f"It was not read. Delete the folder {folder} and run again: it is unpacked afresh "
                    "from the archive."
                )

    def _archive(self) -> Path | None:
        """The archive at hand, checked."""
        reader = self.reader()
        if self.root.suffix in (".gz", ".tgz", ".tar") and not self.root.exists():
            raise UserError(f"CIFAR-10: there is no file {self.root}. {self._remedy()}")
        archive = self.root if self.root.is_file() else self._home / reader.filename
        # Path.exists() returns False for a path without permission too; stat() tells the two apart.
        try:
            archive.stat()
        except FileNotFoundError:
            return None
        if wrong := _mismatch(archive, reader.tgz_md5):
            raise UserError(
                f"CIFAR-10: {archive} {wrong}. It was not unpacked. Delete it and run again, or replace it. "
                f"{self._remedy()}"
            )
        return archive

    def _downloaded(self) -> Path:
        reader = self.reader()
        if not self.download:
            raise UserError(f"CIFAR-10 is not in {self.root}, and data.download is off. {self._remedy()}")
        reasons = []
        for url in (reader.url, *self.mirrors):
            failure = _download(url, self._home / reader.filename, reader.tgz_md5)
            if not failure:
                return self._home / reader.filename
            reasons.append(f"{url}: {failure}")
        raise UserError(
            f"CIFAR-10 is not in {self.root} and could not be downloaded ({'; '.join(reasons)}). {self._remedy()}"
        )

    def _unpack(self, archive: Path) -> Path:
        folder = self._home / self.reader().base_folder
        try:
            folder.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            folder = self._cache / self.reader().base_folder
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                for name in self._sums():
                    member = tar.extractfile(f"{self.reader().base_folder}/{name}")
                    if member is None:
                        raise KeyError(name)
                    with member, open(Path(temporary) / name, "wb") as file:
                        shutil.copyfileobj(member, file)
                # One rename per file: another process sees a file whole or not at all.
                for name in self._sums():
                    (Path(temporary) / name).replace(folder / name)
        except (OSError, tarfile.TarError, EOFError, KeyError) as error:
            raise UserError(f"CIFAR-10: cannot unpack {archive} into {folder}: {error}. {self._remedy()}") from error
        return folder

    def _remedy(self) -> str:
        reader = self.reader()
        return (
            f"Put {reader.filename} (md5 {reader.tgz_md5}) into {self._home}, or say where it is with "
            "data.root=PATH or DATA_DIR=PATH, or where to download it with 'data.mirrors=[URL]'. "
            "`make quickstart`, data=digits and data=image_folder need no download."
        )


def _mismatch(path: Path, expected: str) -> str:
    """How the md5 of the file differs from `expected`, and whether it is a web page, the usual reason; "" if equal."""
    actual = calculate_md5(path)
    if actual == expected:
        return ""
    with path.open("rb") as file:
        is_page = file.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head"))
    page = "; it is a web page, not an archive" if is_page else ""
    return f"has md5 {actual} instead of {expected} ({path.stat().st_size:,} bytes{page})"


def _download(url: str, target: Path, md5: str) -> str:
    """Download `target` whole or not at all, with a progress bar; the reason if that fails, else ""."""
    import pooch
    import requests

    downloader = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT, chunk_size=1 << 18)
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(url, known_hash=f"md5:{md5}", fname=target.name, path=target.parent, downloader=downloader)
        # pooch leaves the file readable for its owner alone, but DATA_DIR may be shared.
        target.chmod(0o644)
    except requests.HTTPError as error:
        return str(error)
    except requests.Timeout:
        return f"no answer within {TIMEOUT:g} s"
    except requests.RequestException as error:
        # The cause stands at the end of a chain of messages.
        return str(error).rpartition(": ")[2].strip(")'\"")
    except ValueError:
        return f"the file there does not have md5 {md5}"
    return ""
