"""Data over a bad line, damaged files, and folders of images with faults: one sentence for each."""

import contextlib
import io
import pickle
import resource
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROCESSES, TINY, Run, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder

import cifar_datamodule
from cifar_datamodule import CIFARDataModule
from images import read_square, sorted_files

ARCHIVE, FOLDER = CIFAR10.filename, CIFAR10.base_folder


class Line(ThreadingHTTPServer):
    """A web server on this machine that serves an archive over a line with faults."""

    def __init__(
        self,
        content: bytes,
        drop: int | None = None,
        ranges: bool = True,
        status: int = 200,
        kind: str = "application/gzip",
        delay: float = 0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.drop, self.ranges = content, drop, ranges
        self.status, self.kind, self.delay = status, kind, delay
        self.asked: list[str | None] = []  # the range of each request
        self.reached = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/{ARCHIVE}"


class Answer(BaseHTTPRequestHandler):
    server: Line

    def do_GET(self) -> None:
        line, asked = self.server, self.headers["Range"]
        line.asked.append(asked)
        line.reached.set()
        time.sleep(line.delay)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and line.ranges else 0
        body = line.content[start:]
        self.send_response(416 if not body else 206 if start else line.status)
        if start and body:
            self.send_header("Content-Range", f"bytes {start}-{len(body)}/{len(line.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", line.kind)
        self.end_headers()
        self.wfile.write(body[: line.drop])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(content: bytes, **faults: Any) -> Iterator[Line]:
    with Line(content, **faults) as line:
        threading.Thread(target=line.serve_forever, args=(0.01,), daemon=True).start()
        yield line
        line.shutdown()


@pytest.fixture
def archive(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The archive of a small CIFAR-10, which is nowhere but here."""
    path = pack(cifar10, CIFAR10, monkeypatch)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def prepare(root: Path, *urls: str) -> None:
    CIFARDataModule(str(root), val_size=50, urls=list(urls)).prepare_data()


def error_of(root: Path, *urls: str) -> str:
    """The one sentence in which it ends, which has the folder and the way out."""
    with pytest.raises(OSError, match="CIFAR10") as error:
        prepare(root, *urls)
    text = str(error.value)
    assert error.value.errno is None
    assert "\n" not in text
    assert str(root) in text
    assert "--data." in text
    return text


def load(root: Path) -> None:
    CIFARDataModule(str(root), val_size=50).setup("fit")


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {f"{ARCHIVE}.lock"}


def test_what_was_cut_off_goes_on_where_it_ended(archive: bytes, root: Path) -> None:
    step = len(archive) // 3 + 1
    with serve(archive, drop=step) as line:
        prepare(root, line.url)
    assert line.asked == [None, f"bytes={step}-", f"bytes={2 * step}-"]
    assert names_in(root) == {ARCHIVE, FOLDER}
    load(root)


def test_without_ranges_a_download_begins_anew(archive: bytes, root: Path) -> None:
    with serve(archive, drop=3000, ranges=False) as line:
        text = error_of(root, line.url)
    assert f"{line.url}: cut off after 3,000 of {len(archive):,} bytes" in text
    assert line.asked == [None, "bytes=3000-"]  # the second brought nothing new
    assert names_in(root) == {f"{ARCHIVE}.part"}
    with serve(archive, ranges=False) as line:
        prepare(root, line.url)
    load(root)


def test_tries_are_bounded(archive: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("download.TRIES", 4)
    with serve(archive, drop=10) as line:
        assert "cut off 4 times" in error_of(root, line.url)
    assert len(line.asked) == 4


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", ["start", "whole", "wrong start", "wrong and longer"])
def test_what_a_killed_download_left_is_used_or_replaced(
    archive: bytes, root: Path, kind: str, ranges: bool
) -> None:
    left, requests = {
        "start": (archive[:5000], 1),
        "whole": (archive, 0),
        "wrong start": (b"?" * 5000, 2 if ranges else 1),
        "wrong and longer": (b"?" * (len(archive) + 1), 2 if ranges else 1),
    }[kind]
    root.mkdir()
    (root / f"{ARCHIVE}.part").write_bytes(left)
    with serve(archive, ranges=ranges) as line:
        prepare(root, line.url)
    assert len(line.asked) == requests
    assert names_in(root) == {ARCHIVE, FOLDER}
    load(root)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 404}, "404 Not Found"),
        ({"content": b"\n<html>Log in", "kind": "text/html"}, "a web page came instead"),
        ({"content": b"<!doctype html>", "kind": "application/gzip"}, "a web page came instead"),
        ({"content": b"?" * 5000}, "another file came: its checksum is wrong"),
        ({"content": b""}, "416 Requested Range Not Satisfiable"),
    ],
)
def test_what_is_no_archive_is_named_and_the_next_mirror_tried(
    archive: bytes, root: Path, fault: dict[str, Any], message: str
) -> None:
    with serve(**{"content": archive, **fault}) as bad, serve(archive) as good:
        assert f"{bad.url}: {message}" in error_of(root, bad.url)
        assert names_in(root) == set()
        prepare(root, bad.url, good.url)
    assert (len(bad.asked), len(good.asked)) == (2, 1)
    load(root)


def test_without_a_network(archive: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(archive) as line:
        pass  # and closed again
    text = error_of(root, line.url)
    assert f"{line.url}: Connection refused; {CIFAR10.url}: No such file or directory" in text
    for way_out in (ARCHIVE, f"{FOLDER}/", "--data.urls", "recipes/digits.yaml"):
        assert way_out in text

    def unknown(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "http://far.away/a: Name or service not known" in error_of(root, "http://far.away/a")


def test_a_line_that_hangs_is_given_up(
    archive: bytes, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("download.DOWNLOAD_TIMEOUT", 0.1)
    with serve(archive, delay=0.3) as line:
        assert f"{line.url}: timed out" in error_of(root, line.url)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"?" * 5000, "has only 5,000 of"), (None, "is damaged")],
)
def test_a_damaged_archive_is_kept_until_a_whole_one_has_come(
    archive: bytes, root: Path, content: bytes | None, message: str
) -> None:
    content = archive[:-1] + b"?" if content is None else content
    root.mkdir()
    (root / ARCHIVE).write_bytes(content)
    with serve(archive, drop=3000, ranges=False) as line:
        assert f"{ARCHIVE} {message}" in error_of(root, line.url)
    assert (root / ARCHIVE).read_bytes() == content
    with serve(archive) as line:
        prepare(root, line.url)
    assert (root / ARCHIVE).read_bytes() == archive
    load(root)


BATCHES = [CIFAR10.train_list[2][0], CIFAR10.test_list[0][0], CIFAR10.meta["filename"]]


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_bad_are_named_and_never_run(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it ran",)

    path = cifar10 / FOLDER / name
    whole = path.read_bytes()
    path.write_bytes(pickle.dumps(Malice()))
    assert f"({FOLDER}/{name} is damaged: its checksum is wrong)" in error_of(cifar10)
    with pytest.raises(MisconfigurationException, match=f"{name} is damaged: its checksum"):
        load(cifar10)
    path.unlink()
    assert f"({FOLDER}/{name} is missing)" in error_of(cifar10)
    with pytest.raises(MisconfigurationException, match=f"{name} is missing"):
        load(cifar10)
    path.write_bytes(whole)
    shutil.copytree(cifar10 / FOLDER, tmp_path / FOLDER)
    pack(cifar10, CIFAR10, monkeypatch)
    shutil.move(tmp_path / FOLDER, cifar10)
    path.write_bytes(pickle.dumps(Malice()))
    prepare(cifar10)  # the archive beside it is whole
    load(cifar10)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(Malice()))
    assert (tmp_path / "it ran").exists()  # had it been read


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does: a write fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_it_at_once(archive: bytes, root: Path) -> None:
    with serve(archive) as first, serve(archive) as second:
        with files_no_larger_than(200_000):
            text = error_of(root, first.url, second.url)
        assert "there is no space for CIFAR10" in text
        assert (len(first.asked), len(second.asked)) == (1, 0)
        assert names_in(root) == set()
        prepare(root, first.url)
    shutil.rmtree(root / FOLDER)
    with files_no_larger_than(100_000):  # the archive is there, its batches are larger
        assert "there is no space for CIFAR10" in error_of(root)
    assert not list((root / FOLDER).glob("*batch_*"))
    prepare(root)
    load(root)


def test_where_all_is_whole_nothing_is_written(cifar10: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (cifar10, *cifar10.rglob("*"))}

    before = state()
    prepare(cifar10)
    load(cifar10)
    assert state() == before  # a file that came and went would show in its folder's time


def test_a_root_that_cannot_be_written_is_named(archive: bytes, root: Path) -> None:
    root.write_text("a file")
    for folder, reason in ((root, "File exists"), (root / "below", "Not a directory")):
        assert f"it cannot be put there ({folder}: {reason})" in error_of(folder)
    root.unlink()
    root.mkdir()
    (root / FOLDER).write_text("a file")
    with serve(archive) as line:
        assert f"({ARCHIVE} is not unpacked), and it cannot be put" in error_of(root, line.url)


def be_prepared(patches: dict[str, Any], root: Path, url: str, together: Any) -> None:
    for name, value in patches.items():
        setattr(CIFAR10, name, value)
    together.wait(60)
    prepare(root, url)


@pytest.mark.usefixtures("start")  # whose server of processes has imported everything
def test_two_processes_download_once(archive: bytes, root: Path) -> None:
    patches = {
        name: getattr(CIFAR10, name)
        for name in ("train_list", "test_list", "meta", "tgz_md5", "url")
    }
    together = PROCESSES.Barrier(2)
    with serve(archive, delay=0.5) as line:
        args = (patches, root, line.url, together)
        both = [PROCESSES.Process(target=be_prepared, args=args) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert line.asked == [None]
    load(root)


def test_who_waits_for_another_process_says_so(
    archive: bytes, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(archive, delay=0.3) as line:
        first = threading.Thread(target=prepare, args=(root, line.url))
        first.start()
        assert line.reached.wait(10)
        prepare(root, line.url)
        first.join()
    assert f"Waiting for another process, which holds {root}" in capfd.readouterr().err
    assert line.asked == [None]


@pytest.mark.parametrize(
    "url", ["cifar.tar.gz", "gopher://a/b", "http://", "file:", "http://[a/b", "http://a:b/c"]
)
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match=r"urls has '.*': it must be an http, https, ftp or file"):
        CIFARDataModule(urls=["https://example.com/a.tar.gz", url])


def test_the_command_line_says_it_in_one_line(
    run: Run, cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors(*args: str, code: int = 1) -> list[str]:
        outcome = run("fit", *TINY, *args)
        assert outcome.code == code
        assert "Traceback" not in outcome.err
        assert not list(Path().rglob("*.ckpt"))
        return [line for line in outcome.err.splitlines() if "error" in line.lower()]

    root = f"--data.root={cifar10}"
    name = CIFAR10.train_list[2][0]
    (cifar10 / FOLDER / name).write_bytes(b"?")
    (line,) = errors(root, "--data.val_size=50", "--data.urls=[http://127.0.0.1:9/a]")
    assert line.startswith(f"error: CIFAR10 in '{cifar10}' is not whole ({FOLDER}/{name}")
    assert "http://127.0.0.1:9/a: Connection refused" in line
    # Damaged after it was looked at.
    monkeypatch.setattr(cifar_datamodule, "provide", lambda *args: None)
    (line,) = errors(root, "--data.val_size=50")
    assert line.startswith(f"error: CIFAR10 in '{cifar10}' cannot be read ({FOLDER}/{name}")
    Path("pets/train/cat").mkdir(parents=True)
    (line,) = errors("--data.dataset=pets", code=2)
    assert line.startswith("error: pets/train has only the class 'cat': a classifier needs two")


def save(path: Path, size: tuple[int, int] = (40, 34)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for index in range(4):
                save(tmp_path / "pets" / part / name / f"{index}.png")
    return tmp_path / "pets"


def folder_fault(folder: Path, stage: str = "fit", **options: Any) -> str:
    with pytest.raises(MisconfigurationException) as error:
        CIFARDataModule(dataset=str(folder), val_size=0, **options).setup(stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_classes_that_are_no_classes(pets: Path) -> None:
    for path in (pets / "train/dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert folder_fault(pets).startswith(f"{pets}/train/dog has no images: put some into it")
    shutil.rmtree(pets / "test/dog")
    assert "test has the classes ['cat'], but" in folder_fault(pets, "test")
    shutil.rmtree(pets / "test")
    assert "test has the classes [], but" in folder_fault(pets, "test")
    shutil.rmtree(pets / "train/dog")
    assert f"{pets}/train has only the class 'cat'" in folder_fault(pets)
    shutil.rmtree(pets / "train/cat")
    assert f"{pets}/train has no classes" in folder_fault(pets)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_no_training_image_is_dropped_unsaid(pets: Path, workers: int) -> None:
    cut = pets / "train/cat/2.png"
    cut.write_bytes(cut.read_bytes()[:1000])
    first = folder_fault(pets, num_workers=workers)
    assert first.startswith(f"{cut} is no image that can be read (")
    assert first.endswith("): replace or remove it")
    (pets / "train/dog/0.png").write_bytes(b"")
    (pets / "train/dog/lost.gif").symlink_to("nowhere")
    assert folder_fault(pets, num_workers=workers) == first.replace(
        ": replace or remove it", f", nor are 2 more files in {pets}/train: replace or remove them"
    )


def test_files_are_in_torchvisions_order(pets: Path) -> None:
    for name in ("a/z.png", "a-b/y.png", "a/c/x.JPG", "B.png", "a.txt"):
        save(pets / "train/cat/0.png").rename(pets / "moved")
        (pets / "train/cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (pets / "moved").rename(pets / "train/cat" / name)
    expected = [path for path, label in ImageFolder(pets / "train").samples if label == 0]
    assert len(expected) == 7
    assert [str(path) for path in sorted_files(pets / "train/cat")] == expected


def test_links_are_followed_and_each_folder_seen_once(pets: Path, tmp_path: Path) -> None:
    save(tmp_path / "pool/inner/a.png")
    cat = pets / "train/cat"
    (cat / "pool").symlink_to(tmp_path / "pool")
    (cat / "again").symlink_to(tmp_path / "pool/inner")
    (tmp_path / "pool/inner/up").symlink_to(tmp_path / "pool")
    (cat / "loop").symlink_to(cat)
    (cat / "above").symlink_to(pets)  # would bring the dogs, and the test images
    (cat / "self").symlink_to("self")
    found = [path.resolve() for path in sorted_files(cat)]
    assert sorted(found) == sorted([*(cat / f"{i}.png" for i in range(4)), *(
        [tmp_path / "pool/inner/a.png"]
    )])  # fmt: skip


def test_bombs_are_named_and_large_images_are_no_warning(
    run: Run, best: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 34 - 1)
    bomb = save(pets / "train/cat/bomb.png", (60, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_square(pets / "train/cat/0.png", 32)[0] is not None
        assert folder_fault(pets).startswith(f"{bomb} is no image that can be read (Image size")
    (pets / "train/cat/lost.png").symlink_to("nowhere")
    outcome = run("predict", "--ckpt", str(best), "--images", str(bomb.parent), "--output=o.csv")
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert [line.split()[1] for line in errors] == [str(bomb), f"{bomb.parent}/lost.png"]
    assert "Warning" not in outcome.err
    assert len(Path("o.csv").read_text().splitlines()) == 1 + 4


def test_the_middle_of_a_thread_is_all_that_is_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole it would be 32 × 640,000 pixels, and gigabytes for what Pillow still opens."""
    pixels = np.arange(20_000, dtype=np.uint32).astype(np.uint8)[None]
    Image.fromarray(pixels).save(tmp_path / "thread.png")
    sizes = []
    resize = Image.Image.resize

    def recorded(image: Image.Image, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    square, remark = read_square(tmp_path / "thread.png", 32)
    assert square is not None
    assert square.shape == (3, 32, 32)
    assert abs(float(square.float().mean()) - float(pixels[0, 10_000])) < 2
    assert "20000 × 1 pixels" in remark
    assert sizes == [(3200, 32)] or sizes == [[3200, 32]]


def in_all_formats() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    files = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file := io.BytesIO(), kind, exif=exif)
        files.append(file.getvalue())
    image.save(file := io.BytesIO(), "TIFF", compression="tiff_lzw")
    return [*files, file.getvalue()]


FORMATS = in_all_formats()


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A file cut short, with bytes changed, or of random bytes behind its first ones."""
    content = bytearray(draw(st.sampled_from(FORMATS)))
    fault = draw(st.sampled_from(["cut", "changed", "random"]))
    place = st.one_of(st.integers(0, 99), st.integers(0, len(content) - 1))
    if fault == "cut":
        return bytes(content[: draw(place)])
    if fault == "random":
        return bytes(content[: draw(place)]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 5))):
        content[min(draw(place), len(content) - 1)] = draw(st.integers(0, 255))
    return bytes(content)


def test_any_bytes_are_an_image_or_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    outcomes: list[bool] = []

    @settings(max_examples=500, derandomize=True, deadline=None, database=None)
    @given(damaged_files())
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            image, text = read_square(path, 32)
        assert not said
        assert "\n" not in text
        if image is None:
            assert text.startswith(f"{path} is no image that can be read")
        else:
            assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 32))
        outcomes.append(image is None)

    check()
    assert capsys.readouterr() == ("", "")  # libtiff alone, in C, says more
    assert len(outcomes) >= 500
    assert 50 < sum(outcomes) < len(outcomes) - 50  # both happen
