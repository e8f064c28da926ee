"""Export: the file says what the project says, without it."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import Run

import export
from cifar_datamodule import CIFARDataModule
from resnet_module import ResNetModule


def test_zoom_is_that_of_the_data() -> None:
    for size in (32, 33, 48, 64):
        images = torch.randint(0, 256, (50, 3, size, size), dtype=torch.uint8)
        side = size * 5 // 4
        expected = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        assert torch.equal(export.Zoom(size)(images.float()), expected.float())


@pytest.mark.parametrize("evaluation", ["native", "zoom", "crop"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_classifier_sees_what_the_test_shows(
    best: Path, evaluation: str, dtype: torch.dtype
) -> None:
    module = ResNetModule.load_from_checkpoint(best).eval()
    data = CIFARDataModule(dataset="digits", val_size=200, evaluation=evaluation)
    data.setup("test")
    native = data.native_test_set()[0]
    expected = module(data.test_set.images / 255).softmax(dim=1)
    images = native if dtype == torch.uint8 else native / 255
    classifier = export.Classifier(module, data.image_size, data.evaluation)
    assert torch.allclose(classifier(images), expected, atol=1e-6)


def expected_probabilities(best: Path, count: int) -> torch.Tensor:
    module = ResNetModule.load_from_checkpoint(best).eval()
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("test")
    with torch.no_grad():
        return module(data.test_set.images[:count] / 255).softmax(dim=1)


def digits(count: int) -> torch.Tensor:
    return CIFARDataModule(dataset="digits", val_size=200).native_test_set()[0][:count]


def test_onnx_file_needs_no_more_than_its_runtime(run: Run, best: Path) -> None:
    outcome = run("export", "--ckpt", str(best), "--output=model.onnx")
    assert outcome.code == 0, outcome.err
    assert "Exported: model.onnx" in outcome.out
    assert "uint8 images (N, 3, 32, 32) to probabilities of 10 classes" in outcome.out
    session = onnxruntime.InferenceSession("model.onnx")
    for count in (1, 7):  # any number of images
        found = session.run(None, {"images": digits(count).numpy()})[0]
        assert torch.allclose(
            torch.from_numpy(found), expected_probabilities(best, count), atol=1e-5
        )
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert names == [str(i) for i in range(10)]
    assert [path.name for path in Path().glob("model*")] == ["model.onnx"]


def test_pt2_file_needs_no_more_than_torch(run: Run, best: Path) -> None:
    outcome = run("export", "--ckpt", str(best), "--output=model.pt2", "--pixels=float32")
    assert outcome.code == 0, outcome.err
    extra = {"class_names.json": ""}
    classify = torch.export.load("model.pt2", extra_files=extra).module()
    for count in (1, 7):
        found = classify(digits(count) / 255)
        assert torch.allclose(found, expected_probabilities(best, count), atol=1e-5)
    assert json.loads(extra["class_names.json"]) == [str(i) for i in range(10)]
    assert Path("model.pt2").stat().st_size < 2**20  # no images in it


def test_a_file_that_says_something_else_is_not_written(
    run: Run, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(program: Any, path: Path, names: list[str]) -> Any:
        path.write_text("wrong")
        return lambda images: program.module()(images).roll(1, dims=1)

    monkeypatch.setitem(export.FORMATS, ".pt2", wrong)
    Path("model.pt2").write_text("old")
    outcome = run("export", "--ckpt", str(best), "--output=model.pt2")
    assert outcome.code == 1
    assert "error: model.pt2 was not written: it would differ from PyTorch by" in outcome.err
    assert Path("model.pt2").read_text() == "old"
    assert [path.name for path in Path().glob("model*")] == ["model.pt2"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model.h5", "output is 'model.h5': its ending must be .onnx or .pt2"),
        ("no/model.pt2", "output is 'no/model.pt2': there is no folder 'no'"),
        ("model.onnx", 'but ONNX needs onnxscript: pip install -e ".[export]"'),
    ],
)
def test_outputs_are_checked_first(
    run: Run, best: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    outcome = run("export", "--ckpt", str(best), f"--output={output}")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not Path(output).exists()
