"""Data sets over a bad line, from damaged files, from folders of images with faults."""

import gzip
import hashlib
import pickle
import shutil
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TEST_IMAGES, TRAIN_IMAGES, Malice, file_size_limit, noise
from PIL import Image
from scipy.io import savemat
from torchvision import transforms
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST, ImageFolder
from torchvision.transforms import functional as tv

from cifar_resnet import datasets
from cifar_resnet.datasets import (
    DATASETS,
    Digits,
    ImageFolderDataset,
    ImageSource,
    find_dataset,
)
from cifar_resnet.images import read_square
from cifar_resnet.messages import UserError

ARCHIVE, FOLDER = CIFAR10.filename, CIFAR10.base_folder
LABELS = "train-labels-idx1-ubyte.gz"


class Server(ThreadingHTTPServer):
    """A web server on this machine that serves `content`, with a fault."""

    def __init__(
        self, content: bytes, cut_off: int | None = None, status: int = 200, hangs: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.cut_off, self.status, self.requests = content, cut_off, status, 0
        self.reached, self.answers = threading.Event(), threading.Event()
        if not hangs:
            self.answers.set()
        self.url = f"http://127.0.0.1:{self.server_port}/{ARCHIVE}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *args: object) -> None:
        self.answers.set()
        self.shutdown()
        super().__exit__(*args)


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.reached.set()
        self.server.answers.wait(10)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut_off])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def whole(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the batches and the archive of a small CIFAR-10; its only address is dead."""
    with tarfile.open(cifar10 / ARCHIVE, "w:gz") as file:
        file.add(cifar10 / FOLDER, FOLDER)
    md5 = hashlib.md5((cifar10 / ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    return cifar10


@pytest.fixture
def archive(whole: Path) -> bytes:
    return (whole / ARCHIVE).read_bytes()


@pytest.fixture
def cifar(whole: Path) -> ImageSource:
    return DATASETS["cifar10"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "root"


def error_of(data: ImageSource, root: Path, *urls: str) -> str:
    """The message of a failing `prepare`: one line that names the file and the ways out."""
    with pytest.raises(UserError) as error:
        data.prepare(root, urls)
    text = str(error.value)
    assert text.startswith(f"{root / ARCHIVE} is missing or damaged, and not available (")
    for way_out in ("put it there", "--data.urls", "--config recipes/digits.yaml"):
        assert way_out in text
    return text


def check_whole(cifar: ImageSource, root: Path) -> None:
    """All images are there, and no file but the archive's, the archive and the lock."""
    counts = [len(cifar.load(root, train=train).images) for train in (True, False)]
    assert counts == [TRAIN_IMAGES, TEST_IMAGES]
    assert {path.name for path in root.iterdir()} == {ARCHIVE, FOLDER, f"{ARCHIVE}.lock"}


def test_cifar_images_are_torchvisions(cifar: ImageSource, whole: Path) -> None:
    images, labels, names = cifar.load(whole, train=True)
    reference = CIFAR10(whole, train=True)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for image, label, (expected, number) in zip(images, labels, reference, strict=True):
        assert torch.equal(image, transforms.functional.pil_to_tensor(expected))
        assert label == number
    assert names == [f"class {i}" for i in range(10)]


FAULTS = {
    "404 Client Error": {"status": 404},
    "MD5 hash of": {"content": b"?" * 500_000},
    "IncompleteRead(3000 bytes read": {"cut_off": 3000},
    "timed out": {"hangs": True},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_next_mirror_is_tried(
    cifar: ImageSource, archive: bytes, root: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "timed out":
        monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 1.0)
    with Server(**{"content": archive, **FAULTS[reason]}) as bad, Server(archive) as good:
        text = error_of(cifar, root, bad.url)
        assert f"({bad.url}: {reason}" in text
        assert f"{CIFAR10.url}: Connection refused)" in text
        assert [path.name for path in root.iterdir()] == [f"{ARCHIVE}.lock"]
        cifar.prepare(root, [CIFAR10.url, bad.url, good.url])
        assert (bad.requests, good.requests) == (2, 1)
    check_whole(cifar, root)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("cifar10", ARCHIVE),
        ("svhn", "train_32x32.mat or test_32x32.mat"),
        ("digits", "none, as this data set is not downloaded"),
    ],
)
def test_address_of_another_file_is_refused(root: Path, name: str, needed: str) -> None:
    with pytest.raises(UserError, match=f"'http://my.mirror/a': the data set needs {needed}"):
        DATASETS[name].prepare(root, ["http://my.mirror/a"])


