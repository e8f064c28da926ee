"""export.py: the files compute what the network computes, and need nothing of this project."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import save_checkpoint
from torch import Tensor
from torchvision.transforms import functional

import export
from resnet_module import ResNetModule

NAMES = ["ant", "bee", "döner"]


def save(path: Path, **data: Any) -> ResNetModule:
    """Writes a checkpoint; the network's data set need not exist."""
    torch.manual_seed(0)
    scaling: dict[str, Any] = {"input_mean": (0.5, 0.4, 0.3), "input_std": (0.2, 0.3, 0.4)}
    module = ResNetModule(**scaling, layers=(1, 1, 1), width=4, num_classes=len(NAMES))
    torch.nn.init.normal_(module.network.fc.weight)  # else every image is as likely in each class
    save_checkpoint(path, module, NAMES, **data)
    return module.eval()


def expected(module: ResNetModule, images: Tensor, evaluation: str) -> Tensor:
    """The probabilities for uint8 images, by torchvision's functions and the network."""
    views = functional.convert_image_dtype(images)
    if evaluation != "native":
        views = functional.resize(views, [images.shape[-1] * 5 // 4] * 2)
    if evaluation == "crop":
        views = functional.center_crop(views, list(images.shape[-2:]))
    views = functional.normalize(views, module.mean.flatten(), module.std.flatten())
    with torch.no_grad():
        return module.network(views).softmax(dim=1)


def noise(count: int, size: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=rng)


class Exported(NamedTuple):
    """A network and the file that it was exported to."""

    module: ResNetModule
    file: Path


def run_export(folder: Path, file: str, *args: str, **data: Any) -> Exported:
    module = save(folder / "best.ckpt", **data)
    command = [f"--ckpt={folder / 'best.ckpt'}", f"--output={folder / file}", *args]
    export.main(command)
    return Exported(module, folder / file)


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("onnxruntime")
    return run_export(tmp_path_factory.mktemp("onnx"), "model.onnx")


@pytest.fixture(scope="module")
def pt2_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("pt2")
    return run_export(folder, "model.pt2", "--pixels=float32", augmentation="pad", image_size=48)


@pytest.mark.parametrize("evaluation", ["native", "zoom", "crop"])
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_classifier_matches_torchvisions_preprocessing(
    tmp_path: Path, evaluation: Any, size: int, pixels: str
) -> None:
    module, images = save(tmp_path / "best.ckpt"), noise(5, size)
    classifier = export.Classifier(module, evaluation)
    with torch.no_grad():
        found = classifier(images if pixels == "uint8" else images / 255)
    torch.testing.assert_close(found, expected(module, images, evaluation), atol=1e-5, rtol=0)


def test_onnx_file_computes_the_networks_probabilities(onnx_export: Exported) -> None:
    """And describes itself."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_export.file)
    for count in (1, 7):
        images = noise(count)
        (found,) = session.run(["probabilities"], {"images": images.numpy()})
        reference = expected(onnx_export.module, images, "zoom")
        torch.testing.assert_close(torch.from_numpy(found), reference, atol=1e-5, rtol=0)
    (given,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 3, 32, 32])
    assert probabilities.shape == ["batch", len(NAMES)]
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    files = sorted(path.name for path in onnx_export.file.parent.iterdir())
    assert files == ["best.ckpt", "model.onnx"]


def test_pt2_file_computes_the_networks_probabilities(pt2_export: Exported) -> None:
    """And has the names of the classes, but no images."""
    extra = {"class_names.json": ""}
    network = torch.export.load(pt2_export.file, extra_files=extra).module()
    for count in (1, 7):
        images = noise(count, 48)
        reference = expected(pt2_export.module, images, "native")
        torch.testing.assert_close(network(images / 255), reference, atol=1e-5, rtol=0)
    assert json.loads(extra["class_names.json"]) == NAMES
    assert pt2_export.file.stat().st_size < 2**20


def test_files_hold_no_paths_of_this_machine(onnx_export: Exported, pt2_export: Exported) -> None:
    for content in (onnx_export.file.read_bytes(), pt2_export.file.read_bytes()):
        assert b"conv2d" in content  # it is not compressed
        for package in (export, torch):
            assert str(Path(package.__file__).parent).encode() not in content


def test_a_file_that_differs_from_pytorch_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_wrong(program: torch.export.ExportedProgram, path: Path, names: list[str]) -> Any:
        path.write_text("wrong")
        return lambda images: program.module()(images) + 0.01

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(export.FORMATS, ".pt2", write_wrong)
    save(Path("best.ckpt"))
    Path("model.pt2").write_text("old")
    with pytest.raises(SystemExit) as end:
        export.main(["--ckpt=best.ckpt", "--output=model.pt2"])
    assert end.value.code == 1
    message = "error: model.pt2 was not written: it would differ from PyTorch by 1.0e-02\n"
    assert capsys.readouterr().err == message
    assert Path("model.pt2").read_text() == "old"
    assert sorted(path.name for path in Path().iterdir()) == ["best.ckpt", "model.pt2"]


def test_scaling_of_other_projects_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[ResNetModule] = []
    monkeypatch.setattr(export, "export", lambda module, *_: exported.append(module) or 0.0)
    torch.save(save(tmp_path / "best.ckpt").network.state_dict(), tmp_path / "bare.pth")
    command = [f"--ckpt={tmp_path / 'bare.pth'}", f"--output={tmp_path / 'model.pt2'}"]
    scaling = ["--input_mean", "0.1", "0.2", "0.3", "--input_std", "0.4", "0.5", "0.6"]
    export.main([*command, *scaling])
    assert exported[0].mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert exported[0].std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_images_to_compare_on_are_the_same_each_time_and_varied() -> None:
    images = export.random_images(32, "float32")
    assert torch.equal(images, export.random_images(32, "float32"))
    assert images.min() >= 0
    assert images.max() <= 1
    contrast = images.std(dim=(2, 3)).mean(dim=1)
    assert contrast.min() < 0.05
    assert contrast.max() > 0.25
    levels = export.random_images(32, "uint8")
    assert levels.dtype == torch.uint8
    torch.testing.assert_close(levels / 255, images, atol=0.5 / 255 + 1e-6, rtol=0)
