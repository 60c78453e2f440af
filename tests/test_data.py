"""Batches, augmentation, splits, and the digits."""

import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule, Trainer

from builders.data import set_up
from conftest import QUIET
from mixadv.data.augment import random_crop_flip
from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.digits import Digits
from mixadv.data.split import channel_statistics, stratified_subset
from mixadv.data.stream import BatchStream
from mixadv.data.triangle import Triangle
from mixadv.errors import UserError
from mixadv.game import ceiling, conflicts

CONF = Path(__file__).resolve().parents[1] / "conf" / "data"


def numbered_images(count, channels=3, height=5, width=7):
    """Image i holds i in its first pixel and noise elsewhere; its label is a function of i."""
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return torch.from_numpy(pixels), (torch.arange(count) * 3) % 11


def stream(count=23, batch_size=4, **settings):
    return BatchStream(*numbered_images(count), batch_size, **settings)


def epoch_of(batches):
    """The batches of one whole epoch, which is then closed."""
    served = list(batches)
    batches.close_epoch()
    return served


def one_by_one(batches):
    """Batches without end; an epoch is closed when the batch after its last one is asked for."""
    while True:
        yield from batches
        batches.close_epoch()


def numbers(batches):
    return [(x[:, 0, 0, 0] * 255).round().int().tolist() for x, _ in batches]


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, two, strict=True)
    )


# --- the stream ------------------------------------------------------------------------------------------


def test_pixels_are_exactly_uint8_over_255():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ((x, y),) = BatchStream(values, torch.tensor([4], dtype=torch.uint8), 1)
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert x.dtype == torch.float32
    assert y.dtype == torch.long
    np.testing.assert_array_equal(x.flatten().numpy(), expected)
    assert x.min() == 0
    assert x.max() == 1


