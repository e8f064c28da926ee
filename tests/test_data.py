"""The data module against torchvision's per-image transforms: nothing lost, repeated or leaked."""

import hashlib
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import QUIET, TRAIN_IMAGES
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as tv

import cifar_datamodule
from cifar_datamodule import SEED_DISTANCE, CIFARDataModule, mean_and_std
from cifar_resnet.datasets import DATASETS, Digits
from cifar_resnet.messages import UserError

COUNTS = {"train": 6, "val": 3, "test": 2}  # images of each class in `pets`


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
    return Trainer(max_epochs=epochs, num_sanity_val_steps=0, **QUIET)


def fit(data: CIFARDataModule, epochs: int = 1) -> Recorder:
    recorder = Recorder()
    trainer(epochs).fit(recorder, data)
    return recorder


def all_of(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def native_images(root: Path) -> Tensor:
    return torch.from_numpy(CIFAR10(root).data).permute(0, 3, 1, 2)


def order_of(epoch: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed * SEED_DISTANCE + epoch)
    return torch.randperm(TRAIN_IMAGES, generator=rng)


@pytest.mark.parametrize("augmentation", ["zoom", "pad", "reflect", "none"])
@pytest.mark.parametrize("cutout", [0, 7, 10])
def test_augmented_images_equal_torchvisions(cifar10: Path, augmentation: Any, cutout: int) -> None:
    """Same draws: not one pixel may differ from torchvision's transforms of single PIL images."""
    data = CIFARDataModule(
        str(cifar10), val_size=0, augmentation=augmentation, cutout=cutout, seed=3
    )
    shown, _ = all_of(fit(data, epochs=2).seen["train"])
    natives = native_images(cifar10)
    colour = (natives / 255).mean((0, 2, 3)).mul(255).round() / 255
    expected = []
    for epoch in (0, 1):
        draws = {name: v for draw in data.augment.draw(epoch) for name, v in draw.items()}
        for position in order_of(epoch, seed=3).tolist():
            draw = {name: int(values[position]) for name, values in draws.items()}
            image = pil(natives[position])
            if augmentation == "zoom":
                image = transforms.Resize(40)(image)
            elif augmentation == "pad":
                image = tv.pad(image, [4])
            elif augmentation == "reflect":
                image = tv.pad(image, [2], padding_mode="reflect")
            if augmentation != "none":
                image = tv.crop(image, draw["top"], draw["left"], 32, 32)
            pixels = tv.to_tensor(tv.hflip(image) if draw["flip"] else image)
            if cutout:
                top, left = (draw[name] - cutout // 2 for name in ("row", "column"))
                height, width = cutout + min(top, 0), cutout + min(left, 0)
                box = (max(top, 0), max(left, 0), height, width)
                pixels = tv.erase(pixels, *box, colour.view(3, 1, 1)[:, :1, :1])
            expected.append(pixels)
    assert torch.equal(shown, torch.stack(expected))


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_batches_of_a_resumed_run_are_mixed_as_they_would_have_been(
    cifar10: Path, tmp_path: Path, mixing: str
) -> None:
    def data() -> CIFARDataModule:
        return CIFARDataModule(str(cifar10), val_size=50, batch_size=64, **{mixing: 0.5})

    whole = fit(data(), epochs=2).seen["train"][4:]
    first, resumed, again = trainer(1), trainer(2), Recorder()
    first.fit(Recorder(), data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed.fit(again, data(), ckpt_path=tmp_path / "first.ckpt")
    assert torch.equal(all_of(again.seen["train"])[0], all_of(whole)[0])
    assert torch.equal(all_of(again.seen["train"])[1], all_of(whole)[1])
    assert [labels.shape for _, labels in whole] == [(64, 10)] * 3 + [(8, 10)]


def test_mixing_ends_after_its_share_of_the_run(cifar10: Path) -> None:
    def batches(**options: Any) -> list[tuple[Tensor, Tensor]]:
        data = CIFARDataModule(str(cifar10), val_size=50, batch_size=100, **options)
        return fit(data, epochs=3).seen["train"]

    plain, mixed = batches(), batches(mixup=0.4, mix_until=0.7)
    assert [labels.dim() for _, labels in mixed] == [2, 2, 2, 2, 1, 1]
    assert not torch.equal(mixed[0][0], plain[0][0])
    for part in (0, 1):
        assert torch.equal(mixed[4][part], plain[4][part])
    data = CIFARDataModule(str(cifar10), val_size=50, mixup=1.0, mix_until=0.7)
    data.trainer = trainer(epochs=-1)
    with pytest.raises(UserError, match=r"mix_until is 0\.7, but the run has no end"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"mixup is 0\.4 and data\.cutmix 1\.0: give one"):
        CIFARDataModule(mixup=0.4, cutmix=1.0)


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ("native", lambda image: image),
        ("zoom", transforms.Resize(40)),
        ("crop", transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32)])),
    ],
)
def test_evaluation_shows_the_images_in_order(
    cifar10: Path, evaluation: Any, expected: Any
) -> None:
    data = CIFARDataModule(str(cifar10), evaluation=evaluation, eval_batch_size=32, val_size=20)
    recorder = Recorder()
    trainer().test(recorder, data, verbose=False)
    source = CIFAR10(cifar10, train=False)
    images, labels = all_of(recorder.seen["test"])
    # torchvision rounds enlarged images to levels of 255; the network sees them unrounded.
    reference = torch.stack([tv.to_tensor(expected(image)) for image, _ in source])
    torch.testing.assert_close(images, reference, rtol=0, atol=1.01 / 255)
    assert evaluation != "native" or torch.equal(images, reference)
    assert labels.tolist() == source.targets
    assert [len(batch[1]) for batch in recorder.seen["test"]] == [32, 28]


