"""predict.py: its table against the network, the files it writes, and what it refuses."""

import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from PIL import Image
from torchvision.transforms import functional

import predict
from resnet_module import ResNetModule

NAMES = ["ant", "bee, wasp", "[cow]", "döner"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResNetModule:
    """A network in best.ckpt and images in pets/, in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ResNetModule(layers=(1, 1, 1), width=4, num_classes=len(NAMES))
    torch.nn.init.normal_(module.network.fc.weight)  # else every image is as likely in each class
    save_checkpoint(Path("best.ckpt"), module, NAMES)
    Path("pets/old").mkdir(parents=True)
    for name, size in (("a.png", (32, 32)), ("b.png", (64, 48)), ("old/c.png", (33, 200))):
        array = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(Path("pets", name))
    return module.eval()


def expected(module: ResNetModule, file: str, size: int = 32) -> list[tuple[str, float]]:
    """Class and probability, best first, of an image as torchvision resizes it."""
    square = functional.center_crop(functional.resize(Image.open(file), size), [size, size])
    zoomed = [size * 5 // 4] * 2  # the default
    enlarged = functional.resize(functional.to_tensor(square), zoomed)
    with torch.no_grad():
        shares = module(enlarged[None]).softmax(dim=1)[0]
    return sorted(zip(NAMES, shares.tolist(), strict=True), key=lambda pair: -pair[1])


def test_table_has_the_networks_three_best_classes(
    module: ResNetModule, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(["pets", "pets/a.png", "--ckpt=best.ckpt", "--output=out.csv"]) == 0
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["pets/a.png", "pets/b.png", "pets/old/c.png"]
    for row in rows:
        best = expected(module, row["file"])[:3]
        assert [row["class"], row["class_2"], row["class_3"]] == [name for name, _ in best]
        shares = [float(row[f"probability{suffix}"]) for suffix in ("", "_2", "_3")]
        assert shares == pytest.approx([share for _, share in best], abs=1e-4)

    out, err = capsys.readouterr()
    cells = [list(re.finditer(r"\S+( \S+)*", line)) for line in out.splitlines()]
    texts = [[f"{float(v):.4f}" if "prob" in k else v for k, v in row.items()] for row in rows]
    assert [[cell.group() for cell in line] for line in cells] == [list(rows[0]), *texts]
    assert len({tuple(cell.start() for cell in line) for line in cells}) == 1  # aligned
    assert err == ""


def test_table_has_file_names_that_are_not_utf_8(
    module: ResNetModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy("pets/a.png", name)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", write_through=True))
    assert predict.main([name, "--ckpt=best.ckpt", "--output=out.csv"]) == 0
    assert rb"caf\udce9.png" in out.getvalue()
    assert b"caf\xe9.png" in Path("out.csv").read_bytes()


def test_images_of_the_newest_runs_size_go_to_json(module: ResNetModule) -> None:
    best = Path("lightning_logs/version_0/checkpoints/best.ckpt")
    save_checkpoint(best, module, NAMES, image_size=48)
    assert predict.main(["pets/b.png", "--output=out.json"]) == 0
    (row,) = json.loads(Path("out.json").read_text(encoding="utf-8"))
    (first, share), (second, _), *_ = expected(module, "pets/b.png", size=48)
    assert [row["file"], row["class"], row["class_2"]] == ["pets/b.png", first, second]
    assert row["probability"] == pytest.approx(share, abs=1e-4)


def test_other_projects_weights_see_images_of_the_original_size(module: ResNetModule) -> None:
    network = ResNetModule(layers=(1, 1, 1), width=4, num_classes=2, shortcut="conv1x1").network
    weights = network.eval().state_dict()
    theirs = {re.sub(r"^(conv|bn)\.", r"\g<1>1.", key): value for key, value in weights.items()}
    torch.save({"net": theirs, "acc": 93.1}, "net.pth")
    assert predict.main(["pets/a.png", "--ckpt=net.pth", "--output=out.json"]) == 0
    row = json.loads(Path("out.json").read_text())[0]
    with torch.no_grad():
        image = functional.to_tensor(Image.open("pets/a.png"))
        shares = network(image[None]).softmax(dim=1)[0]
    assert row["class"] == str(int(shares.argmax()))
    assert row["probability"] == pytest.approx(float(shares.max()), abs=1e-4)
    assert list(row) == ["file", "class", "probability", "class_2", "probability_2"]


def test_unreadable_files_are_named_and_the_rest_is_done(
    module: ResNetModule, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pets/empty.png").touch()
    Path("notes.txt").write_text("no image")
    whole = Path("pets/b.png").read_bytes()
    Path("pets/cut.png").write_bytes(whole[: len(whole) // 2])
    assert predict.main(["pets", "notes.txt", "--ckpt=best.ckpt", "--output=out.csv"]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert [line.split()[1] for line in lines] == ["pets/cut.png", "pets/empty.png", "notes.txt"]
    assert out.count("\n") == 1 + 3
    assert Path("out.csv").read_text().count("\n") == 1 + 3
    assert predict.main(["notes.txt", "--ckpt=best.ckpt", "--output=none.csv"]) == 1
    assert capsys.readouterr().out == ""
    assert not Path("none.csv").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pets", "--output=o.txt"], "argument --output: 'o.txt' must end in .csv or .json"),
        (["nowhere.png"], "there is no image at 'nowhere.png'"),
        (["pets", "--ckpt=best"], "no run in lightning_logs/ has a best.ckpt: train one"),
        (["pets", "--ckpt=vgg.pth"], "vgg.pth is not a network of this project, or several"),
        (["pets", "--ckpt=bare.pth", "--input_std", *"111"], "input_mean and input_std belong"),
    ],
)
def test_user_errors_are_one_line(
    module: ResNetModule, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, "vgg.pth")
    torch.save(module.network.state_dict(), "bare.pth")
    with pytest.raises(SystemExit) as end:
        predict.main(args)
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert err.startswith(f"error: {message}")
    assert (out, err.count("\n")) == ("", 1)


def test_scaling_of_other_projects_weights(
    module: ResNetModule, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(module.network.state_dict(), "bare.pkl")
    module.mean.fill_(0.4)
    module.std.fill_(0.2)
    scaling = ["--input_mean", *["0.4"] * 3, "--input_std", *["0.2"] * 3]
    assert predict.main(["pets/a.png", "--ckpt=bare.pkl", "--output=out.json", *scaling]) == 0
    (row,) = json.loads(Path("out.json").read_text())
    name, share = expected(module, "pets/a.png")[0]
    assert row["class"] == str(NAMES.index(name))
    assert row["probability"] == pytest.approx(share, abs=1e-3)
    with pytest.raises(SystemExit):
        predict.main(["pets/a.png", "--ckpt=best.ckpt", *scaling])
    assert "error: best.ckpt has its own input scaling" in capsys.readouterr().err
