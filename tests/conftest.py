"""What the tests share: sample photos, generated images, torchvision without its native part."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.images import add_split

# A torchvision whose compiled part was built for another torch (there is no CPU build) fails to
# import only for want of these two operators, which its transforms don't use.
try:
    import torchvision
except RuntimeError:
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

SAMPLE = os.environ.get("IMAGENET_SEQ_SAMPLE")
"""Folder of real photos, train/<class>/*.JPEG; tests that need it are skipped without."""

OPTIONAL_PACKAGES = (
    "lmdb",
    "msgpack",
    "msgpack_numpy",
    "pyarrow",
    "scipy",
    "webdataset",
    "zstandard",
)
"""What the extra "test" installs and some tests can do without."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was found out about this machine before must not decide what a test sees."""
    folder = tmp_path_factory.mktemp("machine")
    os.environ["IMAGENET_SEQ_CACHE"] = str(folder / "cache")
    os.environ["IMAGENET_SEQ_LOCKS"] = str(folder / "locks")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _has_photos():
        terminalreporter.write_line(
            f"NOTE: tests on real photos were SKIPPED: IMAGENET_SEQ_SAMPLE is {SAMPLE!r}. "
            "Set it to a folder with train/<class>/*.JPEG.",
            red=True,
        )
    missing = [name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        terminalreporter.write_line(
            f"NOTE: tests were SKIPPED or FAILED for want of {', '.join(missing)}. "
            "pip install '.[test]' brings all of them.",
            red=True,
        )


def _has_photos() -> bool:
    return SAMPLE is not None and Path(SAMPLE, "train").is_dir()


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The root of real photos: train/<class>/*.JPEG."""
    if SAMPLE is None or not _has_photos():
        pytest.skip(f"sample photos are missing: IMAGENET_SEQ_SAMPLE is {SAMPLE!r}")
    return Path(SAMPLE)


@pytest.fixture(scope="session")
def photos(sample_folder: Path) -> list[Path]:
    """The sample photos in sorted order."""
    return sorted((sample_folder / "train").glob("*/*.JPEG"))


@pytest.fixture(scope="session")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """A function that writes an ImageFolder of generated JPEGs and returns its root."""

    def make(num_samples: int, num_classes: int = 4, split: str = "train", seed: int = 0) -> Path:
        root = tmp_path_factory.mktemp("imagefolder")
        add_split(root, num_samples, num_classes, split, seed)
        return root

    return make
