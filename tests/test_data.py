"""The data: against torchvision's per-image transforms, and nothing lost, repeated or leaked."""

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import TEST_IMAGES, TRAIN_IMAGES, pack
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as tv

import download
from cifar_datamodule import CIFARDataModule, channel_statistics


class Recorder(LightningModule):
    """A model that learns nothing and remembers which batches it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen["train"].append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.seen["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def fit(data: CIFARDataModule, epochs: int = 1) -> Recorder:
    recorder = Recorder()
    trainer(epochs).fit(recorder, data)
    return recorder


def all_of(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_augmented_images_are_those_of_torchvision(cifar10: Path) -> None:
    """Same flips and corners: not one pixel may differ from the note's transforms on PIL images."""
    for augmentation in ("zoom", "pad", "none"):
        data = CIFARDataModule(str(cifar10), val_size=0, augmentation=augmentation, seed=3)
        shown, _ = all_of(fit(data, epochs=2).seen["train"])
        natives = torch.from_numpy(CIFAR10(cifar10).data).permute(0, 3, 1, 2)
        expected = []
        for epoch in (0, 1):
            order = torch.randperm(TRAIN_IMAGES, generator=torch.Generator().manual_seed(3 + epoch))
            for position, (top, left, flip) in zip(
                order, data.draw(epoch).T[order].tolist(), strict=True
            ):
                image = pil(natives[position])
                if augmentation == "zoom":
                    image = transforms.Resize(40)(image)
                elif augmentation == "pad":
                    image = tv.pad(image, [4])
                image = tv.hflip(image) if flip else image
                expected.append(tv.to_tensor(tv.crop(image, top, left, 32, 32)))
        assert torch.equal(shown, torch.stack(expected)), augmentation


@pytest.mark.parametrize("side", [1, 7, 10, 32])
def test_cutout_hides_what_torchvision_erases(cifar10: Path, side: int) -> None:
    """The images of a training without it, the square's part in the image erased; in two epochs."""
    options: dict[str, Any] = {"val_size": 0, "augmentation": "pad", "seed": 3}
    shown = [
        all_of(fit(CIFARDataModule(str(cifar10), cutout=cutout, **options), epochs=2).seen["train"])
        for cutout in (0, side)
    ]
    data = CIFARDataModule(str(cifar10), cutout=side, **options)
    data.setup("fit")
    colour = (torch.from_numpy(CIFAR10(cifar10).data) / 255).mean((0, 1, 2)).mul(255).round() / 255
    expected = []
    for epoch in (0, 1):
        order = torch.randperm(TRAIN_IMAGES, generator=torch.Generator().manual_seed(3 + epoch))
        plain = shown[0][0][epoch * TRAIN_IMAGES :]
        centres = data.draw(epoch)[3:].T[order].tolist()
        for image, (row, column) in zip(plain, centres, strict=False):
            top, left = max(0, row - side // 2), max(0, column - side // 2)
            height, width = (
                min(32, centre - side // 2 + side) - first
                for centre, first in ((row, top), (column, left))
            )
            expected.append(tv.erase(image, top, left, height, width, colour.view(3, 1, 1)))
    assert torch.equal(shown[1][0], torch.stack(expected))
    assert torch.equal(shown[0][1], shown[1][1])
    assert data.draw(0)[3:].unique().tolist() == list(range(32))


def test_draws_cover_every_corner_and_both_directions(cifar10: Path) -> None:
    data = CIFARDataModule(str(cifar10), val_size=0)
    data.setup("fit")
    draws = torch.cat([data.draw(epoch) for epoch in range(20)], dim=1)
    for row, values in zip(draws, (9, 9, 2), strict=True):
        counts = row.bincount()
        assert len(counts) == values
        assert counts.min() > 0.8 * len(row) / values
    assert not CIFARDataModule(str(cifar10), flip=False, val_size=0).flip
    still = CIFARDataModule(str(cifar10), flip=False, val_size=0)
    still.setup("fit")
    assert not still.draw(0)[2].any()
    assert draws[:2].any()


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ("native", lambda image: image),
        ("zoom", transforms.Resize(40)),
        ("crop", transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32)])),
    ],
)
def test_evaluation_shows_torchvisions_images_in_order(
    cifar10: Path, evaluation: Any, expected: Any
) -> None:
    data = CIFARDataModule(str(cifar10), evaluation=evaluation, eval_batch_size=32, val_size=20)
    recorder = Recorder()
    trainer().test(recorder, data, verbose=False)
    source = CIFAR10(cifar10, train=False)
    images, labels = all_of(recorder.seen["test"])
    assert torch.equal(images, torch.stack([tv.to_tensor(expected(image)) for image, _ in source]))
    assert labels.tolist() == source.targets
    assert [len(batch[1]) for batch in recorder.seen["test"]] == [32, 28]


