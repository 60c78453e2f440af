"""The digits of scikit-learn, as tensors and as a data module, and seeded generators."""

from functools import cache

import torch

from mixadv.data.digits import Digits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def digits_tensors():
    """Training images [1437, 1, 8, 8] in [0, 1] and labels, test images and labels. Shared: never change them."""
    corpus = Digits().load()
    return corpus.train_images / 255, corpus.train_labels, corpus.test_images / 255, corpus.test_labels


def digits_module(build=Digits, **settings):
    """A small data module, not set up: batches of 16, 96 images to train on, 40 to validate on, 20 to test on."""
    small = {"batch_size": 16, "eval_batch_size": 16, "num_train": 96, "num_val": 40, "num_test": 20}
    return build(**small | settings)


def set_up(data):
    """The data module after what a trainer does with it first."""
    data.prepare_data()
    data.setup()
    return data