def test_a_pass_is_a_permutation_and_labels_follow_their_images():
    images, labels = numbered_images(24)
    served = list(BatchStream(images, labels, 4, seed=3))
    order = [i for batch in numbers(served) for i in batch]
    assert sorted(order) == list(range(24))
    assert order != list(range(24))
    assert [len(y) for _, y in served] == [4] * 6
    for x, y in served:
        chosen = (x[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(y, labels[chosen])
        torch.testing.assert_close(x * 255, images[chosen].float())


def test_passes_differ_and_leave_out_different_rests():
    batches = stream(23, 4, seed=1)
    passes = [[i for batch in numbers(epoch_of(batches)) for i in batch] for _ in range(3)]
    assert all(len(set(served)) == 20 for served in passes)
    assert len({frozenset(served) for served in passes}) > 1
    assert len({tuple(served) for served in passes}) == 3


def test_fewer_images_than_the_batch_size_give_one_ragged_batch_per_pass():
    batches = stream(5, 8)
    assert len(batches) == 1
    for _ in range(2):
        assert [sorted(batch) for batch in numbers(epoch_of(batches))] == [[0, 1, 2, 3, 4]]


def test_ordered_stream_serves_everything_in_order_every_time():
    images, labels = numbered_images(10)
    batches = BatchStream(images, labels, 4, shuffle=False)
    for _ in range(2):
        assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert len(batches) == 3
    assert batches.state_dict()["position"] == 0


def test_equal_seeds_agree_and_different_seeds_do_not():
    settings = {"padding": 2, "flip": True}
    first, second, other = (stream(seed=seed, **settings) for seed in (5, 5, 6))
    one, two, three = ([batch for _ in range(3) for batch in epoch_of(s)] for s in (first, second, other))
    assert same(one, two)
    assert not same(one, three)
    # Seed 0 is a seed like any other, and -1 is not 1.
    assert numbers(stream(seed=0)) == numbers(stream(seed=0)) != numbers(stream(seed=1))
    assert numbers(stream(seed=-1)) != numbers(stream(seed=1))


def test_every_batch_has_crops_of_its_own():
    # All images are the same, so batches differ by their augmentation alone.
    images = numbered_images(1)[0].expand(24, -1, -1, -1)
    batches = BatchStream(images, torch.zeros(24), 6, padding=2, flip=True)
    served = [x.numpy().tobytes() for _ in range(2) for x, _ in epoch_of(batches)]
    assert len(set(served)) == 8


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = list(stream(padding=1, flip=True))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert same(one, list(stream(padding=1, flip=True)))


@pytest.mark.parametrize("served", [0, 1, 4, 5, 8, 13])
def test_resuming_continues_with_the_same_batches(served):
    settings = {"seed": 2, "padding": 2, "flip": True, "batches_per_epoch": 4}
    whole = stream(**settings)
    reference = [batch for _ in range(6) for batch in epoch_of(whole)]
    stopped = stream(**settings)
    source = one_by_one(stopped)
    for _ in range(served):
        next(source)
    if not stopped.batches_left:
        stopped.close_epoch()
    state = stopped.state_dict()
    assert state["position"] == served
    assert state["epoch"] == served // 4
    assert all(type(value) is int for value in state.values())
    resumed = stream(**settings)
    resumed.load_state_dict(state)
    assert (resumed.epoch, len(resumed)) == (stopped.epoch, len(stopped))
    rest = one_by_one(resumed)
    assert same(reference[served : served + 9], [next(rest) for _ in range(9)])


def test_resuming_in_an_epoch_serves_what_is_left_of_it():
    stopped = stream(24, 4)
    source = iter(stopped)
    reference = [next(source) for _ in range(6)]
    batches = stream(24, 4)
    batches.load_state_dict({**stopped.state_dict(), "position": 2})
    assert len(batches) == batches.batches_left == 4
    assert same(epoch_of(batches), reference[2:])
    assert len(batches) == len(list(batches)) == 6


@pytest.mark.parametrize("length", [None, 4])
def test_an_epoch_whose_end_is_due_is_one_batch_of_no_examples(length):
    settings = {"seed": 2, "batch_size": 4, "batches_per_epoch": length}
    stopped = stream(24, **settings)
    assert stopped.batches_left == (length or 6)
    list(stopped)
    assert stopped.batches_left == 0
    resumed = stream(24, **settings)
    resumed.load_state_dict(stopped.state_dict())
    assert stopped.epoch == resumed.epoch == 0
    assert len(resumed) == 1
    ((x, y),) = resumed
    assert (x.shape, y.shape) == ((0, *stopped.images.shape[1:]), (0,))
    # Not yet closed: stopped again, it is still due.
    assert resumed.state_dict() == stopped.state_dict()
    resumed.close_epoch()
    assert resumed.epoch == 1
    assert resumed.state_dict() == {**stopped.state_dict(), "epoch": 1}
    assert len(resumed) == (length or 6)
    stopped.close_epoch()
    assert same(list(resumed), list(stopped))


def test_a_batch_taken_back_is_served_again():
    batches = stream(24, 4, seed=3)
    source = iter(batches)
    first, second = next(source), next(source)
    batches.take_back()
    assert batches.state_dict()["position"] == 1
    again = list(batches)
    assert len(again) == 5
    assert same([second], again[:1])
    assert not same([first], [second])


def test_taken_back_the_first_batch_of_an_epoch_leaves_the_one_before_closed():
    batches = stream(24, 4)
    epoch_of(batches)
    next(iter(batches))
    assert batches.batches_left == 5
    batches.take_back()
    assert batches.batches_left == 6
    assert batches.epoch == 1
    resumed = stream(24, 4)
    resumed.load_state_dict(batches.state_dict())
    assert len(resumed) == 6


def test_taken_back_the_last_batch_of_an_epoch_leaves_it_open():
    batches = stream(24, 4, seed=3)
    *_, last = batches
    batches.take_back()
    assert (batches.epoch, len(batches)) == (0, 1)
    assert same([last], list(batches))


def test_resuming_with_other_settings_is_refused():
    state = stream(23, 4, seed=0).state_dict()
    for other, message in (
        (stream(23, 4, seed=1), "seed=0, this run 1"),
        (stream(23, 5, seed=0), "batch_size=4, this run 5"),
        (stream(22, 4, seed=0), "num_examples=23, this run 22"),
        (stream(23, 4, seed=0, batches_per_epoch=7), "batches_per_epoch=5, this run 7"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_epochs_have_the_length_asked_for(length):
    batches = stream(24, 4, batches_per_epoch=length)
    plain = stream(24, 4)
    served = []
    while len(served) < 12:
        assert len(batches) == length
        epoch = epoch_of(batches)
        assert len(epoch) == length
        served += epoch
    # The epochs cut the one stream into pieces: they do not change what it holds.
    assert same(served[:12], [*epoch_of(plain), *epoch_of(plain)])


def test_the_same_batches_again():
    """Three batches, crops and all, in epochs of five."""
    settings = {"seed": 2, "padding": 2, "flip": True}
    first = list(stream(24, 4, **settings))[:3]
    batches = stream(24, 4, **settings, batches_per_epoch=5, repeat=3)
    assert same(epoch_of(batches), [*first, *first[:2]])
    assert same(epoch_of(batches), [first[2], *first, first[0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"images": torch.zeros(6, 3, 4, 4)}, "must be uint8"),
        ({"images": torch.zeros(6, 4, 4, dtype=torch.uint8)}, "must be uint8"),
        ({"labels": torch.zeros(5)}, r"6 images need labels \[6\], got \(5,\)"),
        (
            {"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0)},
            "at least one image",
        ),
        ({"padding": -1}, "padding must be >= 0, got -1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1, got 0"),
        ({"repeat": 0}, "repeat must be at least 1, got 0"),
        ({"shuffle": False, "flip": True}, "are for a training stream"),
        ({"shuffle": False, "batches_per_epoch": 2}, "are for a training stream"),
    ],
)
def test_bad_streams_are_refused(change, message):
    settings = {
        "images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8),
        "labels": torch.zeros(6),
        "batch_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        BatchStream(**{**settings, **change})


def test_batches_are_made_on_the_device_that_was_named():
    # The meta device computes shapes only, but refuses to mix with tensors that were left elsewhere.
    batches = stream(device="meta", padding=1, flip=True)
    x, y = next(iter(batches))
    assert x.device.type == y.device.type == "meta"
    x, _ = next(iter(stream(device="meta", shuffle=False)))
    assert x.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_serves_the_same_numbers_as_the_cpu():
    settings = {"seed": 4, "padding": 2, "flip": True}
    here, there = list(stream(**settings)), list(stream(device="cuda", **settings))
    assert all(x.is_cuda and y.is_cuda for x, y in there)
    assert same(here, [(x.cpu(), y.cpu()) for x, y in there])


# --- augmentation ----------------------------------------------------------------------------------------


def crop_flip_one_by_one(x, padding, flip, generator):
    """The same random numbers, images and pixels one at a time."""
    count, _, height, width = x.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator) if padding else None
    coins = torch.randint(0, 2, (count, 1), generator=generator) if flip else None
    result = np.zeros(x.shape, dtype=x.numpy().dtype)
    for b in range(count):
        padded = np.pad(x[b].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        row, column = (int(offsets[0, b]), int(offsets[1, b])) if padding else (0, 0)
        crop = padded[:, row : row + height, column : column + width]
        result[b] = crop[:, :, ::-1] if flip and coins[b] else crop
    return torch.from_numpy(result)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (3, True), (0, False)])
def test_augmentation_against_one_image_at_a_time(padding, flip, dtype):
    images = numbered_images(17)[0].to(dtype)
    ours = random_crop_flip(images, padding, flip, torch.Generator().manual_seed(5))
    slow = crop_flip_one_by_one(images, padding, flip, torch.Generator().manual_seed(5))
    assert ours.dtype == dtype
    assert torch.equal(ours, slow)
    assert torch.equal(ours, images) == (not padding and not flip)


def test_offsets_and_flips_are_uniform():
    # One bright pixel in the middle of a 5x6 image shows where its image went.
    images = torch.zeros(4000, 1, 5, 6, dtype=torch.uint8)
    images[:, 0, 2, 1] = 1
    out = random_crop_flip(images, 1, True, torch.Generator().manual_seed(0))
    _, _, rows, columns = out.nonzero(as_tuple=True)
    assert len(rows) == 4000
    counts = np.zeros((5, 6))
    np.add.at(counts, (rows.numpy(), columns.numpy()), 1)
    # Rows 1..3; columns 0..2 unflipped, 3..5 flipped: 18 places, 222 each, deviation 14.5.
    assert (counts[1:4] > 222 - 80).all()
    assert (counts[1:4] < 222 + 80).all()
    assert counts.sum() == counts[1:4].sum()


# --- splits and statistics -------------------------------------------------------------------------------


def test_subset_keeps_the_shares_of_the_classes():
    labels = torch.tensor([0] * 50 + [1] * 30 + [4] * 20)[torch.randperm(100, generator=torch.Generator())]
    chosen = stratified_subset(labels, 10, seed=0)
    assert torch.bincount(labels[chosen], minlength=5).tolist() == [5, 3, 0, 0, 2]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    # 7 of 100: quotas 3.5, 2.1, 1.4, so the seventh place goes to class 0.
    assert torch.bincount(labels[stratified_subset(labels, 7, seed=0)]).tolist() == [4, 2, 0, 0, 1]
    assert stratified_subset(labels, 100, seed=0).tolist() == list(range(100))
    assert stratified_subset(labels, 0, seed=0).tolist() == []
    assert not torch.equal(chosen, stratified_subset(labels, 10, seed=1))
    with pytest.raises(ValueError, match="101 out of 100"):
        stratified_subset(labels, 101, seed=0)


def test_statistics_against_numpy():
    images, _ = numbered_images(40)
    images[:, 2] = 128
    mean, std = channel_statistics(images)
    unit = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, unit.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], unit.std(axis=(0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1.0


class Made(ImageDataModule):
    """60 + 30 images in three unequal classes, all of them different."""

    name = "made"

    def load(self):
        images, _ = numbered_images(90)
        labels = torch.tensor([0, 0, 0, 1, 1, 2] * 15)
        return ImageCorpus(images[:60], labels[:60], images[60:], labels[60:], ("a", "b", "c"))


def bytes_of_each(images):
    return {image.numpy().tobytes() for image in images}


def test_splits_are_disjoint_and_complete():
    data = set_up(Made(val_fraction=0.2))
    train, val, test = (bytes_of_each(getattr(data, f"{split}_images")) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (48, 12, 30) == (data.num_train, data.num_val, data.num_test)
    assert not train & val
    assert not train & test
    assert not val & test
    everything, _ = numbered_images(90)
    assert train | val == bytes_of_each(everything[:60])
    assert test == bytes_of_each(everything[60:])
    assert torch.bincount(data.val_labels).tolist() == [6, 4, 2]
    assert torch.bincount(data.train_labels).tolist() == [24, 16, 8]
    assert (data.num_classes, data.image_shape, data.class_names) == (3, (3, 5, 7), ("a", "b", "c"))
    assert (data.mean, data.std) == channel_statistics(data.train_images)


def test_the_seed_moves_no_split():
    """Models of different seeds can be weighed on validation images that none of them has seen."""
    one, other = (set_up(Made(seed=seed, num_train=30, num_test=10)) for seed in (0, 1))
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(one, f"{split}_indices"), getattr(other, f"{split}_indices"))
    assert next(iter(one.train_dataloader()))[0].sum() != next(iter(other.train_dataloader()))[0].sum()
    assert torch.bincount(one.test_labels).tolist() == [5, 3, 2]


def test_subsets_have_the_sizes_asked_for():
    data = set_up(Made(num_train=24, val_fraction=0.25, num_test=6))
    assert (data.num_train, data.num_val, data.num_test) == (24, 8, 6)
    assert torch.bincount(data.train_labels).tolist() == [12, 8, 4]
    assert not bytes_of_each(data.train_images) & bytes_of_each(data.val_images)
    data = set_up(Made(num_val=5))
    assert (data.num_train, data.num_val) == (55, 5)
    # A subset trains on images of the full training split, never on what was held out there.
    full, part = set_up(Made(num_val=6)), set_up(Made(num_val=6, num_train=12))
    assert torch.equal(full.val_indices, part.val_indices)
    assert set(part.train_indices.tolist()) < set(full.train_indices.tolist())


def test_loaders_of_a_module():
    data = set_up(Made(batch_size=8, eval_batch_size=20, padding=1, val_fraction=0.2))
    data.batches_per_epoch = 4
    train = data.train_dataloader()
    assert len(list(train)) == 4
    assert data.train_dataloader() is train
    assert [len(y) for _, y in data.test_dataloader()] == [20, 10]
    x = torch.cat([x for x, _ in data.val_dataloader()])
    assert torch.equal((x * 255).round().byte(), data.val_images)
    # A new fit starts from the beginning, a call within one does not.
    data.setup("validate")
    assert data.train_dataloader() is train
    data.setup("fit")
    assert data.train_dataloader().state_dict()["position"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": float("nan")}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": None}, "validation needs val_fraction or num_val"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1"),
        ({"num_val": 0}, "num_val must be at least 1"),
        ({"padding": -1}, "padding must be >= 0"),
        ({"num_train": 60}, "has 60 training images, too few to train on 60 and keep 7"),
        ({"num_val": 60}, "too few to train on 1 and keep 60"),
        ({"num_test": 31}, "has 30 test images: lower num_test=31"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        set_up(Made(**settings))


def test_asking_before_setup_says_so():
    data = Made()
    for name in ("num_classes", "image_shape", "num_train", "num_val", "num_test"):
        with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
            getattr(data, name)
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        data.train_dataloader()


def test_published_labels_and_shapes_are_checked():
    def corpus(**change):
        images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        fields = {
            "train_images": images,
            "train_labels": labels,
            "test_images": images,
            "test_labels": labels,
        }
        return ImageCorpus(**{**fields, **change}, class_names=("a", "b"))

    corpus().validate("made")
    for change, message in (
        (
            {"test_labels": torch.tensor([0, 1, 2, 1])},
            r"test image 2 has label 2, but the 2 classes .* 0\.\.1",
        ),
        ({"train_labels": torch.tensor([0, 1, 0, -1])}, "train image 3 has label -1"),
        ({"train_labels": torch.tensor([0])}, "4 train images with 1 labels"),
        ({"test_images": torch.zeros(4, 1, 3, 2, dtype=torch.uint8)}, "test images are .1, 3, 2., training"),
        ({"test_images": torch.zeros(4, 1, 2, 2)}, "test images are torch.float32"),
    ):
        with pytest.raises(UserError, match=message):
            corpus(**change).validate("made")


# --- under Lightning -------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Trains nothing; remembers its batches; writes a checkpoint after each batch and each epoch."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.folder = folder
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not len(y):
            return
        self.seen.append((self.current_epoch, batch_idx, x.clone(), y.clone()))
        self.optimizers().step()

    def stream(self):
        return self.trainer.datamodule.train_dataloader()

    def save(self, closed=""):
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{self.global_step}{closed}.ckpt")

    def on_train_start(self):
        if self.stream().batches_left < self.stream().batches_per_epoch:
            self.trainer.reload_dataloaders_every_n_epochs = 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.save()

    def on_train_epoch_end(self):
        self.stream().close_epoch()
        self.save("-closed")

    def on_save_checkpoint(self, checkpoint):
        # A resumed epoch is a shorter one for the trainer: its own counters would not fit it.
        del checkpoint["loops"]
        checkpoint["epoch"] = self.stream().epoch

    def on_load_checkpoint(self, checkpoint):
        self.trainer.fit_loop.epoch_progress.current.processed = checkpoint["epoch"]

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(save_to=None, checkpoint=None):
    data = Made(batch_size=8, val_fraction=0.2, padding=1, seed=3)
    data.batches_per_epoch = 5
    module = Recorder(save_to)
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return module


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_trainer_serves_epochs_of_the_length_asked_for_and_resumes_anywhere(tmp_path):
    """48 images in batches of 8: a pass has 6 batches, an epoch 5."""
    run = record(save_to=tmp_path)
    whole = run.seen
    assert [epoch for epoch, *_ in whole] == [0] * 5 + [1] * 5 + [2] * 5
    assert run.validated == [0, 1, 2]
    # In an epoch, at the end of one before and after its validation, one before the end, and in the last one.
    cases = (("3", 0), ("5", 0), ("5-closed", 1), ("6", 1), ("9", 1), ("10", 1), ("10-closed", 2), ("12", 2), ("15", 2))
    for name, epoch in cases:
        served = int(name.split("-")[0])
        rest = record(checkpoint=tmp_path / f"{name}.ckpt")
        assert [epoch for epoch, *_ in rest.seen] == [epoch for epoch, *_ in whole[served:]]
        assert same([tuple(batch[2:]) for batch in whole[served:]], [tuple(batch[2:]) for batch in rest.seen])
        assert rest.validated == run.validated[epoch:]


# --- digits ----------------------------------------------------------------------------------------------


def test_digits_are_the_published_ones():
    from sklearn.datasets import load_digits

    data = set_up(Digits())
    published = load_digits()
    assert (data.name, data.image_shape, data.num_classes) == ("Digits (8x8)", (1, 8, 8), 10)
    assert data.num_test == 360
    assert data.num_train + data.num_val == 1437
    label_of = {
        np.rint(image / 16 * 255).astype(np.uint8).tobytes(): label
        for image, label in zip(published.images, published.target, strict=True)
    }
    splits = ("train", "val", "test")
    found = [bytes_of_each(getattr(data, f"{split}_images")) for split in splits]
    assert sum(map(len, found)) == len(set().union(*found)) == 1797
    for split in splits:
        for image, label in zip(getattr(data, f"{split}_images"), getattr(data, f"{split}_labels"), strict=True):
            assert label_of[image.numpy().tobytes()] == label
    shares = np.bincount(published.target) * 360 / 1797
    assert (np.abs(torch.bincount(data.test_labels).numpy() - shares) < 1).all()


def test_digits_of_some_classes_are_numbered_anew():
    whole, some = set_up(Digits()), set_up(Digits(classes=[7, 1, 5]))
    assert some.class_names == ("7", "1", "5")
    assert some.name == "Digits (8x8), classes 7, 1, 5"
    for number, digit in enumerate((7, 1, 5)):
        assert torch.equal(some.test_images[some.test_labels == number], whole.test_images[whole.test_labels == digit])
    kept = torch.cat([some.train_labels, some.val_labels])
    of_all = torch.cat([whole.train_labels, whole.val_labels])
    assert torch.bincount(kept).tolist() == [int((of_all == digit).sum()) for digit in (7, 1, 5)]


def test_averages_are_of_originals_of_one_class_and_split():
    """With as many as there are of a class, every average of the split is the mean of exactly its originals."""
    common = {"classes": [1, 5], "num_train": 20, "num_val": 20, "num_test": 20}
    originals, averages = set_up(Digits(**common)), set_up(Digits(**common, average=10))
    for split in ("train", "val", "test"):
        labels = getattr(originals, f"{split}_labels")
        assert torch.equal(getattr(averages, f"{split}_labels"), labels)
        assert torch.bincount(labels).tolist() == [10, 10]
        for label in (0, 1):
            mean = getattr(originals, f"{split}_images")[labels == label].double().mean(0).round()
            assert (getattr(averages, f"{split}_images")[labels == label] == mean).all()
    assert averages.mean[0] == pytest.approx((averages.train_images / 255).mean().item(), abs=1e-6)


def test_averages_are_as_many_different_images_as_originals_and_the_same_in_every_run():
    first, second = (set_up(Digits(classes=[1, 5, 7], average=4, seed=seed)) for seed in (0, 1))
    images, labels = first.train_images, first.train_labels
    assert torch.equal(images, second.train_images)
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    originals = set_up(Digits(classes=[1, 5, 7])).train_images
    for label in range(3):
        # The variance of the mean of m draws without replacement from n: s^2 (1/m - 1/n) with s^2 over n - 1.
        before, after = (part[labels == label].double().var(0).sum() for part in (originals, images))
        count = int((labels == label).sum())
        assert float(after / before) == pytest.approx(1 / 4 - 1 / count, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [3]}, "two different digits or more"),
        ({"classes": [3, 3]}, "two different digits or more"),
        ({"classes": [3, 10]}, "two different digits or more"),
        ({"average": 0}, "average=0 must be at least 1"),
        ({"classes": [1, 5], "num_test": 6, "average": 5}, "the test images hold 3 of digit 1: lower average"),
        ({"copies": 3}, "copies=3 must be 1, or more with data.average"),
        ({"copies": 0, "average": 2}, "copies=0 must be 1, or more"),
        ({"draw": -1}, "draw=-1 must be at least 0"),
    ],
)
def test_digits_that_cannot_be_averaged_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        set_up(Digits(**settings))


@pytest.mark.parametrize("draw", [0, 2])
def test_no_original_is_in_the_averages_of_two_splits(monkeypatch, draw):
    """Each published digit as an image of its own place: with it, averages of 2 tell which two they are of."""
    from sklearn import datasets

    published = datasets.load_digits()
    # The pixels are the indicators of the five digits of its number in base 5.
    places = np.arange(len(published.target))
    base_5 = [(places // 5**k % 5)[:, None] == np.arange(5) for k in range(5)]
    pixels = np.concatenate(base_5, axis=1).astype(float) * 16
    monkeypatch.setattr(
        datasets,
        "load_digits",
        lambda: type(published)(
            images=pixels.reshape(-1, 5, 5), target=published.target, target_names=published.target_names
        ),
    )
    data = set_up(Digits(classes=[1, 5, 7], average=1, draw=draw))
    averages = set_up(Digits(classes=[1, 5, 7], average=2, copies=3, draw=draw))
    splits = ("train", "val", "test")
    seen = {}
    for split in splits:
        originals, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        images, of = getattr(averages, f"{split}_images"), getattr(averages, f"{split}_labels")
        assert len(images) == 3 * len(originals)
        # Every average is of two different originals of its class and split, found by trying all pairs.
        for label in range(3):
            own = originals[labels == label].flatten(1).double()
            means = ((own[:, None] + own) / 2).round()
            pairs = {mean.numpy().tobytes() for i in range(len(own)) for mean in means[i, :i]}
            assert {image.flatten().double().numpy().tobytes() for image in images[of == label]} <= pairs
        seen[split] = {image.numpy().tobytes() for image in originals}
        indices = getattr(averages, f"{split}_indices")
        assert torch.equal(indices // 3, getattr(data, f"{split}_indices").repeat_interleave(3))
        assert len(indices.unique()) == len(indices)
        assert torch.equal(of, labels.repeat_interleave(3))
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_the_first_copies_are_the_averages_without_copies():
    one, three = (set_up(Digits(classes=[1, 5, 7], average=4, copies=copies)) for copies in (1, 3))
    assert torch.equal(three.val_images[::3], one.val_images)
    # Of few originals a class has 4 alike now and then.
    assert len(three.val_images.flatten(1).unique(dim=0)) >= 0.98 * 3 * one.num_val
    assert three.name == "Digits (8x8), classes 1, 5, 7, averages of 4, 3 for each original"


@pytest.mark.parametrize("average", [1, 4])
def test_a_draw_has_other_images_in_each_split(average):
    """As many of each class, but the share in the same split is that of chance: 360 of 1,797 for the test images."""
    draws = [set_up(Digits(average=average, draw=draw)) for draw in (0, 1, 2)]
    assert [data.name.endswith(", draw 2") for data in draws] == [False, False, True]
    for split, most in (("test", 0.3), ("val", 0.2)):
        images = [set(bytes_of_each(getattr(data, f"{split}_images"))) for data in draws]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert len(images[one] & images[other]) <= most * len(images[one])
        counts = [torch.bincount(getattr(data, f"{split}_labels")).tolist() for data in draws]
        assert counts[0] == pytest.approx(counts[1], abs=1)


# --- the triangle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0, 1, 104])
def test_any_two_points_of_different_classes_conflict_and_no_three(draw):
    """So the best classifier has 1/3 and the best mixture 1/2, on the points of every split together."""
    data = set_up(Triangle(draw=draw))
    assert data.image_shape == (1, 1, 2)
    assert (data.num_train, data.num_val, data.num_test) == (1200, 180, 180)
    splits = ("train", "val", "test")
    for split in splits:
        assert len(set(torch.bincount(getattr(data, f"{split}_labels")).tolist())) == 1
    points = torch.cat([getattr(data, f"{split}_images") for split in splits]).flatten(1).double().numpy() / 255
    labels = torch.cat([getattr(data, f"{split}_labels") for split in splits]).numpy()
    classes = [points[labels == label] for label in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(classes[one][:, None] - classes[other], axis=-1).max() <= 2 * 0.262
    # A common point of three balls would be at most eps + r from all three corners, but every point is at least
    # d / sqrt(3) from one of them.
    side = [np.linalg.norm(classes[k].mean(0) - classes[k - 1].mean(0)) for k in range(3)]
    assert side == pytest.approx([0.5] * 3, abs=0.002)
    spread = max(np.linalg.norm(own - own.mean(0), axis=1).max() for own in classes)
    assert spread < 0.0125
    assert min(side) / np.sqrt(3) - spread - 0.002 > 0.262


def test_the_optima_on_the_triangle_are_a_third_and_a_half():
    data = set_up(Triangle(num_test=30))
    found = conflicts(data.test_images, data.test_labels, 0.262, "l2")
    solved = ceiling(found)
    assert len(found.pairs) == 3 * 10 * 10
    assert solved.randomised == pytest.approx(1 / 2)
    assert solved.deterministic == solved.deterministic_upper == pytest.approx(1 / 3)


def test_points_of_the_triangle_are_gaussian_around_the_corners():
    data = set_up(Triangle(num_train=3000))
    corners = np.array([[0.25, 0.5 - 3**0.5 / 8], [0.75, 0.5 - 3**0.5 / 8], [0.5, 0.5 + 3**0.5 / 8]])
    for label in range(3):
        own = data.train_images[data.train_labels == label].flatten(1).double().numpy() / 255
        assert own.mean(0) == pytest.approx(corners[label], abs=0.0005)
        # Rounding to a grid of h adds a variance of h^2 / 12.
        assert own.std(0) == pytest.approx([(0.004**2 + (1 / 255) ** 2 / 12) ** 0.5] * 2, rel=0.08)
        assert abs(np.corrcoef(own.T)[0, 1]) < 0.1


def test_a_draw_of_the_triangle_has_points_of_its_own_that_no_seed_changes():
    first, second, other = set_up(Triangle(seed=0)), set_up(Triangle(seed=1)), set_up(Triangle(draw=1))
    assert torch.equal(first.test_images, second.test_images)
    assert (first.test_images != other.test_images).any(-1).float().mean() > 0.8
    assert (first.test_images != first.train_images[:180]).any(-1).float().mean() > 0.8
    assert other.name == "Triangle (plane), draw 1"
    with pytest.raises(ValueError, match="draw=-1 must be at least 0"):
        Triangle(draw=-1)


def test_digits_test_images_never_move():
    one, two = set_up(Digits(seed=0)), set_up(Digits(seed=1))
    assert torch.equal(one.test_images, two.test_images)
    assert bytes_of_each(one.val_images) == bytes_of_each(two.val_images)
    # Written down: a change here moves images that earlier runs trained on into the test set.
    digest = hashlib.sha256(one.test_images.numpy().tobytes()).hexdigest()
    assert digest == "2b22a8be8ef98ec1181b77fa31966467500991e8c8546946ee3df1e36f3af6ef"
    assert one.test_labels[:12].tolist() == [7, 2, 3, 7, 7, 0, 3, 6, 5, 2, 1, 1]


# --- the configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "image_folder", "digits", "triangle"])
def test_the_configuration_has_every_argument_with_its_default(name, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    config = OmegaConf.load(CONF / f"{name}.yaml")
    config = OmegaConf.create({"seed": 17, "data": config})
    if name == "image_folder":
        assert OmegaConf.is_missing(config.data, "root")
        config.data.root = "pictures"
    settings = OmegaConf.to_container(config.data, resolve=True)
    target = get_class(settings.pop("_target_"))
    assert settings.pop("seed") == 17
    parameters = dict(inspect.signature(target).parameters)
    if "common" in parameters:
        parameters = {**inspect.signature(ImageDataModule).parameters, **parameters}
    defaults = {key: p.default for key, p in parameters.items() if key not in ("seed", "common")}
    if name == "image_folder":
        assert settings.pop("root") == "pictures"
        del defaults["root"]
    assert {**settings, "mirrors": ()} == {**defaults, "mirrors": ()}
    assert instantiate(config.data).seed == 17
    with pytest.raises(InstantiationException, match="num_trian"):
        instantiate(config.data, num_trian=3)


def test_the_data_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    config = OmegaConf.create({"seed": 0, "data": OmegaConf.load(CONF / "cifar10.yaml")})
    assert instantiate(config.data, mirrors=["https://example.org/a"]).mirrors == ("https://example.org/a",)
    assert instantiate(config.data).root == tmp_path


# --- the package -----------------------------------------------------------------------------------------


def test_the_stream_alone_does_not_import_lightning():
    code = (
        "import sys, mixadv.data, mixadv.data.stream; "
        "print([m for m in ('pytorch_lightning', 'torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
