"""CIFAR's files: looked for, downloaded over whatever line there is, and verified.

torchvision reads the files, which are pickles and could do anything: only those whose checksums are
right. Of an archive that comes over the network nothing is read before its checksum is.
"""

import contextlib
import errno
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer after which a download is given up
TRIES = 100  # most connections to one address, each of which has to bring something new
SIZES = {"cifar-10-python.tar.gz": 170_498_071, "cifar-100-python.tar.gz": 169_001_437}  # bytes
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
GZIP = b"\x1f\x8b"  # how such a file begins


def check_urls(urls: Sequence[str]) -> None:
    """Raises a ValueError unless all are addresses of files."""
    for url in urls:
        try:
            parts = urlsplit(url)
            named = parts.path if parts.scheme == "file" else parts.hostname and parts.port != 0
        except ValueError:
            named = None
        if not named or parts.scheme not in ("http", "https", "ftp", "file"):
            raise ValueError(f"urls has {url!r}: it must be an http, https, ftp or file address")


def fault_of(path: Path, md5: str) -> str | None:
    """What is wrong with a file whose checksum should be `md5`; None if it is whole."""
    try:
        if check_integrity(path, md5):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "is damaged: its checksum is wrong" if os.path.exists(path) else "is missing"


def find_fault(source: type[CIFAR10], root: Path) -> str | None:
    """What is wrong with the first bad file of CIFAR's in `root`; None if all are whole."""
    meta = (source.meta["filename"], source.meta["md5"])
    for name, md5 in [*source.train_list, *source.test_list, meta]:
        if fault := fault_of(root / source.base_folder / name, md5):
            return f"{source.base_folder}/{name} {fault}"
    return None


def describe(source: type[CIFAR10], root: Path) -> str:
    """In what state CIFAR is in `root`, where it is not whole."""
    archive, faults = root / source.filename, []
    if os.path.isfile(archive):
        state, size = fault_of(archive, source.tgz_md5), archive.stat().st_size
        if state and size < SIZES[source.filename]:
            state = f"has only {size:,} of {SIZES[source.filename]:,} bytes" if size else "is empty"
        faults.append(f"{archive.name} {state or 'is not unpacked'}")
    if os.path.isdir(root / source.base_folder) and (fault := find_fault(source, root)):
        faults.append(fault)
    if not faults:
        return f"{source.__name__} is not in {str(root)!r}"
    return f"{source.__name__} in {str(root)!r} is not whole ({', '.join(faults)})"


def way_out(source: type[CIFAR10]) -> str:
    return (
        f"put {source.filename} or its folder {source.base_folder}/ there, give a mirror with "
        "--data.urls, or try the digits, which need no download: "
        "python train.py fit --config recipes/digits.yaml"
    )


def provide(source: type[CIFAR10], root: Path, urls: Sequence[str]) -> None:
    """Sees to it that all of CIFAR's files are in `root`; writes nothing where they are.

    An archive that lies there is unpacked, else it is downloaded from the first of `urls` that has
    it. Of several processes one does that, and the others wait for it.

    Raises:
        OSError: In one sentence, if they are not there and cannot be put there.
    """
    try:
        if not find_fault(source, root):
            return
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f"{source.filename}.lock"):
            if not find_fault(source, root):
                return  # another process was faster
            if fault_of(root / source.filename, source.tgz_md5):
                download(source, root, urls)
            unpack(source, root)
    except OSError as error:
        if error.errno is None:
            raise  # a sentence already
        if error.errno in NO_SPACE:
            raise OSError(
                f"there is no space for {source.__name__} in {str(root)!r} ({error.strerror}): "
                "make some, or give another folder with --data.root"
            ) from error
        raise OSError(
            f"{describe(source, root)}, and it cannot be put there ({error.filename}: "
            f"{error.strerror}): give a folder that can be written with --data.root"
        ) from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock `path`; says so if it has to wait for another process that holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for another process, which holds {path}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(source: type[CIFAR10], root: Path, urls: Sequence[str]) -> None:
    """Puts the archive into `root`, in place of a damaged one only when all of it has come."""
    archive = root / source.filename
    part, faults = root / f"{source.filename}.part", []
    for url in urls:
        try:
            fetch(url, part, source.tgz_md5)
            part.replace(archive)
            return
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                part.unlink(missing_ok=True)
                raise
            faults.append(f"{url}: {describe_failure(error)}")
    raise FileNotFoundError(
        f"{describe(source, root)} and cannot be downloaded ({'; '.join(faults)}): "
        f"{way_out(source)}"
    )


def describe_failure(error: Exception) -> str:
    """Why a download failed, in one line and without Python's brackets."""
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}"
    if isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    strerror = error.strerror if isinstance(error, OSError) else None
    return " ".join((strerror or str(error) or type(error).__name__).split())


def fetch(url: str, part: Path, md5: str) -> None:
    """Downloads a file to `part`, going on where it was cut off as long as something new comes."""
    for _ in range(TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            if not check_integrity(part, md5):
                receive(url, part, before)
        except HTTPError as error:
            if error.code != 416 or not before:  # which says that nothing follows what is there
                raise
        except (OSError, HTTPException) as error:
            cut_off = part.exists() and part.stat().st_size > before
            if not cut_off or getattr(error, "errno", None) in NO_SPACE:
                raise
            continue
        if check_integrity(part, md5):
            return
        part.unlink()
        if not before:
            raise ValueError("another file came: its checksum is wrong")
    raise ConnectionError(f"cut off {TRIES} times")


def receive(url: str, part: Path, start: int) -> None:
    """Adds to the `start` bytes in `part` what they lack, or begins anew where a server can't."""
    headers = {"User-Agent": "cifar-resnet", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with urlopen(Request(url, headers=headers), timeout=DOWNLOAD_TIMEOUT) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        chunk = response.read(2**16)
        is_page = "html" in response.headers.get("Content-Type", "") or chunk.strip()[:1] == b"<"
        if is_page and not start and not chunk.startswith(GZIP):
            raise ValueError("a web page came instead")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                None, part.stem, total, initial=start, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while chunk:
                bar.update(file.write(chunk))
                chunk = response.read(2**16)
            size = file.tell()
        if total and size < total:
            raise ConnectionError(f"cut off after {size:,} of {total:,} bytes")


def unpack(source: type[CIFAR10], root: Path) -> None:
    """Unpacks the archive, each file under another name until all of it is there."""
    with tarfile.open(root / source.filename) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                continue
            path = root / member.name
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            try:
                with part.open("wb") as file:
                    shutil.copyfileobj(content, file)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