def test_users_mirror_comes_first_and_the_official_host_last(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str | None, list[str]]] = []
    monkeypatch.setattr(datasets, "download", lambda *args: asked.append(args))
    monkeypatch.setattr(shutil, "unpack_archive", lambda *args, **options: None)
    mine = [f"http://my.mirror/{name}" for name in (ARCHIVE, "test_32x32.mat", LABELS)]
    DATASETS["cifar10"].prepare(root, mine[:1])
    DATASETS["svhn"].prepare(root, mine[1:2])
    DATASETS["fashion_mnist"].prepare(root, mine[2:])
    (cifar10, md5, urls), *rest = asked
    assert (cifar10, md5) == (root / ARCHIVE, CIFAR10.tgz_md5)
    assert (urls[0], urls[-1]) == (mine[0], CIFAR10.url)
    assert "zenodo.org" in urls[1]
    hosts = [SVHN.split_list[split][0] for split in ("train", "test")]
    assert [urls for _, _, urls in rest[:2]] == [hosts[:1], [mine[1], hosts[1]]]
    assert rest[3][2] == [mine[2], FashionMNIST.mirrors[0] + LABELS]
    known = {name: md5 for _, name, md5 in SVHN.split_list.values()}
    known |= dict(FashionMNIST.resources)
    assert all(known[file.name] == md5 for file, md5, _ in rest)


def test_complete_root_is_not_written(cifar: ImageSource, whole: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (whole, *whole.rglob("*"))}

    (whole / ARCHIVE).unlink()
    before = state()
    cifar.prepare(whole, [f"http://127.0.0.1:9/{ARCHIVE}"])
    assert len(cifar.load(whole, train=True).images) == TRAIN_IMAGES
    assert state() == before  # a file that came and went would change its folder's time


BATCHES = [CIFAR10.train_list[2][0], CIFAR10.test_list[0][0], CIFAR10.meta["filename"]]


@pytest.mark.parametrize("name", BATCHES)
def test_unverified_pickles_never_run(
    cifar: ImageSource, whole: Path, tmp_path: Path, name: str
) -> None:
    malice = Malice(tmp_path / "it ran")
    path = whole / FOLDER / name
    path.write_bytes(pickle.dumps(malice))
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        cifar.load(whole, train=name != "test_batch")
    cifar.prepare(whole, [])  # from the archive
    check_whole(cifar, whole)
    (whole / ARCHIVE).unlink()
    path.unlink()
    error_of(cifar, whole)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(malice))
    assert (tmp_path / "it ran").exists()


def test_full_disk_asks_no_other_mirror(cifar: ImageSource, archive: bytes, root: Path) -> None:
    with Server(archive) as first, Server(archive) as second:
        with file_size_limit(50_000), pytest.raises(OSError, match="File too large"):
            cifar.prepare(root, [first.url, second.url])
        assert (first.requests, second.requests) == (1, 0)
        cifar.prepare(root, [second.url])
    shutil.rmtree(root / FOLDER)
    # Smaller than a batch.
    with file_size_limit(50_000), pytest.raises(OSError, match="File too large"):
        cifar.prepare(root, [])
    cifar.prepare(root, [])
    check_whole(cifar, root)


