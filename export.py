"""The network outside of this project: one file, images in, probabilities out.

    python train.py export --ckpt best --output model.onnx    # for ONNX Runtime and its like
    python train.py export --ckpt best --output model.pt2     # for torch.export.load, C++ included

Enlarging, scaling and the names of the classes are inside.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from cifar_datamodule import CIFARDataModule, zoomed
from resnet_module import ResNetModule

Pixels = Literal["uint8", "float32"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
COMPARED = 1000  # images on which the file and PyTorch have to agree
TOLERANCE = 1e-3  # of a probability: beyond it the file computes something else


class Zoom(nn.Module):
    """Enlarges by a quarter, pixel for pixel as `F.interpolate` enlarges uint8 images.

    That is rows first, then columns, each with integer weights and rounded to whole levels: two
    products of matrices, in float32 exact, for all sums stay below 2^24.
    """

    weights: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        identity = torch.eye(size, dtype=torch.float64)[None]
        weights = F.interpolate(identity, zoomed(size), mode="linear")[0].T
        bits = 14  # as in torch: the largest weight, which is 0.9 or more, has 15
        self.unit = float(2**bits)
        self.register_buffer("weights", (weights * self.unit).round().float())

    def forward(self, levels: Tensor) -> Tensor:
        """Maps (N, 3, H, H) to (N, 3, 5/4 H, 5/4 H), both float32 of whole numbers 0 to 255."""
        rows = (levels @ self.weights.T / self.unit + 0.5).floor()
        return (self.weights @ rows / self.unit + 0.5).floor()


class Classifier(nn.Module):
    """A trained network with what this project does to an image before and after it.

    Args:
        module: The network; it is put into eval mode.
        size: Side of the images, in pixels.
        evaluation: What of an image is seen, as in `CIFARDataModule`.
    """

    def __init__(self, module: ResNetModule, size: int, evaluation: str) -> None:
        super().__init__()
        self.network = module.network.eval()
        self.register_buffer("mean", module.mean.clone())
        self.register_buffer("std", module.std.clone())
        self.zoom = nn.Identity() if evaluation == "native" else Zoom(size)
        border = (zoomed(size) - size) // 2
        self.border = border if evaluation == "crop" else 0

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, H), uint8 or float in [0, 1], to probabilities (N, num_classes)."""
        whole = images.float() if images.dtype == torch.uint8 else (images * 255).round()
        levels = self.zoom(whole)
        if self.border:
            levels = levels[:, :, self.border : -self.border, self.border : -self.border]
        return self.network((levels / 255 - self.mean) / self.std).softmax(dim=1)


def export(module: ResNetModule, data: CIFARDataModule, output: Path, pixels: Pixels) -> float:
    """Writes the network to a file, once that agrees with PyTorch on real images.

    Args:
        module: The trained network.
        data: Says how images are shown to it, and has test images to compare on.
        output: The file; its ending, .onnx or .pt2, is its format.
        pixels: What the file takes: `uint8` images, or `float32` ones in [0, 1].

    Returns:
        The largest difference of a probability between the file and this project.

    Raises:
        MisconfigurationException: If they don't agree; there is no file then.
    """
    data.prepare_data()
    native = data.native_test_set()[0][:COMPARED]
    module = module.cpu().float().eval()
    with torch.inference_mode():
        expected = module(data.evaluation_images(native) / 255).softmax(dim=1)
    images = native if pixels == "uint8" else native / 255
    classifier = Classifier(module, data.image_size, data.evaluation).eval()
    example = images[:2].clone()  # the file keeps it, and would keep all that it is a view of
    program = torch.export.export(
        classifier, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    )
    half_written = output.with_name(f"{output.stem}.tmp{output.suffix}")
    try:
        found = FORMATS[output.suffix](program, half_written, module.class_names)(images)
        difference = float((found - expected).abs().max())
        if not difference < TOLERANCE:
            raise MisconfigurationException(
                f"{output} was not written: it would differ from PyTorch by {difference:.1e}"
            )
        half_written.replace(output)
    finally:
        half_written.unlink(missing_ok=True)
    return difference


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, names: list[str]
) -> Callable[[Tensor], Tensor]:
    """Writes an ONNX file, its class names as JSON in its metadata; returns how it is run."""
    import onnxruntime

    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert onnx is not None
    onnx.model.metadata_props["class_names"] = json.dumps(names)
    onnx.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, names: list[str]
) -> Callable[[Tensor], Tensor]:
    """Writes a file of torch.export, with class_names.json in it; returns how it is run."""
    torch.export.save(program, path, extra_files={"class_names.json": json.dumps(names)})
    return torch.no_grad()(torch.export.load(path).module())


FORMATS = {".onnx": write_onnx, ".pt2": write_pt2}


def check_output(output: str) -> Path:
    """The path to export to.

    Raises:
        ValueError: If its format is unknown, or what writes it is not installed.
    """
    path = Path(output)
    if path.suffix not in FORMATS:
        raise ValueError(f"output is {output!r}: its ending must be {' or '.join(FORMATS)}")
    missing = [name for name in PACKAGES if path.suffix == ".onnx" and not find_spec(name)]
    if missing:
        raise ValueError(
            f"output is {output!r}, but ONNX needs {', '.join(missing)}: "
            'pip install -e ".[export]", or export to a .pt2 file'
        )
    if not path.parent.is_dir():
        raise ValueError(f"output is {output!r}: there is no folder {str(path.parent)!r}")
    return path
