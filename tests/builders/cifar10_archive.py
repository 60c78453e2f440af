"""Small archives in the official format of CIFAR-10, with sums of their own."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import torchvision

from mixadv.data.cifar10 import CIFAR10

PER_BATCH = 60
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BASE = "cifar-10-batches-py"


class Archive:
    """An archive, its pixels, and a data module that knows its sums instead of the published ones."""

    def __init__(self, train_images, train_labels, test_images, test_labels, names=NAMES):
        self.train_images, self.train_labels = train_images, train_labels
        self.test_images, self.test_labels = test_images, test_labels
        files = {}
        for number in range(5):
            rows = slice(number * PER_BATCH, (number + 1) * PER_BATCH)
            files[f"data_batch_{number + 1}"] = self._batch(train_images[rows], train_labels[rows])
        files["test_batch"] = self._batch(test_images, test_labels)
        files["batches.meta"] = pickle.dumps({"label_names": names})
        self.files = files
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in {**files, "readme.html": b"not needed"}.items():
                member = tarfile.TarInfo(f"{BASE}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.archive = buffer.getvalue()

    @staticmethod
    def _batch(images, labels):
        data = images.reshape(len(images), 3072)
        return pickle.dumps({"data": data, "labels": [int(label) for label in labels]}, protocol=2)

    def module(self, root, url="http://127.0.0.1:9/nothing", archive=None, **settings):
        sums = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}
        archive = self.archive if archive is None else archive

        class Reader(torchvision.datasets.CIFAR10):
            tgz_md5 = hashlib.md5(archive).hexdigest()
            train_list = [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)]  # noqa: RUF012
            test_list = [["test_batch", sums["test_batch"]]]  # noqa: RUF012
            meta = {**torchvision.datasets.CIFAR10.meta, "md5": sums["batches.meta"]}  # noqa: RUF012

        Reader.url = url

        class Small(CIFAR10):
            @classmethod
            def reader(cls):
                return Reader

        return Small(root, **{"num_val": 30, **settings})

    def unpack(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


def small_archive():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * PER_BATCH, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6 * PER_BATCH) * 7 % 10
    cut = 5 * PER_BATCH
    return Archive(images[:cut], labels[:cut], images[cut:], labels[cut:])
