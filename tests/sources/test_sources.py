"""Every format that people have ImageNet in gives the samples and the pixels of the ImageFolder.

tests/fixtures holds the same generated images in each of them, written by the format's own library
(tests/fixtures/make.py); test_live_sources.py writes photos.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import make
from helpers.same_images import (
    CENTRE,
    CROPS,
    FIXTURES,
    SOURCES,
    Case,
    Row,
    case_of,
    epoch_of,
    in_any_order,
    num_samples,
    resumed_epoch_of,
    rgb,
)
from PIL import Image

import imagenet_seq.data
from imagenet_seq.data import ImagenetLoader
from imagenet_seq.index.source import Source
from imagenet_seq.loader import Loader
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.read.options import ReadOptions
from imagenet_seq.sources.recognise import open_source

NUMBERED = ("flat", "lmdb", "tensorpack", "ffcv", "mds", "webdataset_variants/jpeg_txt_number")
"""Formats that have labels and no names for them."""

IMAGES = FIXTURES / "images"
pytestmark = pytest.mark.filterwarnings("ignore::imagenet_seq.machine.LoaderNote")


@pytest.fixture(
    scope="module",
    params=[(place, split) for place, splits in SOURCES.items() for split in splits],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    stored = tmp_path_factory.mktemp("stored")
    return case_of(FIXTURES, IMAGES, *request.param, stored)


def test_every_fixture_is_tested() -> None:
    tested = {place.split("/")[0] for place in SOURCES}
    assert tested == {path.name for path in FIXTURES.iterdir() if path.is_dir()} - {"__pycache__"}
    assert tested == {name.split("/")[0] for name in make.FORMATS}


def expected_classes(case: Case) -> list[str]:
    """The names of a source's classes, as far as the format has them; else numbers."""
    wnids, labels = case.reference.index.classes, set(case.reference.index.targets)
    if case.place.startswith(NUMBERED):
        return [str(label) for label in range(max(labels) + 1)]
    return [wnid if label in labels else str(label) for label, wnid in enumerate(wnids)]


def test_samples_labels_and_classes_are_those_of_the_images(case: Case) -> None:
    index = case.source.index
    assert list(index.targets) == list(case.reference.index.targets)
    assert len(index) == num_samples(IMAGES, case.place, case.split)
    assert list(index.classes) == expected_classes(case)
    assert len(set(index.name)) == len(index)
    assert all(
        Path(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".ppm") for name in index.name
    )
    assert not any("left out" in note for note in case.source.notes)
    index.validate(case.place)


def test_validation_gives_pillows_pixels_in_the_sources_order(case: Case) -> None:
    loader = case.loader(CENTRE, shuffle=False, num_workers=8)
    epoch = epoch_of(loader)
    rows = [row for batch in epoch for row in batch]
    assert len(rows) == len(case.source.index)
    for i, (label, pixels) in enumerate(rows):
        expected = CENTRE(Image.fromarray(rgb(loader.dataset.encoded(i))))
        assert pixels == expected.numpy().tobytes(), case.source.index.name[i]
        assert label == case.reference.index.targets[i]
    other = case.loader(CENTRE, shuffle=False, num_workers=1)
    assert resumed_epoch_of(other, loader) == epoch


def test_random_crops_are_the_imagefolders(case: Case) -> None:
    reference = case.reference_loader(CROPS, shuffle=True, num_workers=1)
    loader = case.loader(CROPS, shuffle=True, num_workers=8)
    first, second = epoch_of(reference), epoch_of(reference)
    assert first != second
    assert epoch_of(loader) == first
    other = case.loader(CROPS, shuffle=True, num_workers=1)
    assert resumed_epoch_of(loader, other) == second


def test_a_block_shuffle_changes_nothing_but_the_order(case: Case) -> None:
    """The order is that of the source's own blocks; a sample's crop is the same in any order."""
    settings = {"shuffle": "block", "reading": ReadOptions(block_bytes=8192), "shuffle_blocks": 2}
    reference = case.reference_loader(CROPS, shuffle=False)
    loader, other = (case.loader(CROPS, num_workers=n, **settings) for n in (1, 8))
    epoch = epoch_of(loader)
    assert in_any_order(epoch) == in_any_order(epoch_of(reference))
    assert resumed_epoch_of(other, case.loader(CROPS, num_workers=8, **settings)) == epoch


