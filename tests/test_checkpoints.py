"""Checkpoints: what is read from a file, what is refused, and what an older version has written."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from test_options import build_one_parser, only_sentence

from resnet_module import ResNetModule

OLDER = Path(__file__).parent / "older.ckpt"  # of 2 epochs on the digits, before options.py
KEY = next(iter(torch.load(OLDER, weights_only=True)["callbacks"]))
DIGITS = ["--data.dataset=digits", "--data.val_size=200"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_parser(monkeypatch)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def changed(**parts: Any) -> dict[str, Any]:
    return {**torch.load(OLDER, weights_only=True), **parts}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in changed().items() if key != name}


def junk_option(name: str, value: Any) -> dict[str, Any]:
    return changed(hyper_parameters={**changed()["hyper_parameters"], name: value})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "truncated": (lambda: OLDER.read_bytes()[:9000], "is no checkpoint"),
    "empty": (lambda: b"", "is no checkpoint"),
    "text": (lambda: b"not a checkpoint", "is no checkpoint"),
    "malicious": (lambda: {"state_dict": Malicious()}, "is no checkpoint, or holds more than"),
    "a tensor": (lambda: torch.zeros(3), "holds a Tensor, not a checkpoint"),
    "another project": (lambda: without("class_names"), "is a checkpoint of another project"),
    "no weights": (lambda: without("state_dict"), "is damaged: it has no state_dict"),
    "junk weights": (lambda: changed(state_dict=[1]), "is damaged: its state_dict is a list"),
    "junk network": (lambda: {"state_dict": 3}, "is damaged: its state_dict is a int"),
    "junk classes": (lambda: changed(class_names=[3, None]), "is damaged: its class_names"),
    "junk options": (lambda: changed(hyper_parameters=3), "is damaged: its hyper_parameters is"),
    "unknown option": (lambda: junk_option("foo", 1), "no option foo"),
    "wrong option": (lambda: junk_option("width", "a"), "model.width is 'a': it takes int"),
    "nested junk": (lambda: junk_option("layers", {"a": [{"b": None}]}), "model.layers is"),
    "huge option": (lambda: junk_option("width", 10**9), "width is 1000000000"),
    "other depth": (lambda: junk_option("layers", [2, 1, 1]), "does not fit the network"),
    "other classes": (lambda: changed(class_names=list("abcdefghij")), "trained on the classes"),
    "strange keys": (lambda: {3: None, "pytorch-lightning_version": "2"}, "another project"),
}
# What only `fit` reads again.
BAD_STATE: dict[str, tuple[Callable[[], Any], str]] = {
    "junk epoch": (lambda: changed(epoch="a"), "is damaged: its epoch is a str"),
    "junk optimizer": (lambda: changed(optimizer_states=[3]), "cannot be restored"),
    "no optimizer": (lambda: without("optimizer_states"), "cannot be restored"),
    "junk loops": (lambda: changed(loops={"fit_loop": 3}), "cannot be restored"),
    "junk callbacks": (lambda: changed(callbacks={KEY: 3}), "cannot be restored"),
}


def write(content: Any, path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content, sentence = BAD[kind]
    write(content(), path := Path("bad.ckpt"))
    commands = ("test", "fit", "predict", "export") if kind == "malicious" else ("test", "fit")
    for command in commands:
        output = ["--output=x.pt2"] if command == "export" else []
        found = only_sentence(run(command, "--ckpt", str(path), *output), codes=(1, 2))
        assert sentence in found or "bare network, which fit cannot" in found
    assert not Path("pwned").exists()
    assert not Path("x.pt2").exists()


def test_a_folder_is_no_checkpoint(run: Run) -> None:
    Path("folder").mkdir()
    sentence = only_sentence(run("test", "--ckpt", "folder"))
    assert "ckpt is 'folder'" in sentence
    assert "folder" in sentence


def test_a_file_is_not_run_whatever_the_environment_says(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(changed(extra=Malicious()), "bad.ckpt")
    with pytest.raises(Exception, match="Weights only"):
        ResNetModule.load_from_checkpoint("bad.ckpt")
    # Nor where it takes the place of a good one after that was looked at.
    good = torch.load(OLDER, weights_only=True)
    monkeypatch.setattr("train.read_checkpoint", lambda path: good)
    for command in ("test", "fit"):
        outcome = run(command, "--ckpt", "bad.ckpt", *DIGITS, "--trainer.max_epochs=3")
        assert outcome.code == 1
        assert "the checkpoint cannot be restored: UnpicklingError: Weights only" in outcome.err
    assert not Path("pwned").exists()


@pytest.mark.parametrize("kind", BAD_STATE)
def test_bad_states_are_not_trained_on(run: Run, kind: str) -> None:
    content, sentence = BAD_STATE[kind]
    write(content(), path := Path("bad.ckpt"))
    outcome = run("fit", "--ckpt", str(path), *DIGITS, "--trainer.max_epochs=3")
    assert outcome.code in (1, 2)
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


def test_a_damaged_config_beside_it_is_one_sentence(run: Run) -> None:
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(OLDER, folder / "last.ckpt")
    for text in ("[1", "3", "", "trainer: 3", "\x00"):
        (folder.parent / "config.yaml").write_text(text)
        sentence = only_sentence(run("fit", "--ckpt", str(folder / "last.ckpt")))
        assert f"{folder.parent}/config.yaml is damaged" in sentence


def test_an_older_versions_checkpoint_serves(run: Run) -> None:
    module = ResNetModule.load_from_checkpoint(OLDER, map_location="cpu").eval()
    ramp = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).flip(1, 2, 3)
    with torch.no_grad():
        logits = module(ramp)[0]
    # As the version that wrote it computed them.
    written = [0.0978, 1.4081, 0.0752, -0.4143, -0.3739, -0.6114, -0.5531, 0.1838, 1.1483, -0.4475]
    assert torch.allclose(logits, torch.tensor(written), atol=1e-3)

    path = Path(shutil.copy(OLDER, "older.ckpt"))
    tested = run("test", "--ckpt", str(path), "--trainer.precision=32-true")
    assert tested.code == 0, tested.err
    assert "test/acc 0.1694" in tested.out
    epochs = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*callbacks used to create the checkpoint.*")
        resumed = run("fit", "--ckpt", str(path), *DIGITS, *epochs)
    assert resumed.code == 0, resumed.err
    last = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
