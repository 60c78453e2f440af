"""CIFAR-10's reader on small archives in the official format, with sums of their own."""

import hashlib
import io
import os
import pickle
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from builders.cifar10_archive import BASE, NAMES, PER_BATCH, Archive, small_archive
from builders.data import set_up
from builders.files import Bomb
from mixadv.data import cifar10
from mixadv.data.cifar10 import CIFAR10
from mixadv.errors import UserError

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-lossless-6k.npz"


@pytest.fixture(scope="module")
def official():
    return small_archive()


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("no_proxy", "*")


def assert_complete(data, official):
    assert (data.num_train, data.num_val, data.num_test) == (270, 30, 60)
    assert data.name == "CIFAR-10"
    assert data.class_names == tuple(NAMES)
    assert data.image_shape == (3, 32, 32)
    np.testing.assert_array_equal(data.test_images.numpy(), official.test_images)
    np.testing.assert_array_equal(data.test_labels.numpy(), official.test_labels)
    for split in ("train", "val"):
        rows = getattr(data, f"{split}_indices").numpy()
        np.testing.assert_array_equal(getattr(data, f"{split}_images").numpy(), official.train_images[rows])
        np.testing.assert_array_equal(getattr(data, f"{split}_labels").numpy(), official.train_labels[rows])
    everything = torch.cat([data.train_indices, data.val_indices]).sort().values
    assert everything.tolist() == list(range(300))


# --- where the data may lie ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "folder with archive",
        "archive",
        "renamed archive",
        "folder with batches",
        "batches",
        "renamed batches",
    ],
)
def test_every_form_of_root_is_accepted(official, tmp_path, place):
    home = tmp_path / "data"
    home.mkdir()
    archive = home / ("c10.tgz" if place == "renamed archive" else "cifar-10-python.tar.gz")
    batches = home / ("unpacked" if place == "renamed batches" else BASE)
    if "archive" in place:
        archive.write_bytes(official.archive)
    else:
        official.unpack(batches)
    root = {"archive": archive, "renamed archive": archive, "batches": batches, "renamed batches": batches}
    assert_complete(set_up(official.module(root.get(place, home), download=False)), official)
    # Unpacked once, beside the archive, and nothing else is left behind.
    if "archive" in place:
        assert sorted(p.name for p in home.iterdir()) == sorted([BASE, archive.name])
        assert sorted(p.name for p in (home / BASE).iterdir()) == sorted(official.files)
        archive.unlink()
        assert_complete(set_up(official.module(home, download=False)), official)


def test_half_unpacked_folder_is_completed_from_the_archive(official, tmp_path):
    official.unpack(tmp_path / BASE)
    (tmp_path / BASE / "test_batch").unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(official.archive)
    assert_complete(set_up(official.module(tmp_path, download=False)), official)


def test_archive_in_a_folder_that_cannot_be_written_is_unpacked_into_the_user_cache(official, tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    (home / "cifar-10-python.tar.gz").write_bytes(official.archive)
    # A file in the place of the folder stands for a read-only disk, which a test run by root cannot make.
    (home / BASE).write_bytes(b"in the way")
    assert_complete(set_up(official.module(home, download=False)), official)
    assert list((tmp_path / "user-cache" / "mixadv").glob(f"cifar10-*/{BASE}/data_batch_1"))


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"needs {SAMPLE.name} beside the repository")
def test_real_pixels_come_through_unchanged(tmp_path):
    with np.load(SAMPLE) as sample:
        rows = np.concatenate([np.arange(1000 * batch, 1000 * batch + PER_BATCH) for batch in range(5)])
        official = Archive(
            sample["train_images"][rows],
            sample["train_labels"][rows],
            sample["test_images"][:PER_BATCH],
            sample["test_labels"][:PER_BATCH],
        )
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(official.archive)
    data = set_up(official.module(tmp_path, download=False))
    assert_complete(data, official)
    assert data.class_names[int(data.test_labels[0])] == "cat"
    held_out = {image.numpy().tobytes() for image in data.test_images}
    assert not held_out & {image.numpy().tobytes() for image in (*data.train_images, *data.val_images)}


def test_the_published_sums_are_the_default():
    reader = CIFAR10.reader()
    assert reader is torchvision.datasets.CIFAR10
    assert reader.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert reader.filename == "cifar-10-python.tar.gz"


# --- what is refused -------------------------------------------------------------------------------------


def assert_remedy(message, official_module, home):
    for part in (
        "cifar-10-python.tar.gz",
        official_module.reader().tgz_md5,
        str(home),
        "data.root=",
        "DATA_DIR=",
        "data.mirrors=",
        "make quickstart",
        "data=digits",
        "data=image_folder",
    ):
        assert part in message, part


@pytest.mark.parametrize("damage", ["truncated", "html", "empty"])
def test_a_damaged_archive_is_refused_with_both_sums(official, tmp_path, damage):
    page = b"  <!DOCTYPE html><html>404</html>"
    content = {"truncated": official.archive[:5000], "html": page, "empty": b""}[damage]
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    data = official.module(tmp_path)
    with pytest.raises(UserError) as raised:
        data.prepare_data()
    message = str(raised.value)
    assert f"md5 {hashlib.md5(content).hexdigest()} instead of {hashlib.md5(official.archive).hexdigest()}" in message
    assert ("web page" in message) == (damage == "html")
    assert_remedy(message, data, tmp_path)
    assert not (tmp_path / BASE).exists()


