"""Data sets as LightningDataModules: batches that live on the device, addressed by their number."""

from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.cifar10 import CIFAR10
from mixadv.data.digits import Digits
from mixadv.data.image_folder import ImageFolder

__all__ = ["CIFAR10", "Digits", "ImageCorpus", "ImageDataModule", "ImageFolder"]
