"""Impossible options: one sentence, exit code 2, and nothing read, written or downloaded."""

import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_DIGITS, Outcome, Run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import options
import train

DIGITS = ["--data.dataset=digits", "--data.val_size=200"]
SCHEDULER = "--model.lr_scheduler="
PLATEAU = f"{SCHEDULER}lightning.pytorch.cli.ReduceLROnPlateau"

WRONG = [
    # Unknown names.
    ("--data.bach_size=3", "no option --data.bach_size (do you mean --data.batch_size?)"),
    ("--model.optimizer=Adam --model.optimizer.lrr=1", "no option model.optimizer.lrr"),
    ("extra", "no option extra"),
    ("--model.num_classes=3", "model.num_classes is no option: it follows from data"),
    # Wrong types.
    ("--data.batch_size=a", "data.batch_size is 'a': it takes int"),
    ("--model.layers=[1,2]", "model.layers is '[1, 2]': it takes tuple with 3 elements"),
    ("--model.shortcut=a", "model.shortcut is 'a': it takes conv3x3, conv1x1, pad"),
    ("--model.optimizer=Foo", "model.optimizer is 'Foo': it takes the name of a class"),
    ("--model.optimizer.lr=a", "model.optimizer.lr is 'a': it takes float"),
    ("--trainer.limit_val_batches=a", "trainer.limit_val_batches is 'a': it takes int or float"),
    (f"{SCHEDULER}CosineAnnealingLR", "model.lr_scheduler needs T_max"),
    (f"{SCHEDULER}ReduceLROnPlateau", "model.lr_scheduler is ambiguous"),
    # Impossible values of the data and the network.
    ("--data.batch_size=1000000000000", "batch_size is 1000000000000: it must be 1,000,000 at"),
    ("--data.batch_size=0", "batch_size is 0: it must be 1 or more"),
    ("--data.val_size=-1", "val_size is -1: it must be 0 or more"),
    ("--data.dataset=cifar11", "dataset is 'cifar11': choose"),
    ("--data.eval_batch_size=0", "eval_batch_size is 0: it must be 1 or more"),
    ("--data.num_workers=-1", "num_workers is -1: it must be 0 or more"),
    ("--data.image_size=1000000", "image_size is 1000000: it must be 1,024 at most"),
    ("--data.seed=-1", "seed is -1: it must be 0 or more"),
    ("--model.width=0", "width is 0: it must be 1 to 4,096"),
    ("--model.layers=[3,0,3]", "layers is (3, 0, 3)"),
    ("--model.width=1000000000", "width is 1000000000: it must be 1 to 4,096"),
    ("--model.layers=[1,1,1000000000]", "layers is (1, 1, 1000000000)"),
    ("--model.width=4096", "1.9e+10 parameters"),
    ("--seed_everything=-1", "seed_everything is -1: it must be from 0 to 4,294,967,295"),
    ("--seed_everything=4294967296", "seed_everything is 4.29497e+09: it must be"),
    # Of the optimizer and the scheduler.
    ("--model.optimizer.lr=-1", "Adam(lr=-1"),
    ("--model.optimizer.lr=0", "lr is 0: it must be more than 0"),
    ("--model.optimizer.lr=.nan", "model.optimizer.init_args.lr is nan: it must be a finite"),
    ("--model.optimizer.lr=1e38", "Adam(lr=1e+38"),
    ("--model.optimizer=SparseAdam", "SparseAdam does not support dense gradients"),
    ("--model.optimizer=Muon", "Muon only supports 2D parameters"),
    (f"{SCHEDULER}StepLR {SCHEDULER[:-1]}.step_size=0", "StepLR(step_size=0, gamma"),
    (f"{SCHEDULER}CosineAnnealingLR {SCHEDULER[:-1]}.T_max=0", "ZeroDivisionError"),
    (f"{SCHEDULER}ExponentialLR {SCHEDULER[:-1]}.gamma=-1", "lr is -0.001 after 1 steps"),
    (
        f"{PLATEAU} {SCHEDULER[:-1]}.monitor=foo",
        "monitor is foo: choose lr, loss, images",
    ),
    # Of Trainer, refused by itself or not.
    (
        "--trainer.max_epochs=-5",
        "trainer.max_epochs is -5: it must be from 1 to 1,000,000,000, or -1",
    ),
    ("--trainer.max_steps=-7", "trainer.max_steps is -7"),
    ("--trainer.max_time=a", "Timer(duration='a')"),
    ("--trainer.max_time=00:00:00:00", "trainer.max_time is no time at all"),
    ("--trainer.max_time.days=-1", "trainer.max_time is no time at all"),
    ("--trainer.limit_val_batches=.nan", "trainer.limit_val_batches is nan"),
    ("--trainer.limit_train_batches=0", "trainer.limit_train_batches is 0: it must be more"),
    ("--trainer.limit_train_batches=2.5", "2.5 for limit_train_batches"),
    ("--trainer.val_check_interval=14", "val_check_interval is 14: an epoch has 13 batches"),
    ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch is 0"),
    ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
    ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0"),
    ("--trainer.log_every_n_steps=-1", "trainer.log_every_n_steps is -1"),
    ("--trainer.overfit_batches=-1", "trainer.overfit_batches is -1"),
    ("--trainer.num_sanity_val_steps=-2", "trainer.num_sanity_val_steps is -2"),
    ("--trainer.devices=0", "trainer.devices is 0"),
    ("--trainer.devices=1000000000000", "trainer.devices is 1e+12"),
    ("--trainer.num_nodes=0", "trainer.num_nodes is 0"),
    ("--trainer.strategy=a", "strategy='a'"),
    ("--trainer.profiler=a", "`profiler` parameter"),
    ("--trainer.accelerator=a", "accelerator='a'"),
    ("--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=a", "EarlyStopping in trainer"),
    # Of the checkpoints and the other callbacks.
    ("--best_checkpoint.mode=a", "best_checkpoint.mode is a: choose min or max"),
    ("--best_checkpoint.monitor=a", "best_checkpoint: monitor is a: choose lr, loss"),
    ("--best_checkpoint.save_top_k=-5", "best_checkpoint.save_top_k is -5"),
    ("--best_checkpoint.filename={a", "best_checkpoint.filename is '{a'"),
    ("--last_checkpoint.every_n_epochs=-1", "last_checkpoint.every_n_epochs is -1"),
    ("--cuda_graphs.steps=-1", "cuda_graphs.steps is -1"),
    ("--pictures.every_n_epochs=-1", "pictures.every_n_epochs is -1"),
    ("--weights_only=false", "weights_only is False"),
]