def test_an_archive_that_is_whole_but_lacks_a_file_is_refused(official, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo(f"{BASE}/data_batch_1"))
    for content, reason in ((buffer.getvalue(), "data_batch_2"), (official.archive[:5000], "")):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        data = official.module(tmp_path, archive=content)
        with pytest.raises(UserError, match=rf"cannot unpack .*{reason}"):
            data.prepare_data()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("prepared", [True, False])
def test_no_file_is_unpickled_before_its_sum_was_checked(official, tmp_path, name, prepared):
    folder = official.unpack(tmp_path / BASE)
    trace = tmp_path / "trace"
    data = official.module(tmp_path, download=False)
    if prepared:
        # Exchanged between the check and the reading: the reader itself has to notice.
        data.prepare_data()
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match=r"cannot read it" if prepared else r"has md5 .* instead of .*not read"):
        data.setup()
    if not prepared:
        with pytest.raises(UserError, match=f"{name} has md5 .* instead of .*Delete the folder"):
            data.prepare_data()
    assert not trace.exists()


def test_labels_out_of_range_are_refused(tmp_path):
    good = small_archive()
    labels = good.test_labels.copy()
    labels[17] = 10
    bad = Archive(good.train_images, good.train_labels, good.test_images, labels)
    bad.unpack(tmp_path / BASE)
    with pytest.raises(UserError, match="CIFAR-10: test image 17 has label 10"):
        set_up(bad.module(tmp_path))


def test_nothing_there_and_download_off(official, tmp_path):
    data = official.module(tmp_path / "missing", download=False)
    with pytest.raises(UserError, match=r"data\.download is off") as raised:
        data.prepare_data()
    assert_remedy(str(raised.value), data, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(UserError, match="CIFAR-10 is not in"):
        data.setup()


def test_a_missing_archive_file_is_not_taken_for_a_folder(official, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*c10\.tar\.gz"):
        official.module(tmp_path / "c10.tar.gz").prepare_data()


def test_paths_that_cannot_be_read_are_refused(official, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("x")
    for root in (loop, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot use"):
            official.module(root).prepare_data()
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        official.module("")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_refused(official, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        with pytest.raises(UserError, match=r"cannot use .*Permission denied"):
            official.module(closed).prepare_data()
    finally:
        closed.chmod(0o700)


# --- download --------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A web server on this machine: `pages` maps paths to (content, announced length)."""
    pages, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in pages:
                self.send_error(404)
                return
            content, length = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    httpd.pages, httpd.asked = pages, asked
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_the_mirrors_are_tried_in_order_after_the_home(official, tmp_path, server):
    archive, page = official.archive, b"<html>gone</html>"
    server.pages.update(
        {
            "/html": (page, len(page)),
            "/short": (archive[:1000], len(archive)),
            "/good": (archive, len(archive)),
            "/never": (b"", 0),
        }
    )
    mirrors = [f"{server.url}/{name}" for name in ("html", "short", "good", "never")]
    home = tmp_path / "new" / "data"
    data = official.module(home, url=f"{server.url}/home", mirrors=mirrors)
    assert_complete(set_up(data), official)
    assert server.asked == ["/home", "/html", "/short", "/good"]
    assert sorted(p.name for p in home.iterdir()) == [BASE, "cifar-10-python.tar.gz"]
    # The next run asks nobody.
    assert_complete(set_up(official.module(home, url=f"{server.url}/home")), official)
    assert len(server.asked) == 4


def test_when_every_address_fails_one_message_says_why_and_what_to_do(official, tmp_path, server):
    page = b"<html>gone</html>"
    server.pages.update({"/html": (page, len(page)), "/short": (b"x" * 10, 500)})
    mirrors = [f"{server.url}/html", f"{server.url}/short", "not an address"]
    data = official.module(tmp_path / "data", url=f"{server.url}/home", mirrors=mirrors)
    with pytest.raises(UserError) as raised:
        data.prepare_data()
    message = str(raised.value)
    md5 = hashlib.md5(official.archive).hexdigest()
    assert f"{server.url}/home: 404" in message
    assert f"{server.url}/html: the file there does not have md5 {md5}" in message
    assert f"{server.url}/short: IncompleteRead(10 bytes read, 490 more expected" in message
    assert "not an address: Host 'not an address' contains invalid character" in message
    assert_remedy(message, data, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_refused_connection_fails_at_once(official, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = official.module(tmp_path, url=f"http://127.0.0.1:{port}/a", mirrors=f"http://127.0.0.1:{port}/b")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"(?s)/a: .*refused.*/b: .*refused"):
        data.prepare_data()
    assert time.monotonic() - start < 3


def test_silence_is_given_up(official, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        data = official.module(tmp_path, url=f"{url}/a", mirrors=[f"{url}/b", f"{url}/c"])
        start = time.monotonic()
        with pytest.raises(UserError, match=r"(?s)/a: no answer within 0.2 s.*/b: .*/c: ") as raised:
            data.prepare_data()
        assert time.monotonic() - start < 3
    assert_remedy(str(raised.value), data, tmp_path)
