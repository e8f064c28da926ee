"""Checkpoints: written whole, found, read safely, refused in one line where they do not fit."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DigitsRun, Malice, Run
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from cifar_resnet.checkpoint import (
    AtomicCheckpointIO,
    EpochCheckpoint,
    completed_epochs,
    load_weights,
    read_checkpoint,
)
from cifar_resnet.files import atomic_write
from cifar_resnet.messages import UserError
from cifar_resnet.options import check_resumable, check_split
from cifar_resnet.runs import find_checkpoint
from resnet_module import ResNetModule

OLDER = Path(__file__).with_name("older.ckpt")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    atomic_write(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written: No space left on device"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_appears_only_when_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "a.ckpt"
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(os.listdir(path.parent)))
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)
    assert seen == [["a.ckpt.part"]]
    assert os.listdir(path.parent) == ["a.ckpt"]
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["a"], torch.ones(3))


@pytest.mark.parametrize("setting", [None, "1"])
def test_code_in_a_checkpoint_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if setting:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", setting)
    torch.save({"state_dict": Malice(Path("it ran"))}, "bad.ckpt")
    with pytest.raises(UserError, match=r"bad\.ckpt is not a checkpoint, or holds more than"):
        read_checkpoint(Path("bad.ckpt"))
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("bad.ckpt", weights_only=False)
    assert not Path("it ran").exists()
    torch.load("bad.ckpt", weights_only=False)
    assert Path("it ran").exists()  # had it been read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (OLDER.read_bytes()[:5000], "is not a checkpoint"),
        ([1, 2], "holds a list"),
        ({"pytorch-lightning_version": "2.6", "state_dict": {}}, "is not a network of this"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"bad\.ckpt {message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("file", "recorded"),
    [
        (
            "older.ckpt",
            [0.0978, 1.4081, 0.0752, -0.4143, -0.3739, -0.6114, -0.5531, 0.1838, 1.1483, -0.4475],
        ),
        (
            "version_0.1.ckpt",
            [5.2051, -5.4213, -0.5966, -0.269, -1.1578, 0.0366, -0.9758, -2.2096, 0.6517, 1.4348],
        ),
    ],
)
def test_older_checkpoints_give_the_same_logits(run: Run, file: str, recorded: list[float]) -> None:
    """Recorded with the code that wrote them, on the same input tensor."""
    path = Path(shutil.copy(OLDER.with_name(file), file))
    module = ResNetModule.from_checkpoint(read_checkpoint(path))
    ramp = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).flip(1, 2, 3)
    with torch.inference_mode():
        logits = module(ramp)[0]
    torch.testing.assert_close(logits, torch.tensor(recorded), rtol=0, atol=1e-3)
    assert module.class_names == list("0123456789")
    tested = run("test", "--ckpt", file)  # options that are gone are dropped
    assert tested.code == 0, tested.err
    assert "360 images" in tested.out


def test_first_weight_that_does_not_fit_is_named() -> None:
    checkpoint = read_checkpoint(OLDER)
    state = checkpoint["state_dict"]
    options: dict[str, Any] = {"layers": (1, 1, 1), "width": 2, "shortcut": "pad"}
    load_weights(ResNetModule(**options), checkpoint)
    for module, given, name in [
        (ResNetModule(**options, num_classes=7), state, "network.fc.weight"),
        (ResNetModule(**options | {"layers": (1, 1, 2)}), state, "network.layer3.1.conv1.weight"),
        (ResNetModule(**options), state | {"extra": torch.zeros(1)}, "extra"),
        (ResNetModule(**options), {k: v for k, v in state.items() if "fc.b" not in k},
         "network.fc.bias"),
        (ResNetModule(**options), {k: v for k, v in state.items() if "running_mean" not in k},
         "network.bn.running_mean"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"state_dict .*{name}"):
            load_weights(module, {"state_dict": given})
    # Files of PyTorch 0.3, such as the original script's, have no counters.
    without = {k: v for k, v in state.items() if "num_batches" not in k}
    load_weights(ResNetModule(**options), {"state_dict": without})


def make_runs(logs: Path, *names: str) -> None:
    for name in names:
        (logs / name).parent.mkdir(parents=True, exist_ok=True)
        (logs / name).touch()


def test_newest_run_with_the_checkpoint_is_found(tmp_path: Path) -> None:
    make_runs(tmp_path, "version_9/checkpoints/last.ckpt", "version_10/checkpoints/last.ckpt")
    make_runs(tmp_path, "version_2/checkpoints/best.ckpt", "mine/checkpoints/best.ckpt")
    last = tmp_path / "version_10/checkpoints/last.ckpt"
    assert find_checkpoint("last", tmp_path) == last
    assert find_checkpoint("best", tmp_path) == last  # of a run without validation
    make_runs(tmp_path, "version_10/checkpoints/best.ckpt")
    assert find_checkpoint("best", tmp_path) == last.with_name("best.ckpt")
    path = str(tmp_path / "mine/checkpoints/best.ckpt")
    assert find_checkpoint(path, tmp_path) == Path(path)
    with pytest.raises(UserError, match="ckpt is 'nowhere': there is no such file"):
        find_checkpoint("nowhere", tmp_path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no run in .* has a best\.ckpt"):
        find_checkpoint("best", tmp_path / "empty")


def test_runs_that_could_not_resume_are_refused(digits_run: DigitsRun) -> None:
    checkpoint = read_checkpoint(digits_run.best.with_name("last.ckpt"))
    assert completed_epochs(checkpoint) == 3
    check_resumable(checkpoint, max_steps=-1)
    within = {"fit_loop": {"epoch_loop.batch_progress": {"is_last_batch": False}}}
    for max_steps, content, message in [
        (-1, {"state_dict": {}}, "holds weights only"),
        (-1, checkpoint | {"loops": within}, "saved within an epoch"),
        (-1, checkpoint | {"datamodule_hyper_parameters": {}}, "other data"),
        (100, checkpoint, "max_steps cannot end a resumed run"),
    ]:
        with pytest.raises(UserError, match=message):
            check_resumable(content, max_steps)


def copy_with_best_score(folder: Path, score: float) -> Path:
    """Copies a run; its checkpoints then say that its best epoch had this score."""
    checkpoints = Path(shutil.copytree(folder, "moved")) / "checkpoints"
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    state = last["callbacks"]["EpochCheckpoint best"]
    state["best_model_score"] = state["kth_value"] = torch.tensor(score)
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(score))
    torch.save(last, checkpoints / "last.ckpt")
    return checkpoints


def test_moved_run_keeps_its_best_checkpoint(run: Run, digits_run: DigitsRun) -> None:
    """Which a worse epoch must not replace."""
    checkpoints = copy_with_best_score(digits_run.folder, 1.0)  # not to be beaten
    before = (checkpoints / "best.ckpt").read_bytes()
    resumed = run("fit", "--ckpt=moved/checkpoints/last.ckpt", "--trainer.max_epochs=4")
    assert resumed.code == 0, resumed.err
    assert (checkpoints / "best.ckpt").read_bytes() == before
    assert "moved/checkpoints/best.ckpt (val/acc 1.0000)" in resumed.out


def test_scores_of_two_metrics_are_not_compared(run: Run, digits_run: DigitsRun) -> None:
    """An accuracy of 0 would be a loss that no epoch beats."""
    best = copy_with_best_score(digits_run.folder, 0.0) / "best.ckpt"
    metric = ["--best_checkpoint.monitor=val/loss"]  # the lowest is the best
    last = str(best.with_name("last.ckpt"))
    resumed = run("fit", "--ckpt", last, "--trainer.max_epochs=4", *metric)
    assert resumed.code == 0, resumed.err
    assert read_checkpoint(best)["epoch"] == 3


def test_validation_images_may_differ_only_if_none_of_them_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path)
    trained = Namespace(dataset=folder, val_size=200)
    for dataset, val_size in (("another", 9), (folder, 200), (folder, 0)):
        check_split(Namespace(dataset=dataset, val_size=val_size), trained)
    for same in (folder, f"{folder}/", "."):
        with pytest.raises(UserError, match=r"data\.val_size is 9, but .* with 200: images that"):
            check_split(Namespace(dataset=same, val_size=9), trained)
    (tmp_path / "val").mkdir()  # images of its own validate, whatever the number
    check_split(Namespace(dataset=folder, val_size=9), trained)
    Path("digits/val").mkdir(parents=True)  # which the data set of this name passes over
    with pytest.raises(UserError, match="images that"):
        check_split(
            Namespace(dataset="digits", val_size=9), Namespace(dataset="digits", val_size=8)
        )


def test_two_checkpoints_may_save_as_often() -> None:
    """Their states must not be taken for each other's."""
    callbacks: Any = [EpochCheckpoint("last"), EpochCheckpoint("epoch_{epoch}", save_top_k=-1)]
    Trainer(callbacks=callbacks, accelerator="cpu", logger=False)
