"""The archives of ILSVRC2012 as downloaded, read where they lie."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from helpers.images import stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats import official
from imagenet_seq.sources.place import Opening, Seen, SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
ARCHIVES = FIXTURES / "official"
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
WNIDS = ("n01440764", "n01443537", "n02123045", "n07753592", "n15075141")

Files = Sequence[tuple[str, bytes]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with copies of the three archives, too new for an index of them to be kept."""
    return Path(shutil.copytree(ARCHIVES, tmp_path / "root", copy_function=shutil.copyfile))


def tar_bytes(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def train_tar(path: Path, classes: dict[str, Files], extra: Files = ()) -> Path:
    inner = [(f"{wnid}.tar", tar_bytes(files)) for wnid, files in classes.items()]
    path.write_bytes(tar_bytes([*inner, *extra]))
    return path


def images(wnid: str, *numbers: int) -> list[tuple[str, bytes]]:
    return [(f"{wnid}_{number}.JPEG", b"\xff\xd8 %d" % number) for number in numbers]


def files_of_devkit() -> dict[str, bytes]:
    with tarfile.open(ARCHIVES / DEVKIT) as devkit:
        return {m.name: devkit.extractfile(m).read() for m in devkit if m.isreg()}  # type: ignore[union-attr]


def write_devkit(root: Path, files: dict[str, bytes]) -> None:
    (root / DEVKIT).write_bytes(gzip.compress(tar_bytes(list(files.items()))))


def stored(source: Source) -> list[tuple[str, int, bytes]]:
    """Name, label and bytes of each sample."""
    index = source.index
    return list(zip(index.name, index.targets, stored_bytes(source), strict=True))


# ---- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_same_samples_as_torchvision_extracts(
    split: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import ImageNet, imagenet

    ours = open_source(root, split, progress=False)
    md5s = {
        key: (name, hashlib.md5((root / name).read_bytes()).hexdigest())
        for key, (name, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", md5s)
    theirs = ImageNet(str(root), split)
    assert ours.kind == "ilsvrc2012"
    assert list(ours.index.classes) == theirs.wnids == list(WNIDS)
    assert sorted(stored(ours)) == sorted(
        (os.path.relpath(path, root / split), label, Path(path).read_bytes())
        for path, label in theirs.samples
    )


def test_train_labels_do_not_depend_on_the_order_of_classes(tmp_path: Path) -> None:
    path = train_tar(
        tmp_path / "x.tar", {wnid: images(wnid, 2, 1) for wnid in ("n03", "n01", "n02")}
    )
    assert official.split_in(str(path)) is None  # these are no wnids
    wnids = ("n00000003", "n00000001", "n00000002")
    path = train_tar(tmp_path / "x.tar", {wnid: images(wnid, 2, 1) for wnid in wnids})
    source = open_source(path, progress=False)
    assert source.index.classes == tuple(sorted(wnids))
    assert [(name, label) for name, label, _ in stored(source)] == [
        (f"{wnid}/{wnid}_{number}.JPEG", int(wnid[-1]) - 1) for wnid in wnids for number in (2, 1)
    ]


def test_val_labels_go_by_the_number_in_the_name(root: Path) -> None:
    """Whatever the order in the archive, and also where some are missing."""
    sound = {name: label for name, label, _ in stored(open_source(root, "val", progress=False))}
    with tarfile.open(root / VAL) as archive:
        files = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    (root / VAL).write_bytes(tar_bytes(files[:3:-1]))
    source = open_source(root, "val", progress=False)
    found = {name: label for name, label, _ in stored(source)}
    assert len(found) == 6
    assert found.items() < sound.items()
    assert "holds 6 of the 10 images of the ground truth" in source.notes[-1]


def test_found_at_the_archives_and_by_content(root: Path) -> None:
    assert len(open_source(root / TRAIN, progress=False).index) == 20
    assert len(open_source(root / VAL, "val", progress=False).index) == 10
    with pytest.raises(SplitNeededError, match="split='train' or split='val'"):
        open_source(root, progress=False)
    with pytest.raises(FileNotFoundError, match="is by its name the other split, val"):
        open_source(root / VAL, "train", progress=False)
    (root / TRAIN).rename(root / "a.tar")
    (root / VAL).rename(root / "b.tar")
    with pytest.raises(FileNotFoundError, match="holds the archive of val only"):
        open_source(root / "b.tar", "train", progress=False)
    assert len(open_source(root, "train", progress=False).index) == 20
    assert len(open_source(root, "val", progress=False).index) == 10
    shutil.copy(root / "a.tar", root / "c.tar")
    with pytest.raises(ValueError, match=r"one archive of a split, got .*a\.tar and .*c\.tar"):
        open_source(root, "train", progress=False)


def test_shards_beside_the_archives_are_another_source(root: Path) -> None:
    shutil.copy(FIXTURES / "webdataset" / "imagenet1k-train-0000.tar", root)
    with pytest.raises(ValueError, match="may be read as different things: the archive of ILSVRC"):
        open_source(root, "train", progress=False)
    assert open_source(root, "val", progress=False).kind == "ilsvrc2012"


def test_extracted_folders_win(root: Path) -> None:
    shutil.copytree(FIXTURES / "images" / "train", root / "train")
    assert open_source(root, "train", progress=False).kind == "imagefolder"
    assert open_source(root, "val", progress=False).kind == "ilsvrc2012"


def test_visit_gets_the_samples_of_the_index(root: Path) -> None:
    for split in ("train", "val"):
        seen: list[tuple[int, str, bytes]] = []

        def visit(sample: Seen, seen: list[tuple[int, str, bytes]] = seen) -> None:
            seen.append((sample.sample, sample.name, bytes(sample.data)))

        source = find_source(root, split).open(Opening("fail", False, visit))
        assert seen == [(i, name, data) for i, (name, _, data) in enumerate(stored(source))]


# ---- whether it is whole -------------------------------------------------------------------------


def expect(monkeypatch: pytest.MonkeyPatch, split: str, path: Path, md5: str) -> None:
    download = official.Download(path.name, path.stat().st_size, md5)
    monkeypatch.setattr(official, "DOWNLOADS", {**official.DOWNLOADS, split: download})


@pytest.mark.parametrize(("split", "name"), [("train", TRAIN), ("val", VAL)])
def test_md5_is_compared(
    split: str, name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = hashlib.md5((root / name).read_bytes()).hexdigest(), "0" * 32
    expect(monkeypatch, split, root / name, right)
    assert not [note for note in open_source(root, split, False).notes if name in note]
    expect(monkeypatch, split, root / name, wrong)
    with pytest.raises(DataError, match=f"damaged: expected MD5 {wrong}, got {right}"):
        open_source(root, split, progress=False)
    source = open_source(root, split, progress=False, on_error="skip")
    assert f"got {right}" in source.notes[-1]


def test_damage_that_was_accepted_once_is_told_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the index was kept, and nothing is read again."""
    os.utime(root / TRAIN, (1, 1))
    expect(monkeypatch, "train", root / TRAIN, "0" * 32)
    source = open_source(root, "train", progress=False, on_error="skip")
    monkeypatch.setattr(official, "FileStream", None)
    assert open_source(root, "train", False, on_error="skip").notes == source.notes
    with pytest.raises(DataError, match="damaged: expected MD5 0000"):
        open_source(root, "train", progress=False)


def test_another_size_is_remarked_on(root: Path) -> None:
    (note,) = open_source(root, "train", progress=False).notes
    assert "not the official archive, which has 147897477120 bytes, not 102400" in note


def test_truncated_archive(root: Path) -> None:
    os.truncate(root / TRAIN, 50_000)
    with pytest.raises(DataError, match=r"truncated: member 'n02123045.tar' .* 20480 bytes, got"):
        open_source(root, "train", progress=False)


def test_inner_archive_that_lies_about_its_size(tmp_path: Path) -> None:
    wnid = "n00000001"
    inner = bytearray(tar_bytes(images(wnid, 1)))
    size = b"00000020000\0"  # 8192: more than what is left of the inner archive
    header = bytearray(inner[:512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    inner[:512] = header
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_bytes([(f"{wnid}.tar", bytes(inner[:2048])), ("n00000002.tar", b"x" * 9999)])
    )
    with pytest.raises(DataError, match=rf"x.tar: {wnid}.tar: truncated: .* 8192 bytes, got 1536"):
        open_source(path, progress=False)


GOOD = {"n00000001": images("n00000001", 1), "n00000002": images("n00000002", 1)}
WRONG: dict[str, tuple[dict[str, Files], Files, str]] = {
    "a class without images": ({"n00000003": [("a.md", b"")]}, (), "images of the class, got none"),
    "a class twice": ({}, [("n00000001.tar", tar_bytes([]))], "got another one of that name"),
    "no class": ({}, [("readme.txt", b"x")], "expected the tar of one class.* got something else"),
    "an image twice": (
        {"n00000002": [*GOOD["n00000002"], *GOOD["n00000002"]]}, (), "got another .a duplicate"
    ),
    "an empty image": (
        {"n00000002": [*GOOD["n00000002"], ("b.JPEG", b"")]}, (), "an image, got 0 bytes"
    ),
    "a name outside": (
        {"n00000002": [*GOOD["n00000002"], ("../b.JPEG", b"x")]}, (), "path inside the archive"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_members_are_refused_or_left_out(case: str, tmp_path: Path) -> None:
    classes, extra, message = WRONG[case]
    path = train_tar(tmp_path / "x.tar", {**GOOD, **classes}, extra)
    with pytest.raises(DataError, match=message):
        open_source(path, progress=False)
    source = open_source(path, progress=False, on_error="skip")
    assert [name for name, _, _ in stored(source)] == [
        f"{wnid}/{wnid}_1.JPEG" for wnid in ("n00000001", "n00000002")
    ]
    assert "left out 1 of 3" in source.notes[-1]


def test_wrong_members_of_the_val_archive(root: Path) -> None:
    sound = (root / VAL).read_bytes()
    for name in ("ILSVRC2012_val_00000011.JPEG", "ILSVRC2012_val_00000000.JPEG", "cat.JPEG"):
        with tarfile.open(root / VAL, "a") as archive:
            info = tarfile.TarInfo(name)
            archive.addfile(info)
        with pytest.raises(DataError, match=f"{name}.*expected ILSVRC2012_val_00000001.JPEG to"):
            open_source(root, "val", progress=False)
        assert len(open_source(root, "val", False, on_error="skip").index) == 10
        (root / VAL).write_bytes(sound)


# ---- the devkit ----------------------------------------------------------------------------------


def test_missing_devkit_says_which_file_to_put_where(root: Path) -> None:
    (root / DEVKIT).unlink()
    message = f"no labels without {DEVKIT}: put that .* into {root}"
    for path in (root, root / VAL):
        with pytest.raises(FileNotFoundError, match=message):
            open_source(path, "val", progress=False)
    assert len(open_source(root, "train", progress=False).index) == 20


def test_devkit_one_folder_up(root: Path) -> None:
    (root / "archives").mkdir()
    (root / VAL).rename(root / "archives" / VAL)
    assert len(open_source(root / "archives", "val", progress=False).index) == 10


def test_another_devkit_is_remarked_on(root: Path) -> None:
    assert "not the official devkit: expected MD5 fa75" in open_source(root, "val", False).notes[0]


def test_damaged_devkit(root: Path) -> None:
    files = files_of_devkit()
    meta = "ILSVRC2012_devkit_t12/data/meta.mat"
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    for changed, message in (
        ({meta: None}, r"expected data/meta\.mat in it, found ILSVRC2012_validation"),
        ({meta: files[meta][:-30]}, r"meta\.mat: expected a table 'synsets'"),
        ({meta: b"no MATLAB file"}, r"meta\.mat: expected a table 'synsets'"),
        ({truth: b"1\n6\n"}, "ground truth of image 2: expected an ILSVRC2012_ID.*got b'6'"),
        ({truth: b"1\n-1\n"}, "ground truth of image 2: .*got b'-1'"),
    ):
        there = {**files, **changed}
        write_devkit(root, {name: data for name, data in there.items() if data is not None})
        with pytest.raises(DataError, match=message):
            open_source(root, "val", progress=False)
    whole = (ARCHIVES / DEVKIT).read_bytes()
    for packed in (whole[:400], whole[:-8] + bytes(8), b"no gzip", b""):
        (root / DEVKIT).write_bytes(packed)
        with pytest.raises(DataError, match=f"{DEVKIT}: expected"):
            open_source(root, "val", progress=False)


def test_without_scipy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        open_source(root, "val", progress=False)


# ---- damage at random ----------------------------------------------------------------------------

NESTED = (ARCHIVES / TRAIN).read_bytes()
HEADERS = [at for at in range(0, len(NESTED), 512) if NESTED[at + 257 : at + 262] == b"ustar"]


def check_opening(damaged: bytes) -> None:
    """Expect a DataError, or samples that lie where tarfile finds them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(damaged)
        try:
            source = open_source(path, progress=False, on_error="skip")
        except (DataError, FileNotFoundError):
            return
        found = {(name, data) for name, _, data in stored(source)}
    theirs = set()
    with tarfile.open(fileobj=io.BytesIO(damaged)) as outer:
        for member in outer:
            wnid, inner = member.name.partition(".")[0], outer.extractfile(member)
            with tarfile.open(fileobj=inner) as archive:
                for image in archive:
                    file = archive.extractfile(image)
                    assert file is not None
                    theirs.add((f"{wnid}/{image.name}", file.read()))
    assert found <= theirs


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(HEADERS), st.integers(0, 511), st.integers(1, 255)),
        min_size=1,
        max_size=3,
    )
)
def test_any_flipped_bits_in_headers(flips: Iterable[tuple[int, int, int]]) -> None:
    damaged = bytearray(NESTED)
    for header, position, bits in flips:
        damaged[header + position] ^= bits
    check_opening(bytes(damaged))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(NESTED)))
def test_any_truncation(length: int) -> None:
    check_opening(NESTED[:length])