def test_two_ranks_together_see_every_sample_once(case: Case) -> None:
    halves = [
        epoch_of(case.loader(CENTRE, shuffle=False, num_workers=2, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    whole = epoch_of(case.reference_loader(CENTRE, shuffle=False))
    assert len(halves[0]) == len(halves[1])
    assert in_any_order(halves[0] + halves[1]) == in_any_order(whole)


def by_key(source: Source, loader: Loader) -> dict[str, Row]:
    """Label and pixels of each sample under its name without the extension."""
    rows = (row for batch in epoch_of(loader) for row in batch)
    names = (str(Path(name).with_suffix("")) for name in source.index.name)
    return dict(zip(names, rows, strict=True))


def test_a_pack_of_it_has_the_same_samples(case: Case, tmp_path: Path) -> None:
    pack_dataset(
        FIXTURES / case.place, tmp_path, splits=[case.split], num_workers=2, progress=False
    )
    packed = open_source(tmp_path, case.split)
    assert packed.kind == "pack"
    assert packed.index.classes == case.source.index.classes
    loader = Loader(packed, case.split, CENTRE, batch_size=3, shuffle=False)
    expected = by_key(case.source, case.loader(CENTRE, shuffle=False))
    assert by_key(packed, loader) == expected
    assert len(expected) == len(case.source.index)


@pytest.mark.parametrize(
    ("path", "place", "split"),
    [
        ("webdataset/imagenet1k-train-{0000..0001}.tar", "webdataset", "train"),
        ("webdataset/imagenet1k-validation-*.tar", "webdataset", "val"),
        ("official/ILSVRC2012_img_val.tar", "official", "val"),
        ("tensorpack/msgpack/ILSVRC-train.lmdb", "tensorpack/msgpack", "train"),
        ("lmdb/pickle/val.lmdb", "lmdb/pickle", "val"),
        ("parquet/data/train-*.parquet", "parquet", "train"),
        ("hf_disk/validation", "hf_disk", "val"),
        ("tfrecord/inception/train-*-of-00002", "tfrecord/inception", "train"),
        ("tfrecord/tfds", "tfrecord/tfds/imagenet2012/5.1.0", "val"),
        ("mds/val", "mds", "val"),
        ("kaggle/ILSVRC/Data/CLS-LOC/val", "kaggle", "val"),
    ],
)
def test_paths_and_patterns_name_the_same_samples(path: str, place: str, split: str) -> None:
    loaders = [
        Loader(FIXTURES / name, split, CENTRE, batch_size=3, shuffle=False)
        for name in (path, place)
    ]
    first, second = (list(loader.dataset.targets) for loader in loaders)
    assert first == second
    assert epoch_of(loaders[0]) == epoch_of(loaders[1])


# ---- the original project's ways to say it -------------------------------------------------------


@pytest.fixture(params=["msgpack", "pickle", "pyarrow"])
def lmdbs(request: pytest.FixtureRequest) -> Path:
    """A folder with ILSVRC-train.lmdb and ILSVRC-val.lmdb, as tensorpack wrote them."""
    return FIXTURES / "tensorpack" / request.param


def test_the_first_versions_line(lmdbs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", str(lmdbs))
    loader = imagenet_seq.data.Loader("train", batch_size=6, num_workers=2)
    images, target = next(iter(loader))
    assert images.shape == (6, 3, 224, 224)
    assert images.dtype == torch.float32
    assert target.dtype == torch.int64
    # The original dropped what does not fill a batch.
    assert [len(target) for _, target in loader] == [6, 6, 6, 2]
    labels = [int(label) for _, target in ImagenetLoader("val", batch_size=4) for label in target]
    assert sorted(labels) == sorted(sample.label for sample in make.by_class(IMAGES, "val"))


def test_the_last_versions_line(lmdbs: Path) -> None:
    arguments = {"batch_size": 3, "num_workers": 2, "shuffle": True, "cache": 50_000}
    loader = ImagenetLoader(str(lmdbs), "train", CROPS, **arguments)
    first, second = epoch_of(loader), epoch_of(loader)
    assert first != second
    assert [label for label, _ in in_any_order(first)] == [i // 4 for i in range(20)]
    dropping = ImagenetLoader(str(lmdbs), "train", CROPS, drop_last=True, **arguments)
    assert [len(batch) for batch in epoch_of(dropping)] == 6 * [3]
    loader.set_epoch(0)
    assert epoch_of(loader) == first
