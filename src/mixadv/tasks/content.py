"""The content that a measurement is about, as a digest: names stay when files behind them change."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from mixadv.checkpoint_files import digest_of
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.files import digest_of_files
from mixadv.members.source import Source
from mixadv.members.store import files_of
from mixadv.tasks import build


def content_of(cfg: DictConfig, sources: Sequence[Source] = ()) -> str:
    """Two digests, CLASSIFIERS:IMAGES.

    The first is of the files of the mixture, or of the members that `sources` name, and of the saved points. The second
    is of what the images are read from (see `ImageDataModule.origin`); it is "" if that is gone, or if the settings fix
    the images.

    Weights, protocol and seed are settings, which are compared by themselves.
    """
    origin = ""
    data: ImageDataModule = build.instantiate(cfg.data, "data")
    with suppress(UserError):
        origin = data.origin()
    own = [source.digest() for source in sources] if sources else [digest_of_files(files_of(Path(cfg.mixture)))]
    if cfg.points:
        own.append(digest_of_files([Path(cfg.points)]))
    return f"{digest_of({'classifiers': own})}:{origin}"
