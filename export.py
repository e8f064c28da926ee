"""The network as one file that runs without this project: images in, probabilities out.

    python export.py --output model.onnx                    # for ONNX Runtime
    python export.py --output model.pt2 --pixels float32    # for torch.export.load

The file takes images of the original size, (N, 3, H, H), uint8 or float32 in [0, 1], and gives
probabilities (N, num_classes). Enlarging, input scaling and the names of the classes are inside.
Without --ckpt it is the best network of the newest run or, where there is no run, the one that
comes with the project.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifar_datamodule import CIFARDataModule
from cifar_resnet.images import Evaluation, evaluation_view
from cifar_resnet.messages import UserError, one_line_errors, relative
from cifar_resnet.scripts import ScriptParser, choose_checkpoint, file_ending_in
from resnet_module import ResNetModule

COMPARED = 100  # random images on which the file and PyTorch must agree
TOLERANCE = 1e-3  # of a probability: beyond it the file computes something else


class Classifier(nn.Module):
    """A trained network with what precedes and follows it in evaluation."""

    def __init__(self, module: ResNetModule, evaluation: Evaluation) -> None:
        super().__init__()
        self.module = module
        self.evaluation = evaluation

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, H), uint8 or float32 in [0, 1], to probabilities (N, C)."""
        if images.dtype == torch.uint8:
            images = images / 255
        return self.module(evaluation_view(images, self.evaluation)).softmax(dim=1)


def main(args: Sequence[str] | None = None) -> None:
    """Writes the file."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--output", type=file_ending_in(FORMATS), required=True, help="a .onnx or .pt2 file"
    )
    parser.add_argument("--pixels", choices=("uint8", "float32"), default="uint8")
    with one_line_errors():
        options = parser.parse_args(args)
        path, checkpoint = choose_checkpoint(options)
        module = ResNetModule.from_checkpoint(checkpoint)
        data = CIFARDataModule.from_checkpoint(checkpoint)
        size = data.hparams["image_size"]
        images = random_images(size, options.pixels)
        difference = export(module, data.evaluation, images, options.output)
    print(
        f"{options.output}: {options.pixels} images (N, 3, {size}, {size}) to probabilities of "
        f"{len(module.class_names)} classes, at most {difference:.0e} from PyTorch's; "
        f"checkpoint: {relative(path)}"
    )


def random_images(size: int, pixels: str) -> Tensor:
    """The same `COMPARED` images each time, uint8 or float32 in [0, 1], of any contrast."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((3, 1, 1), (3, size, size), (1, 1, 1))
    colour, noise, contrast = (torch.rand(COMPARED, *shape, generator=rng) for shape in shapes)
    images = colour.lerp(noise, contrast)
    return images if pixels == "float32" else (images * 255).round().to(torch.uint8)


@torch.inference_mode()
def export(module: ResNetModule, evaluation: Evaluation, images: Tensor, output: Path) -> float:
    """Writes a network to a file, once that agrees with PyTorch.

    Args:
        module: The trained network, in eval mode.
        evaluation: What the network is shown of an image, as in `CIFARDataModule`.
        images: (N, 3, H, H), N > 1, uint8 or float32 in [0, 1]: what the file takes, and what it
            is compared on.
        output: The file, .onnx or .pt2. What was there is replaced.

    Returns:
        The largest difference of a probability between the file and PyTorch.

    Raises:
        UserError: If that is more than `TOLERANCE`; nothing is written then.
    """
    classifier = Classifier(module, evaluation).eval()
    example = images[:2].clone()  # the file keeps it, with all that a view belongs to
    shapes = {"images": {0: Dim("batch")}}
    program = torch.export.export(classifier, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the file would hold this machine's paths
    part = output.with_name(f"{output.stem}.part{output.suffix}")
    try:
        run = FORMATS[output.suffix](program, part, module.class_names)
        difference = float((run(images) - classifier(images)).abs().max())
        if not difference < TOLERANCE:
            raise UserError(
                f"{output} was not written: it would differ from PyTorch by {difference:.1e}"
            )
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return difference


def write_onnx(
    program: ExportedProgram, path: Path, names: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """Writes an ONNX file with the names as JSON in its metadata; returns how it is run."""
    import onnxruntime

    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: "batch"}},
        verbose=False,
    )
    assert onnx is not None
    onnx.model.metadata_props["class_names"] = json.dumps(names)
    onnx.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(
    program: ExportedProgram, path: Path, names: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """Writes a torch.export file with class_names.json in it; returns how it is run."""
    torch.export.save(program, path, extra_files={"class_names.json": json.dumps(names)})
    return torch.export.load(path).module()


FORMATS = {".onnx": write_onnx, ".pt2": write_pt2}


if __name__ == "__main__":
    main()
