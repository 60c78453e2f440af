"""Images as batches: CIFAR-10, folders of images, and the embedded digits.

Every data set is one file with one subclass of `ImageDataModule`, plus one file in `conf/data`. The names
below are resolved on first use, because Lightning's import takes seconds and `mixadv.data.stream` alone needs
only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixadv.data.augment import random_crop_flip
    from mixadv.data.base import ImageCorpus, ImageDataModule
    from mixadv.data.cifar10 import CIFAR10
    from mixadv.data.digits import Digits
    from mixadv.data.image_folder import ImageFolder
    from mixadv.data.stream import BatchStream

__all__ = [
    "CIFAR10",
    "BatchStream",
    "Digits",
    "ImageCorpus",
    "ImageDataModule",
    "ImageFolder",
    "random_crop_flip",
]

_HOMES = {
    "CIFAR10": "cifar10",
    "BatchStream": "stream",
    "Digits": "digits",
    "ImageCorpus": "base",
    "ImageDataModule": "base",
    "ImageFolder": "image_folder",
    "random_crop_flip": "augment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