def test_evaluation_follows_the_augmentation() -> None:
    for augmentation, evaluation in [("zoom", "zoom"), ("pad", "native"), ("none", "native")]:
        assert CIFARDataModule(augmentation=augmentation).evaluation == evaluation
        assert CIFARDataModule(augmentation=augmentation, evaluation="crop").evaluation == "crop"


def test_every_training_image_once_per_epoch_in_a_new_order(cifar10: Path) -> None:
    data = CIFARDataModule(
        str(cifar10), val_size=50, batch_size=64, augmentation="none", flip=False
    )
    seen = fit(data, epochs=2).seen
    images, labels = all_of(seen["train"])
    assert [len(batch[1]) for batch in seen["train"]] == [64, 64, 64, 8] * 2
    first, second = images[:200], images[200:]
    assert not torch.equal(first, second)

    def as_a_set(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images.contiguous()}

    held_out, _ = all_of(seen["val"][:1])
    assert as_a_set(first) == as_a_set(second)
    assert len(as_a_set(first)) == 200
    everything = torch.from_numpy(CIFAR10(cifar10).data).permute(0, 3, 1, 2) / 255
    assert as_a_set(first) | as_a_set(held_out) == as_a_set(everything)
    assert len(labels) == 400


def test_validation_split_is_stratified_and_the_same_for_every_seed(cifar10: Path) -> None:
    splits = []
    for seed in (0, 1):
        data = CIFARDataModule(str(cifar10), val_size=50, seed=seed)
        data.setup("fit")
        assert data.val_set.labels.bincount().tolist() == [5] * 10
        assert data.train_set.labels.bincount().tolist() == [20] * 10
        splits.append(data.val_set.images)
    assert torch.equal(*splits)
    data.setup("validate")
    assert torch.equal(data.val_set.images, splits[0])


def test_validation_images_are_the_same_in_every_epoch(cifar10: Path) -> None:
    batches = fit(CIFARDataModule(str(cifar10), val_size=50), epochs=2).seen["val"]
    assert torch.equal(batches[0][0], batches[1][0])
    assert batches[0][0].shape == (50, 3, 40, 40)