def only_sentence(outcome: Outcome, codes: tuple[int, ...] = (2,)) -> str:
    """The one line on stderr of a command that was refused, but for what Lightning notes."""
    assert outcome.code in codes, outcome
    lines = [line for line in outcome.err.splitlines() if not line.startswith(NOTES)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: "), lines[0]
    return lines[0]


NOTES = ("Seed set to ", "Using ", "GPU available", "TPU available", "💡")


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[a for a, _ in WRONG])
def test_impossible_options(refuse: Run, arguments: str, sentence: str) -> None:
    outcome = refuse("fit", *DIGITS, *arguments.split())
    assert sentence in only_sentence(outcome)


CONFIGS = {
    "malformed": (b"a: [1\n", "while parsing a flow sequence"),
    "binary": (b"\x92\x00\xff", "no text in UTF-8"),
    "a list": (b"- 1\n", "the config holds no options: - 1"),
    "empty": (b"", "the config holds no options"),
    "unknown": (b"data:\n  foo: 1\n", "no option data.foo"),
    "a tag": (b"data: !!python/object/apply:os.mkdir [pwned]\n", "python/object"),
    "wrong": (b"data:\n  batch_size: [1]\n", "data.batch_size is '[1]': it takes int"),
    "no section": (b"best_checkpoint: null\n", "best_checkpoint is None: it takes options"),
    "unprintable": (b'data:\n  root: "a\\0b"\n', "data.root is 'a\\x00b'"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_are_none(refuse: Run, tmp_path: Path, kind: str) -> None:
    content, sentence = CONFIGS[kind]
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    assert sentence in only_sentence(refuse("fit", "--config", str(config)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "one of {fit,validate,test,predict,export}, but it was not provided"),
        (["fight"], "invalid choice: 'fight' (choose from"),
        (["fit", "--config", "nowhere.yaml"], "does not exist"),
        (["fit", "--config", os.path.dirname(__file__)], "is not a file"),
        (["fit", "--config"], "expected one argument"),
        (["fit", "--data.root=\udcff"], "holds characters that cannot be printed"),
    ],
)
def test_commands_that_are_none(refuse: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in only_sentence(refuse(*arguments))


def test_an_unforeseen_bug_shows_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(*args: Any) -> None:
        raise ValueError("a cloner's own mistake")

    monkeypatch.setattr(train.ResNetModule, "training_step", buggy)
    with pytest.raises(ValueError, match="a cloner's own mistake"):
        run("fit", *SMALL_DIGITS, "--trainer.max_steps=1")


def test_a_checkpoint_after_every_epoch(run: Run) -> None:
    epochs = ["--trainer.max_epochs=2", "--periodic_checkpoint.every_n_epochs=1"]
    outcome = run("fit", *SMALL_DIGITS, *epochs, "--trainer.limit_train_batches=1")
    assert outcome.code == 0, outcome.err
    names = {path.name for path in Path("lightning_logs/version_0/checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "epoch_0.ckpt", "epoch_1.ckpt"}
    outcome = run("fit", "--ckpt", "last", "--trainer.max_epochs=3")
    assert outcome.code == 0, outcome.err


def test_options_found_late_are_one_sentence(run: Run) -> None:
    # An epoch of the batches left by the limit is shorter than what was known before.
    late = ["--trainer.limit_train_batches=2", "--trainer.val_check_interval=4"]
    outcome = run("fit", *SMALL_DIGITS, *late)
    assert outcome.code == 1
    assert "`val_check_interval` (4) must be less than or equal" in outcome.err
    assert "Traceback" not in outcome.err


def build_one_parser(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the parsers of commands that are not given: they take most of the time."""
    known = train.CLI.subcommands()

    def used() -> dict[str, set[str]]:
        return {name: known[name] for name in sys.argv[1:2] if name in known} or known

    patch.setattr(train.CLI, "subcommands", staticmethod(used))


def command_in(folder: Path, arguments: list[str]) -> Outcome:
    """`python train.py ARGUMENTS` in an empty folder, up to where the work would begin."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        build_one_parser(patch)
        patch.setattr(train.CLI, "_run_subcommand", lambda self, subcommand: None)
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setattr(sys, "stdin", io.StringIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                with warnings.catch_warnings():
                    train.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
    assert not list(folder.rglob("*")), "something was written"
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def refuse(tmp_path: Path) -> Run:
    """Runs a command that has nothing to do with files, in a folder that must stay empty."""
    (folder := tmp_path / "empty").mkdir()
    return lambda *arguments: command_in(folder, list(arguments))


def check(arguments: list[str], config: bytes | None = None) -> None:
    """No traceback, one sentence at most, nothing written."""
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as outside:
        (folder := Path(outside) / "empty").mkdir()
        if config is not None:
            (path := Path(outside) / "config.yaml").write_bytes(config)
            arguments = [arguments[0], "--config", str(path), *arguments[1:]]
        try:
            outcome = command_in(folder, arguments)
        finally:
            os.environ.clear()
            os.environ.update(environment)
    if outcome.code:
        only_sentence(outcome, codes=(1, 2))


def printed_config() -> dict[str, Any]:
    """The whole configuration of `fit`, with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        return yaml.safe_load(command_in(Path(folder), ["fit", "--print_config"]).out)


DEFAULTS = printed_config()
NAMES = sorted({name.split("[")[0] for name, _ in options.leaves(DEFAULTS)})
NUMERIC = [n for n, v in options.leaves(DEFAULTS) if type(v) in (int, float)] + [*options.RANGES]
NUMBERS = [
    *("-1", "0", "1", "2.5", "1000", "1000000000000", "-1e30", "1e30", "1e400", "1e-400", ".nan"),
    *("nan", ".inf", "inf", "-.inf", "9" * 400, "-" + "9" * 20, "0x10", "[1,1,1]", "[-1,0,.nan]"),
]
NASTY = [
    *("", " ", "a", "é☃", "\udcff", "a\nb", "\x1b[31m", "\x85", "null", "true", "false", "~", "-"),
    *(
        "[]",
        "{}",
        "[1,",
        "{",
        "}",
        "{a: 1}",
        "[[[]]]",
        "[null, 1]",
        "a: b: c",
        "&a [*a]",
        "*a",
        "@",
    ),
    *("%", "!!python/name:os.abort ''", "!!binary x", "!a", "../..", "/dev/null", "--", "=", "min"),
    *("torch.nn.Linear", "builtins.print", "Adam", "StepLR", "EarlyStopping", "s3://a", "x" * 5000),
]
values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(NASTY),
    st.one_of(st.integers(), st.floats()).map(str),
    st.text(max_size=8),
)


def mutated(name: str, place: int, text: str) -> str:
    place %= len(name)
    return name[:place] + text + name[place + 1 :]


unknown = st.builds(mutated, st.sampled_from(NAMES), st.integers(0, 99), st.text(max_size=2))
given_one = st.builds("--{}={}".format, st.sampled_from(NAMES), values)
numeric = st.builds("--{}={}".format, st.sampled_from(NUMERIC), st.sampled_from(NUMBERS))
section = st.builds("--{}={}".format, st.sampled_from(list(DEFAULTS)), values)
arguments = st.one_of(
    *(numeric, numeric, numeric, given_one, given_one),
    st.builds("--{}={}".format, unknown, values),
    section | st.builds("--{}".format, st.sampled_from(NAMES)) | values,
)
commands = st.sampled_from(["fit"] * 6 + ["validate", "test", "predict", "export"])
plain = st.one_of(
    st.sampled_from([None, True, -1, 0, 0.5, 7, 10**12, float("nan"), float("inf"), -1e30]),
    st.integers() | st.floats(),
    st.sampled_from(NASTY) | st.text(max_size=8),
)
keys = st.one_of(
    st.sampled_from([*DEFAULTS, "class_path", "init_args", "lr", "width", ""]), st.text(max_size=5)
)
structures = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn) -> Any:
    """The real configuration, with something else at one place."""
    config = yaml.safe_load(yaml.safe_dump(DEFAULTS))
    path = draw(st.sampled_from(NAMES)).split(".")
    section = config
    for key in path[: draw(st.integers(1, len(path))) - 1]:
        section = section[key]
    key = draw(st.sampled_from(list(section)) | keys)
    section[key] = draw(plain | structures)
    return config


def as_text(structure: Any) -> bytes:
    return yaml.safe_dump(structure, allow_unicode=True).encode(errors="surrogatepass")


configs = st.one_of(
    *(changed().map(as_text), changed().map(as_text), changed().map(as_text)),
    structures.map(as_text),
    st.binary(max_size=40),
    st.builds(
        lambda place, junk: as_text(DEFAULTS)[:place] + junk + as_text(DEFAULTS)[place:],
        st.integers(0, 3000),
        st.binary(min_size=1, max_size=4),
    ),
)


def cases(count: int) -> Any:
    """The same cases each time, and whatever a failing one shrinks to."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@cases(60)
@given(command=commands, arguments=st.lists(arguments, min_size=1, max_size=2))
def test_fuzz_options(command: str, arguments: list[str]) -> None:
    check([command, *arguments])


@cases(60)
@given(command=commands, config=configs)
def test_fuzz_configs(command: str, config: bytes) -> None:
    check([command], config)


@pytest.mark.slow
@cases(400)
@given(command=commands, arguments=st.lists(arguments, min_size=1, max_size=2))
def test_fuzz_many_options(command: str, arguments: list[str]) -> None:
    check([command, *arguments])


@pytest.mark.slow
@cases(400)
@given(command=commands, config=configs)
def test_fuzz_many_configs(command: str, config: bytes) -> None:
    check([command], config)


def test_validation_waits_for_gradients(run: Run) -> None:
    """13 batches make an epoch, and a validation after 6 of them comes between two fours."""
    options = [*SMALL_DIGITS, "--data.batch_size=100", "--trainer.accumulate_grad_batches=4"]
    outcome = run("fit", *options, "--trainer.val_check_interval=0.5")
    assert outcome.code == 2
    assert "every 6 batches: it must be a multiple" in outcome.err
    assert not Path("lightning_logs").exists()
