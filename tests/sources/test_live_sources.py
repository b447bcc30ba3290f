"""What the formats' own libraries write of photos, and what tensorpack reads of ours.

A writer runs where its packages are: in this interpreter, or in one of those that
IMAGENET_SEQ_WRITERS names (paths of Python interpreters, separated by colons).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import make
from helpers.same_images import (
    CENTRE,
    CROPS,
    SOURCES,
    case_of,
    epoch_of,
    num_samples,
    resumed_epoch_of,
)

from imagenet_seq.pack.packing import preprocess

WRITERS = list(filter(None, os.environ.get("IMAGENET_SEQ_WRITERS", "").split(os.pathsep)))
pytestmark = [
    pytest.mark.filterwarnings("ignore::imagenet_seq.machine.LoaderNote"),
    # tensorpack 0.11 does not close synsets.txt.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:tensorpack.dataflow.dataset"),
]
MISSING = ("ImportError", "ModuleNotFoundError")


@pytest.fixture(scope="module")
def images(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos as an ImageFolder of 8 classes, named as ImageNet names its images."""
    root = tmp_path_factory.mktemp("photos")
    wnids = [photo.parent.name for photo in photos[:8]]
    for i, photo in enumerate(photos[:40]):
        wnid = wnids[i % 8]
        name = f"{wnid}_{i}" if i < 30 else f"ILSVRC2012_val_{i - 29:08d}"
        copy = root / ("train" if i < 30 else "val") / wnid / f"{name}.JPEG"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, copy)
    return root


@pytest.fixture(scope="module")
def written(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that has a format written and returns the folder; once for each format."""
    root = tmp_path_factory.mktemp("formats")

    @functools.cache
    def write(name: str) -> str | None:
        try:
            make.FORMATS[name](images, root / name)
        except ImportError as error:
            return written_elsewhere(name, images, root, str(error))
        return None

    def folder(name: str) -> Path:
        if reason := write(name):
            pytest.skip(reason)
        return root

    return folder


def written_elsewhere(name: str, images: Path, root: Path, reason: str) -> str | None:
    """Let another interpreter write a format; return why none did."""
    for python in WRITERS:
        shutil.rmtree(root / name, ignore_errors=True)
        options = ["--images", str(images), "--destination", str(root)]
        status, said = run(python, make.__file__, name, *options)
        if status == 0:
            return None
        last = (said.strip().splitlines() or [""])[-1]
        if not last.startswith(MISSING):
            pytest.fail(f"{python}: the writer of {name} failed:\n{said}")
        reason = f"{reason}; {python}: {last}"
    return f"no writer of {name}: {reason} (IMAGENET_SEQ_WRITERS names more interpreters)"


def run(*command: str) -> tuple[int, str]:
    """Run a program; return its exit status and what it said. Ends it with its children."""
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        return status, said.read()


@pytest.mark.parametrize(
    ("place", "split"),
    [(p, split) for p, splits in SOURCES.items() for split in splits if p != "images"],
)
def test_photos_in_every_format_are_those_of_the_imagefolder(
    images: Path, written: Callable[[str], Path], tmp_path: Path, place: str, split: str
) -> None:
    [name] = [name for name in make.FORMATS if f"{place}/".startswith(f"{name}/")]
    case = case_of(written(name), images, place, split, tmp_path)
    assert list(case.source.index.targets) == list(case.reference.index.targets)
    assert len(case.source.index) == num_samples(images, place, split)
    for transform, shuffle in ((CROPS, True), (CENTRE, False)):
        reference = case.reference_loader(transform, shuffle=shuffle)
        loader, other = (case.loader(transform, shuffle=shuffle, num_workers=n) for n in (8, 1))
        first, second = epoch_of(reference), epoch_of(reference)
        assert epoch_of(loader) == first
        assert resumed_epoch_of(loader, other) == second


# ---- our LMDBs, read by tensorpack ---------------------------------------------------------------

READ_BY_TENSORPACK = """
import hashlib, sys
from tensorpack.dataflow import LMDBData, LMDBSerializer

raw = LMDBData(sys.argv[1], shuffle=False)
flow = LMDBSerializer.load(sys.argv[1], shuffle=False)
flow.reset_state()
pairs = list(flow)
assert len(raw) == len(flow) == len(pairs)
for image, label in pairs:
    assert image.dtype == "uint8" and type(label) is int
    print("sample", hashlib.sha256(image.tobytes()).hexdigest(), label)
"""


@pytest.fixture(scope="module")
def python_with_tensorpack() -> str:
    """An interpreter that has tensorpack."""
    said = ""
    for python in (sys.executable, *WRITERS):
        status, said = run(python, "-c", "import tensorpack.dataflow.format, lmdb")
        if status == 0:
            return python
    pytest.skip(f"no tensorpack here or in IMAGENET_SEQ_WRITERS: {said.strip().splitlines()[-1]}")


@pytest.mark.parametrize("serializer", ["pickle", "msgpack"])
@pytest.mark.parametrize("keep_bytes", [False, True])
def test_tensorpack_reads_what_preprocess_writes(
    images: Path,
    python_with_tensorpack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serializer: str,
    keep_bytes: bool,
) -> None:
    monkeypatch.setenv("TENSORPACK_SERIALIZE", serializer)  # decides for both
    preprocess(images, tmp_path, keep_bytes=keep_bytes, num_workers=2, progress=False)
    for split in ("train", "val"):
        path = tmp_path / f"ILSVRC-{split}.lmdb"
        status, said = run(python_with_tensorpack, "-c", READ_BY_TENSORPACK, str(path))
        assert status == 0, said
        read = [line.split()[1:] for line in said.splitlines() if line.startswith("sample ")]
        (tmp_path / f"stored-{split}").mkdir()
        ours = case_of(path.parent, images, path.name, split, tmp_path / f"stored-{split}")
        dataset = ours.loader(CENTRE).dataset
        stored = [hashlib.sha256(dataset.encoded(i)).hexdigest() for i in range(len(dataset))]
        labels = ours.reference.index.targets  # those of the original photos
        assert read == [[*pair] for pair in zip(stored, map(str, labels), strict=True)]
        originals = [sample.data for sample in make.by_class(images, split)]
        kept = [hashlib.sha256(data).hexdigest() for data in originals]
        assert (sorted(stored) == sorted(kept)) == keep_bytes