def test_without_validation_all_images_train(cifar10: Path) -> None:
    seen = fit(CIFARDataModule(str(cifar10), val_size=0)).seen
    assert len(all_of(seen["train"])[0]) == TRAIN_IMAGES
    assert not seen["val"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_same_seed_same_batches_whatever_the_workers(cifar10: Path) -> None:
    def batches(seed: int, workers: int, noise: int = 0) -> Tensor:
        torch.manual_seed(noise)  # the global state must not matter
        np.random.seed(noise)
        data = CIFARDataModule(str(cifar10), val_size=50, seed=seed, num_workers=workers)
        return all_of(fit(data, epochs=2).seen["train"])[0]

    first = batches(seed=0, workers=0)
    assert torch.equal(first, batches(seed=0, workers=2, noise=1))
    assert not torch.equal(first, batches(seed=1, workers=0))


def test_seed_everything_is_the_seed() -> None:
    os.environ["PL_GLOBAL_SEED"] = "7"
    assert CIFARDataModule().seed == 7
    assert CIFARDataModule(seed=2).seed == 2


def test_statistics_are_those_of_the_training_images(cifar10: Path) -> None:
    data = CIFARDataModule(str(cifar10), val_size=50, augmentation="none")
    data.setup("fit")
    mean, std = data.channel_statistics()
    images = data.train_set.images.double() / 255
    torch.testing.assert_close(mean, images.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.std((0, 2, 3), correction=0).float())
    assert (channel_statistics(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[1] > 0).all()


def test_cifar100_by_one_option(cifar100: Path) -> None:
    data = CIFARDataModule(str(cifar100), "cifar100", val_size=100)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == len(data.class_names) == 100
    assert len(data.train_set) == 150


def test_digits_need_no_files_and_keep_test_images_apart() -> None:
    data = CIFARDataModule("nowhere", "digits", val_size=144, augmentation="none")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    parts = (data.train_set, data.val_set, data.test_set)
    assert [len(part) for part in parts] == [1437 - 144, 144, 360]
    pixels = torch.cat([part.images for part in parts])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1797, 3, 32, 32)
    assert pixels.max() == 255
    assert len(pixels.flatten(1).unique(dim=0)) == 1797  # no image in two parts
    assert data.class_names == list("0123456789")
    assert not Path("nowhere").exists()


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size = (40 + i, 50)
                pixels = rng.integers(0, 256, size if i == 0 else (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_folder_of_ones_own_images_by_one_option(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", {"cat": 4, "dog": 5, "eel": 6})
    data = CIFARDataModule(dataset=str(folder), val_size=3, augmentation="none")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.class_names == ["cat", "dog", "eel"]
    assert data.num_classes == 3
    assert (len(data.train_set), len(data.val_set)) == (12, 3)
    with Image.open(folder / "test/dog/2.png") as image:
        expected = tv.pil_to_tensor(tv.center_crop(tv.resize(image, 32), [32, 32]))
    assert torch.equal(data.test_set.images[4 + 2], expected)
    assert data.test_set.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 6


def test_folder_faults_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", {"cat": 4, "dog": 5})
    with pytest.raises(MisconfigurationException, match="val_size is 5000: of 9 training images"):
        CIFARDataModule(dataset=str(folder)).setup("fit")
    (folder / "test/dog").rename(folder / "test/wolf")
    with pytest.raises(MisconfigurationException, match=r"test has .*'wolf'.*train has .*'dog'"):
        CIFARDataModule(dataset=str(folder), val_size=2).setup("test")


def test_image_size_resizes_what_is_loaded(cifar10: Path) -> None:
    data = CIFARDataModule(str(cifar10), val_size=50, image_size=64)
    seen = fit(data).seen
    assert seen["train"][0][0].shape == (100, 3, 64, 64)
    assert seen["val"][0][0].shape == (50, 3, 80, 80)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A web server on this machine, with the files in `folder`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_archive_in_root_serves_without_a_network(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(cifar10, CIFAR10, monkeypatch)
    data = CIFARDataModule(str(cifar10), val_size=50)
    data.prepare_data()
    data.setup("test")
    assert len(data.test_set) == TEST_IMAGES


def test_missing_data_is_downloaded_and_verified(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(cifar10, CIFAR10, monkeypatch)
    root = tmp_path / "elsewhere"
    with serve(archive.parent) as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
        data = CIFARDataModule(str(root), val_size=50)
        assert not root.exists()  # constructing downloads nothing
        data.prepare_data()
        data.setup("fit")
        assert len(data.train_set) == TRAIN_IMAGES - 50
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(FileNotFoundError, match=r"recipes/digits\.yaml"):
            CIFARDataModule(str(tmp_path / "third"), val_size=50).prepare_data()


def test_what_is_there_is_not_downloaded(cifar10: Path) -> None:
    CIFARDataModule(str(cifar10), val_size=50).prepare_data()  # the address leads nowhere


def test_damaged_batches_are_never_read(cifar10: Path) -> None:
    batch = cifar10 / CIFAR10.base_folder / CIFAR10.train_list[2][0]
    batch.write_bytes(batch.read_bytes()[:-1])
    data = CIFARDataModule(str(cifar10), val_size=50)
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is damaged"):
        data.prepare_data()
    with pytest.raises(MisconfigurationException, match=r"data_batch_3 is damaged"):
        data.setup("fit")


def test_offline_error_names_folder_file_and_digits(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> NoReturn:
        raise URLError("no network")

    monkeypatch.setattr(download, "urlopen", offline)
    empty = str(tmp_path / "empty")
    with pytest.raises(FileNotFoundError) as error:
        CIFARDataModule(empty, val_size=50).prepare_data()
    for part in (empty, "cifar-10-python.tar.gz", "cifar-10-batches-py/", "recipes/digits.yaml"):
        assert part in str(error.value)


def test_evaluation_batches_suit_the_device(cifar10: Path) -> None:
    def sizes(**options: Any) -> list[int]:
        data = CIFARDataModule(str(cifar10), val_size=120, **options)
        data.setup("fit")
        return [len(labels) for _, labels, _ in data.val_dataloader()]

    assert sizes() == [100, 20]  # on a CPU
    assert sizes(eval_batch_size=50) == [50, 50, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar11"}, "dataset is 'cifar11': choose cifar10, cifar100, digits"),
        ({"augmentation": "crop"}, "augmentation is 'crop': choose zoom, pad, none"),
        ({"evaluation": "centre"}, "evaluation is 'centre': choose auto, native, zoom, crop"),
        ({"batch_size": 0}, "batch_size is 0: it must be 1 or more"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1: it must be 1 or more"),
        ({"num_workers": -1}, "num_workers is -1: it must be 0 or more"),
        ({"seed": -1}, "seed is -1: it must be 0 or more"),
        ({"image_size": 16}, "image_size is 16: it must be 32 or more"),
        ({"val_size": -5}, "val_size is -5: it must be 0 or more"),
        ({"val_size": 50_000}, "val_size is 50000: of 50000 .* 10 to 49990"),
        ({"val_size": 9}, "val_size is 9: .* 10 to 49990"),
        ({"dataset": "digits"}, "val_size is 5000: of 1437 training images"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFARDataModule(**options)