def test_one_replaces_a_damaged_archive_and_lock_wait_is_reported(
    cifar: ImageSource, archive: bytes, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root.mkdir()
    (root / ARCHIVE).write_bytes(archive[:-1])
    unpack = mock.patch.object(shutil, "unpack_archive", wraps=shutil.unpack_archive)
    with Server(archive, hangs=True) as server, unpack as unpacked:
        both = [threading.Thread(target=cifar.prepare, args=(root, [server.url])) for _ in "12"]
        both[0].start()
        assert server.reached.wait(10)
        both[1].start()
        errors, deadline = "", time.monotonic() + 10
        while not errors.endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
            errors += capsys.readouterr().err
        server.answers.set()
        for thread in both:
            thread.join(10)
    assert errors == f"Waiting for another process, which holds {root / ARCHIVE}.lock\n"
    assert (server.requests, unpacked.call_count) == (1, 1)
    check_whole(cifar, root)


def test_svhn_is_read_as_torchvision_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files in its own format: images (32, 32, 3, N), and 10 for the digit 0."""
    digits, pixels = np.array([[1], [10], [9]], np.uint8), noise(32, 32, 9).reshape(32, 32, 3, 3)
    files = {}
    for split, (url, name, _) in SVHN.split_list.items():
        savemat(tmp_path / name, {"X": pixels, "y": digits})
        files[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    source = DATASETS["svhn"]
    source.prepare(tmp_path, [])
    images, labels, names = source.load(tmp_path, train=False)
    assert torch.equal(images, torch.from_numpy(pixels).permute(3, 2, 0, 1))
    assert [names[label] for label in labels] == ["1", "0", "9"]
    assert [label for _, label in SVHN(tmp_path, "test")] == labels.tolist()
    (tmp_path / "train_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="corrupted"):
        source.load(tmp_path, train=True)


def test_fashion_mnist_is_padded_to_32_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files in its own format: IDX, compressed."""
    folder, resources = tmp_path / "FashionMNIST/raw", []
    folder.mkdir(parents=True)
    grey, labels = noise(28, 28, 3).transpose(2, 0, 1), np.array([7, 0, 9], np.uint8)
    for name, _ in FashionMNIST.resources:
        values = grey if "images" in name else labels
        header = [0x800 + values.ndim, *values.shape]
        content = np.array(header, ">i4").tobytes() + values.tobytes()
        (folder / name).write_bytes(gzip.compress(content))
        (folder / name).with_suffix("").write_bytes(content)  # for torchvision
        resources.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    source = DATASETS["fashion_mnist"]
    source.prepare(tmp_path, [])
    images, found, names = source.load(tmp_path, train=True)
    reference = FashionMNIST(tmp_path, train=True)
    padded = [tv.pil_to_tensor(tv.pad(image.convert("RGB"), [2])) for image, _ in reference]
    assert torch.equal(images, torch.stack(padded))
    assert found.tolist() == [label for _, label in reference] == [7, 0, 9]
    assert names == FashionMNIST.classes


def test_digits_are_split_without_repetition() -> None:
    from sklearn.datasets import load_digits

    train, test = (Digits().load(Path(), train=train) for train in (True, False))
    assert (len(train.images), len(test.images)) == (1437, 360)
    assert torch.cat([train.images, test.images]).shape[1:] == (3, 32, 32)
    assert test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]  # in every run

    reference = load_digits()
    grey = [Image.fromarray((i * 255 / 16).round().astype(np.uint8)) for i in reference.images]
    enlarged = [image.resize((32, 32), Image.Resampling.BILINEAR).tobytes() for image in grey]
    shown = [image.numpy().tobytes() for part in (train, test) for image in part.images[:, 1]]
    labels = torch.cat([train.labels, test.labels]).tolist()
    assert sorted(zip(shown, labels, strict=True)) == sorted(
        zip(enlarged, reference.target, strict=True)
    )


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / ".data/pets"  # only what lies below the folder matters
    for part in PARTS:
        for name in ("cat/0.png", "cat/sub/1.JPG", "cat/b.webp", "cat/sub-a/2.png", "dog/3.bmp"):
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(30 + len(name) + len(part), 34)).save(path)
    return folder


PARTS = ["train", "test", "val"]
NO_IMAGES = ["0.png", "Thumbs.db", "cat/notes.txt", ".cache/0.png", "cat/.cache/0.png"]


@pytest.mark.parametrize("part", PARTS)
def test_folder_is_read_in_order_of_image_folder(pets: Path, part: str) -> None:
    """Without what is no image, whose name begins with a dot, or lies outside a class."""
    expected = ImageFolder(pets / part).samples
    for name in (*NO_IMAGES, "cat/sub/.cache/a/0.png", "dog/._3.bmp"):
        (pets / part / name).parent.mkdir(exist_ok=True, parents=True)
        (pets / part / name).write_bytes(b"no image")
    data = find_dataset(str(pets), image_size=24)
    data.prepare(Path("unused"), [])
    assert data.num_classes == 2
    found = data.load_val(Path()) if part == "val" else data.load(Path(), train=part == "train")
    assert found is not None
    assert found.class_names == ["cat", "dog"]
    assert found.labels.tolist() == [label for _, label in expected] == [0, 0, 0, 0, 1]
    assert torch.equal(found.images, torch.stack([read_square(path, 24) for path, _ in expected]))
    shutil.rmtree(pets / "val")
    assert data.load_val(Path()) is None


@pytest.mark.parametrize("part", ["test", "val"])
def test_class_that_a_part_lacks_is_found_before_training(pets: Path, part: str) -> None:
    data = ImageFolderDataset(pets, 32)
    for path in (pets / part / "dog").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"^Found no valid file for the classes dog\. "):
        data.prepare(Path(), [])
    (pets / part / "dog").rmdir()
    message = f"the same classes in train/ and {part}/, but only one of them has dog"
    with pytest.raises(UserError, match=message):
        data.prepare(Path(), [])


def test_single_class_is_refused(pets: Path) -> None:
    for part in PARTS:
        shutil.rmtree(pets / part / "dog")
    with pytest.raises(UserError, match=r"pets has the classes \['cat'\]: a class"):
        ImageFolderDataset(pets, 32).prepare(Path(), [])
