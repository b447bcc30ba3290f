"""The demo's generated dataset: what a learner and a loader may expect of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "demo" / "make_dataset.py"
NUM_TRAIN, NUM_VAL = 60, 20


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dataset", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_dataset"] = module  # processes that paint import it by this name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dataset(generator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo-data")
    generator.make_dataset(root, NUM_TRAIN, NUM_VAL, processes=1)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.JPEG"))}


def test_classes_are_balanced(generator: ModuleType, dataset: Path) -> None:
    for split, num_samples in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        per_class = {
            folder.name: len(list(folder.iterdir())) for folder in (dataset / split).iterdir()
        }
        assert per_class == dict.fromkeys(generator.CLASSES, num_samples // 10)


def test_images_are_distinct_and_like_photos(dataset: Path) -> None:
    assert len(set(files(dataset).values())) == NUM_TRAIN + NUM_VAL
    images = [Image.open(path) for path in sorted(dataset.rglob("*.JPEG"))]
    widths, heights = zip(*(image.size for image in images), strict=True)
    assert 380 < np.mean(widths) < 560
    assert 300 < np.mean(heights) < 460
    for image in images:
        pixels = np.asarray(image.convert("L"), np.float32)
        assert pixels.std() > 10, "an image without contrast"


def test_oddities_of_imagenet_are_there(dataset: Path) -> None:
    kinds = set()
    for path in (dataset / "train").rglob("*.JPEG"):
        with Image.open(path) as image:
            kinds.add((image.format, image.mode, bool(image.info.get("progressive"))))
    assert ("PNG", "RGB", False) in kinds
    assert ("JPEG", "CMYK", False) in kinds
    assert ("JPEG", "RGB", True) in kinds
    assert ("JPEG", "RGB", False) in kinds


def test_images_do_not_depend_on_processes_or_number(
    generator: ModuleType, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    generator.make_dataset(tmp_path, NUM_TRAIN // 2, NUM_VAL, processes=2)
    fewer, expected = files(tmp_path), files(dataset)
    assert len(fewer) == NUM_TRAIN // 2 + NUM_VAL
    assert fewer == {name: expected[name] for name in fewer}


def test_another_seed_gives_other_images(
    generator: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    generator.make_dataset(tmp_path, 10, 0, seed=1, processes=1)
    assert not set(files(tmp_path).values()) & set(files(dataset).values())
