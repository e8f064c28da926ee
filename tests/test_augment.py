"""Augmentations by themselves: their draws, and mixed batches against torchvision's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor
from torchvision.transforms import v2

from cifar_resnet.augment import (
    Augmenter,
    CutMix,
    Cutout,
    MixUp,
    RandomCrop,
    RandomFlip,
    dominant_labels,
)
from resnet_module import ResNetModule

MIXUP, CUTMIX = MixUp(0.4, num_classes=10), CutMix(0.7, size=32, num_classes=10)


def random_batch(count: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)
    return images, torch.randint(10, (count,), generator=rng)


def test_draws_cover_all_values_evenly() -> None:
    augmenter = Augmenter([RandomCrop(8, 32), RandomFlip(), Cutout(4, 32, torch.zeros(3))], 4000, 0)
    draws = {name: v for draw in augmenter.draw(0) for name, v in draw.items()}
    for name, values in {"top": 9, "left": 9, "flip": 2, "row": 32, "column": 32}.items():
        counts = draws[name].long().bincount()
        assert len(counts) == values, name
        assert counts.min() > 0.7 * 4000 / values, name
    assert not torch.equal(draws["top"], draws["left"])


def test_draws_of_mixings_follow_their_distributions() -> None:
    rng = np.random.default_rng(0)
    draws = MIXUP.draw(rng, 4000) | CUTMIX.draw(rng, 4000)
    assert kstest(draws["share"], "beta", args=(0.4, 0.4)).pvalue > 0.01
    assert kstest(draws["kept"], "beta", args=(0.7, 0.7)).pvalue > 0.01
    for name in ("row", "column"):
        assert draws[name].bincount(minlength=32).min() > 0.7 * 4000 / 32


def test_an_augmentation_does_not_change_the_others() -> None:
    alone = Augmenter([RandomFlip()], 100, seed=5)
    among = Augmenter([RandomCrop(8, 32), MIXUP, RandomFlip()], 100, seed=5)
    assert torch.equal(alone.draw(3)[0]["flip"], among.draw(3)[2]["flip"])
    for other in (Augmenter([RandomFlip()], 100, seed=6).draw(3), alone.draw(4)):
        assert not torch.equal(alone.draw(3)[0]["flip"], other[0]["flip"])


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_mixed_batches_equal_torchvisions(
    mixing: MixUp | CutMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the draws of the batch's first image: not a pixel and not a label may differ."""
    images, labels = random_batch(7)
    reference = (v2.MixUp if mixing is MIXUP else v2.CutMix)(num_classes=10)
    for seed in range(100):
        draws = mixing.draw(np.random.default_rng(seed), 7)
        share, *centre = (draws[name][:1] for name in draws)  # CutMix's row and column
        monkeypatch.setattr(torch.distributions.Beta, "sample", lambda *_, share=share: share)
        monkeypatch.setattr(torch, "randint", lambda *_, size, centre=centre: centre.pop())
        mixed, shares = reference(images.float(), labels)
        assert torch.equal(mixing.apply(images, draws), mixed.round().to(torch.uint8))
        assert torch.equal(mixing.apply_to_labels(labels, draws), shares)


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_a_batch_of_one_is_left_alone(mixing: MixUp) -> None:
    images, labels = random_batch(1)
    for seed in range(20):
        draws = mixing.draw(np.random.default_rng(seed), 1)
        assert torch.equal(mixing.apply(images, draws), images)
        shares = mixing.apply_to_labels(labels, draws)
        torch.testing.assert_close(shares, F.one_hot(labels, 10).float())


def test_loss_of_mixed_labels_is_the_papers_and_accuracy_that_of_the_dominant() -> None:
    images, labels = random_batch(50)
    module = ResNetModule(layers=(1, 1, 1), width=4)
    for share, dominant in ((0.7, labels), (0.3, labels.roll(1))):
        mixed = MIXUP.apply_to_labels(labels, {"share": torch.full((50,), share)})
        assert torch.equal(dominant_labels(mixed), dominant)
        module.train_metrics.reset()
        losses, logits = module.shared_step((images / 255, mixed), module.train_metrics)
        own, other = module.losses(logits, labels), module.losses(logits, labels.roll(1))
        torch.testing.assert_close(losses, share * own + (1 - share) * other)
        hits = (logits.argmax(dim=1) == dominant).float().mean()
        assert float(module.train_metrics.compute()["train/acc"]) == pytest.approx(float(hits))
    assert dominant_labels(labels) is labels