def test_evaluation_follows_the_augmentation() -> None:
    views = {"zoom": "zoom", "pad": "native", "reflect": "native", "none": "native"}
    for augmentation, evaluation in views.items():
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

    def contents(images: Tensor) -> list[bytes]:
        return [image.numpy().tobytes() for image in images.contiguous()]

    (held_out, _), (again, _) = seen["val"]
    assert torch.equal(held_out, again)
    assert set(contents(first)) == set(contents(second))
    assert len(set(contents(first))) == 200
    everything = contents(native_images(cifar10) / 255)
    assert set(contents(first)) | set(contents(held_out)) == set(everything)
    label_of = dict(zip(everything, CIFAR10(cifar10).targets, strict=True))
    assert labels.tolist() == [label_of[image] for image in contents(images)]


def test_no_seed_repeats_the_orders_of_another(cifar10: Path) -> None:
    orders = []
    for seed in range(3):
        data = CIFARDataModule(str(cifar10), val_size=50, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            orders.append(tuple(loader.sampler))
    assert len(set(orders)) == len(orders)


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


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twelve training, six validation and four test images of noise."""
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for path in (tmp_path / "pets" / part / name for name in ("cat", "dog")):
            path.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path / f"{i}.png")
    return tmp_path / "pets"


def files_of(folder: Path) -> Tensor:
    return torch.stack([tv.pil_to_tensor(Image.open(path)) for path in sorted(folder.rglob("*.*"))])


def test_own_validation_images_replace_the_split(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cifar_datamodule, "rank_zero_info", said.append)
    data = CIFARDataModule(dataset=str(pets), augmentation="none")
    seen = fit(data).seen
    assert said == [f"{pets} has 6 validation images of its own: data.val_size has no effect"]
    images, labels = all_of(seen["val"])
    assert torch.equal(images, files_of(pets / "val") / 255)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    natives = files_of(pets / "train")
    assert torch.equal(data.train_set.images, natives)
    assert data.train_set.labels.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(data.channel_statistics[0], mean_and_std(natives)[0])
    recorder = Recorder()
    trainer().validate(recorder, data, verbose=False)
    assert torch.equal(all_of(recorder.seen["val"])[0], images)
    assert len(said) == 2


def test_checksum_is_of_all_images_but_the_tests_or_of_the_tests(pets: Path) -> None:
    def checksum(stage: str, val_size: int = 4) -> str:
        data = CIFARDataModule(dataset=str(pets), val_size=val_size)
        data.setup(stage)
        return data.checksum

    def reference(*parts: str) -> str:
        images = torch.cat([files_of(pets / part) for part in parts]).permute(0, 2, 3, 1)
        labels = [name for part in parts for name in (0, 1) for _ in range(COUNTS[part])]
        content = images.numpy().tobytes() + np.array(labels).tobytes()
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    assert checksum("fit") == checksum("validate") == reference("train", "val")
    assert checksum("fit", val_size=0) == reference("train")
    assert checksum("test") == reference("test")
    shutil.rmtree(pets / "val")
    assert checksum("fit") == checksum("validate") == reference("train")


def test_same_seed_same_batches(cifar10: Path) -> None:
    def batches(seed: int, noise: int = 0) -> Tensor:
        torch.manual_seed(noise)  # the global state must not matter
        np.random.seed(noise)
        data = CIFARDataModule(str(cifar10), val_size=50, seed=seed)
        return all_of(fit(data, epochs=2).seen["train"])[0]

    first = batches(seed=0)
    assert torch.equal(first, batches(seed=0, noise=1))
    assert not torch.equal(first, batches(seed=1))


def test_statistics_are_those_of_the_training_images(cifar10: Path) -> None:
    data = CIFARDataModule(str(cifar10), val_size=50, augmentation="none")
    data.setup("fit")
    mean, std = data.channel_statistics
    images = data.train_set.images.double() / 255
    torch.testing.assert_close(mean, images.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.std((0, 2, 3), correction=0).float())
    assert (mean_and_std(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[1] > 0).all()


def test_data_set_is_prepared_in_root_with_the_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Mock(Digits())
    monkeypatch.setitem(DATASETS, "digits", dataset)
    monkeypatch.setenv("HOME", str(tmp_path))
    CIFARDataModule("~/images", "digits", urls=["http://my.mirror/a"]).prepare_data()
    dataset.prepare.assert_called_once_with(tmp_path / "images", ["http://my.mirror/a"])


def test_cifar100_by_one_option(cifar100: Path) -> None:
    data = CIFARDataModule(str(cifar100), "cifar100", val_size=100)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == len(data.class_names) == 100
    assert len(data.train_set) == 150


@pytest.mark.parametrize("val_size", [5, 246, 250, 5000])
def test_impossible_val_size_is_refused(cifar10: Path, val_size: int) -> None:
    data = CIFARDataModule(str(cifar10), val_size=val_size)
    with pytest.raises(UserError, match=f"data.val_size is {val_size}, of 250"):
        data.setup("fit")


def test_checkpoint_options_without_the_data() -> None:
    options = {"dataset": "gone", "augmentation": "pad", "image_size": 48, "num_workers": 4}
    data = CIFARDataModule.from_checkpoint({"datamodule_hyper_parameters": options})
    assert data.evaluation == "native"
    assert data.hparams["image_size"] == 48
