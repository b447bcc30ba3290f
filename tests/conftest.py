"""What the tests share: sample photos, generated images, torchvision without its native part."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet_seq.sources import Source

# A torchvision whose compiled part was built for another torch (there is no CPU build) fails to
# import only for want of these two operators, which its transforms don't use.
try:
    import torchvision
except RuntimeError:
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

SAMPLE_FOLDER = Path(
    os.environ.get("IMAGENET_SEQ_SAMPLE")
    or Path(__file__).parents[1] / ".." / "shared" / "data" / "imagenet-sample"
).resolve()

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
    if not (SAMPLE_FOLDER / "train").is_dir():
        terminalreporter.write_line(
            f"NOTE: tests on real photos were SKIPPED: no folder {SAMPLE_FOLDER}/train. "
            "Set IMAGENET_SEQ_SAMPLE to a folder with train/<class>/*.JPEG.",
            red=True,
        )
    missing = [name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        terminalreporter.write_line(
            f"NOTE: tests were SKIPPED or FAILED for want of {', '.join(missing)}. "
            'pip install "imagenet-seq[test]" brings all of them.',
            red=True,
        )


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The 500 sample photos' root: train/<wnid>/<wnid>_1.JPEG."""
    if not (SAMPLE_FOLDER / "train").is_dir():
        pytest.skip(f"sample photos are missing: no folder {SAMPLE_FOLDER}/train")
    return SAMPLE_FOLDER


@pytest.fixture(scope="session")
def photos(sample_folder: Path) -> list[Path]:
    """The sample photos in sorted order."""
    return sorted((sample_folder / "train").glob("*/*.JPEG"))


def photo_like(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An RGB image with smooth areas, edges and some noise: every part of a codec has work."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = rng.uniform(0.005, 0.2, (3, 3, 2))
    phases = rng.uniform(0, 6.28, (3, 3))
    planes = [
        sum(np.sin(x * waves[c, k, 0] + y * waves[c, k, 1] + phases[c, k]) for k in range(3))
        for c in range(3)
    ]
    pixels = np.stack(planes, -1) * 40 + 128 + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    """Encode with Pillow; options as Image.save."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """Marker and payload of every segment up to the entropy-coded data of a JPEG."""
    found, at = [], 2
    while True:
        assert data[at] == 0xFF
        marker, size = struct.unpack(">xBH", data[at : at + 4])
        found.append((marker, data[at + 4 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            return found


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


def add_split(root: Path, num_samples: int, num_classes: int, split: str, seed: int = 0) -> None:
    """Write num_samples JPEGs of varied size, sampling and quality to root/split/class_*/."""
    rng = np.random.default_rng(seed)
    for i in range(num_samples):
        folder = root / split / f"class_{i % num_classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = (int(v) for v in rng.integers(40, 260, 2))
        image = photo_like(rng, width, height)
        if i % 11 == 5:
            image = image.convert("L")
        options = {"quality": int(rng.integers(40, 98)), "subsampling": int(i % 3)}
        (folder / f"image_{i:05d}.jpg").write_bytes(jpeg_bytes(image, **options))


def stored_bytes(source: Source) -> list[bytes]:
    """Each sample's bytes, read from where the index says they are."""
    index, found = source.index, []
    assert index.length is not None
    for file, offset, length in zip(index.file, index.offset, index.length, strict=True):
        with open(os.path.join(index.root, index.files[file]), "rb") as opened:
            opened.seek(offset)
            found.append(opened.read(length))
    return found
