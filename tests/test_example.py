"""The training example: as a user runs it, stopped and resumed, and on two ranks."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.images import add_split

FOLDER = Path(__file__).parents[1] / "examples" / "imagenet"
NUM_TRAIN, NUM_VAL, NUM_CLASSES = 45, 23, 6
# Sizes that don't divide: the last batch of an epoch is smaller than the others.
OPTIONS = ["--arch", "tiny", "--batch-size", "8", "--epochs", "2", "--lr", "0.05", "--seed", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("example-data")
    add_split(root, NUM_TRAIN, NUM_CLASSES, "train", seed=1)
    add_split(root, NUM_VAL, NUM_CLASSES, "val", seed=2)
    return root


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module; torch on one thread, since the results of runs are compared."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("imagenet_example", FOLDER / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(num_threads)


class Interrupted(Exception):
    """Stands for whatever ends a training run without warning."""


def at_training_batch(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]
) -> None:
    """Have the network call action when it sees training batch `number` of the run."""
    create = example.models.create
    seen = 0

    def create_watched(*args: Any) -> torch.nn.Module:
        model = create(*args)

        def watch(module: torch.nn.Module, *_: object) -> None:
            nonlocal seen
            seen += module.training
            if seen == number:
                action()

        model.register_forward_hook(watch)
        return model

    monkeypatch.setattr(example.models, "create", create_watched)


def load(folder: Path, name: str = "checkpoint.pth.tar") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def assert_same_weights(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(got["state_dict"][name], tensor), f"{name} differs after resuming"


def accuracy_line(output: str) -> str:
    """The last line that validation printed."""
    return re.findall(r"^ \*.*$", output, re.MULTILINE)[-1]


def test_trains_saves_and_evaluates(
    example: ModuleType, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    example.main([str(data), *OPTIONS, "--output", str(tmp_path)])
    trained = capfd.readouterr().out
    assert "Epoch: [1][   6/6]" in trained
    assert f"of {NUM_VAL} samples" in accuracy_line(trained)
    checkpoint, best = load(tmp_path), load(tmp_path, "model_best.pth.tar")
    assert checkpoint["epoch"] == 2
    assert best["best_acc1"] == checkpoint["best_acc1"]
    initial = example.models.create("tiny", NUM_CLASSES).state_dict()
    assert not torch.equal(checkpoint["state_dict"]["1.weight"], initial["1.weight"])

    resume = ["--resume", str(tmp_path / "checkpoint.pth.tar")]
    example.main([str(data), *OPTIONS, *resume, "--evaluate"])
    assert accuracy_line(capfd.readouterr().out) == accuracy_line(trained)


# Batch 6 is the last of its epoch: what is left then is its validation.
@pytest.mark.parametrize("stop_at", [2, 6, 9])
def test_resume_after_sigterm_is_bit_exact(
    example: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stop_at: int,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    example.main([str(data), *OPTIONS, "--output", str(whole)])
    expected = capfd.readouterr().out

    with monkeypatch.context() as patched:
        at_training_batch(example, patched, stop_at, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            example.main([str(data), *OPTIONS, "--output", str(stopped)])
    assert ended.value.code == 128 + signal.SIGTERM
    saved = load(stopped)
    assert (saved["epoch"], saved["num_batches"]) == ((0, stop_at) if stop_at <= 6 else (1, 3))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    capfd.readouterr()
    resume = ["--resume", str(stopped / "checkpoint.pth.tar"), "--workers", "3"]
    example.main([str(data), *OPTIONS, "--output", str(stopped), *resume])
    assert_same_weights(load(stopped), load(whole))
    resumed = capfd.readouterr().out
    assert accuracy_line(resumed) == accuracy_line(expected)
    last_epoch = re.compile(r"Epoch: \[1\]\[   6/6\].*(Loss.*)")
    assert last_epoch.findall(resumed) == last_epoch.findall(expected)


def test_resume_after_a_crash_from_the_last_saved_batch(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    example.main([str(data), *OPTIONS, "--output", str(whole)])

    def crash() -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        at_training_batch(example, patched, 6, crash)
        with pytest.raises(Interrupted):
            example.main([str(data), *OPTIONS, "--save-freq", "2", "--output", str(crashed)])
    assert load(crashed)["num_batches"] == 4

    resume = ["--resume", str(crashed / "checkpoint.pth.tar")]
    example.main([str(data), *OPTIONS, "--output", str(crashed), *resume])
    assert_same_weights(load(crashed), load(whole))


def test_two_ranks_count_every_validation_sample_once(
    example: ModuleType, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(FOLDER / "main.py"), str(data), *OPTIONS, "--output", str(tmp_path)]
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    on_two_ranks, loss_on_two_ranks = accuracy_line(run.stdout).split("Loss")
    assert f"of {NUM_VAL} samples" in on_two_ranks

    resume = ["--resume", str(tmp_path / "checkpoint.pth.tar")]
    example.main([str(data), *OPTIONS, *resume, "--evaluate"])
    on_one_rank, loss_on_one_rank = accuracy_line(capfd.readouterr().out).split("Loss")
    assert on_one_rank == on_two_ranks
    # Equal but for rounding: the ranks validated with the running means that were saved.
    assert float(loss_on_one_rank) == pytest.approx(float(loss_on_two_ranks), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere.pth.tar"], "no checkpoint 'nowhere.pth.tar'"),
        (["--arch", "resnet19"], "invalid choice: 'resnet19'"),
    ],
)
def test_mistakes_are_explained(
    example: ModuleType,
    data: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main([str(data), *arguments])
    assert ended.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_built_in_networks_are_torchvisions(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """Same parameters, same initial weights, same function."""
    torch.manual_seed(5)
    theirs = example.models.create(arch, NUM_CLASSES).eval()
    assert type(theirs).__module__.startswith("torchvision.")
    monkeypatch.setattr(example.models, "torchvision_models", None)
    torch.manual_seed(5)
    ours = example.models.create(arch, NUM_CLASSES).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))
