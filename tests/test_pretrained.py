"""The weights that come with the project: their logits, and the ways to load them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import predict
from cifar_datamodule import CIFARDataModule
from cifar_resnet.checkpoint import PRETRAINED, read_checkpoint
from cifar_resnet.images import evaluation_view, read_square
from resnet_module import ResNetModule

PROJECT = Path(__file__).absolute().parents[1]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
CLASSES = ["airplane", "automobile", *ANIMALS, "ship", "truck"]


def load_from_hub(pretrained: bool) -> ResNetModule:
    return torch.hub.load(str(PROJECT), "resnet20", pretrained=pretrained, source="local")


def test_hub_network_gives_the_recorded_logits() -> None:
    network = load_from_hub(pretrained=True)
    ramp = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).flip(1, 2, 3)
    with torch.inference_mode():
        logits = network(ramp)[0]
    recorded = [1.172, -0.8455, -0.8087, 0.9597, -0.0466, -0.5368, -1.8345, -1.6356, 2.2519, 0.2719]
    assert logits.tolist() == pytest.approx(recorded, abs=1e-3)
    assert network.class_names == CLASSES


def test_hub_network_has_the_papers_size() -> None:
    network = load_from_hub(pretrained=False)
    assert sum(p.numel() for p in network.parameters()) == 269_722  # 0.27 M in He et al. 2015
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert network.network.activation is load_from_hub(pretrained=True).network.activation


def test_weights_alone_are_published() -> None:
    assert PRETRAINED.stat().st_size < 1_300_000
    stored = torch.load(PRETRAINED, weights_only=True)
    assert "optimizer_states" not in stored
    assert stored["datamodule_hyper_parameters"]["root"] == "data"


def test_predict_uses_them_where_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "skyblue").save("sky.png")
    assert predict.main(["sky.png"]) == 0
    out, err = capsys.readouterr()
    image = read_square("sky.png", 32)[None] / 255
    evaluation = CIFARDataModule.from_checkpoint(read_checkpoint(PRETRAINED)).evaluation
    with torch.inference_mode():
        shares = load_from_hub(pretrained=True)(evaluation_view(image, evaluation)).softmax(1)[0]
    best = [f"{CLASSES[i]} {shares[i]:.4f}" for i in shares.topk(3).indices]
    assert " ".join(out.splitlines()[1].split()) == " ".join(["sky.png", *best])
    assert err == f"Checkpoint: {PRETRAINED}\n"
