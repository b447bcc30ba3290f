"""WebDataset shards, tars of class folders, and the tar reader below them and the official ones."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from helpers.images import stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats.tar_file import InMemory, Member, members
from imagenet_seq.sources.place import Opening, Seen, SplitNeededError, expand_pattern
from imagenet_seq.sources.recognise import find_source, open_source
from imagenet_seq.sources.scan import Problems

FIXTURES = Path(__file__).parents[1] / "fixtures"
BLOCK = 512
JPEG = b"\xff\xd8\xff generated \xff\xd9"

Files = Sequence[tuple[str | tarfile.TarInfo, bytes]]


def tar_bytes(files: Files, form: int = tarfile.USTAR_FORMAT, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, files: Files, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, form))
    return path


def shard(num_samples: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + num_samples)
        for member in ((f"{i:04d}.jpg", JPEG + b"%d" % i), (f"{i:04d}.cls", b"%d" % (i % 3)))
    ]


def stored(source: Source) -> list[tuple[str, str, bytes]]:
    """Name, class and bytes of each sample."""
    classes = [source.index.classes[label] for label in source.index.targets]
    return list(zip(source.index.name, classes, stored_bytes(source), strict=True))


def names(source: Source) -> list[str]:
    return list(source.index.name)


# ---- tar -----------------------------------------------------------------------------------------


def walk(data: bytes, problems: Problems | None = None) -> list[Member]:
    return list(members(InMemory("x.tar", data), problems or Problems("fail"), []))


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [Member(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


def of_type(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def with_field(data: bytes, begin: int, field: bytes, at: int = 0) -> bytes:
    """Change a field of the header at `at`, and make its checksum right again."""
    header = bytearray(data[at : at + BLOCK])
    header[begin : begin + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


LONG = "a folder/" * 40 + "with a long name.jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    within_ustar = "b" * 90 + "/" + "c" * 90 + ".jpg"
    long = [] if form == tarfile.USTAR_FORMAT else [(LONG, b"4" * 513)]
    files = [
        of_type("folder", tarfile.DIRTYPE), ("folder/1.jpg", b"1" * 511), ("2.jpg", b"2" * 512),
        *long, (within_ustar, b""), ("größe.jpg", b"6"), (os.fsdecode(b"\xff\xfe.jpg"), b"7"),
    ]  # fmt: skip
    data = tar_bytes(files, form)
    assert walk(data) == by_tarfile(data)
    assert len(walk(data)) == 5 + len(long)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_members_of_what_the_tar_command_writes(form: str, tmp_path: Path) -> None:
    deep = "d" * (80 if form in ("v7", "ustar") else 180)
    for name in ("n01/a.JPEG", "n02/b.JPEG", f"n02/{deep}/c.JPEG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG * 50)
    path = tmp_path / "x.tar"
    command = ["tar", f"--format={form}", "-cf", str(path), "n01", "n02"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip(f"this tar does not write {form}")
    assert walk(path.read_bytes()) == by_tarfile(path.read_bytes())
    assert sorted(names(open_source(path, progress=False)))[0] == "n01/a.JPEG"


def test_sizes_in_base_256_and_signed_checksums() -> None:
    data = tar_bytes([("a.jpg", b"1234"), ("b.jpg", b"5")])
    in_binary = with_field(data, 124, b"\x80" + (4).to_bytes(11, "big"))
    assert walk(in_binary) == by_tarfile(in_binary) == by_tarfile(data)
    signed = bytearray(with_field(data, 0, b"\xe9.jpg"))
    signed[148:156] = b"%06o\0 " % (int(signed[148:154], 8) - 256)
    assert walk(bytes(signed)) == by_tarfile(bytes(signed))


def test_pax_headers_for_all_that_follow() -> None:
    pax = {"comment": "of no use", "path": "the same.jpg"}
    data = tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2")], tarfile.PAX_FORMAT, pax_headers=pax)
    assert walk(data) == by_tarfile(data)
    assert {member.name for member in walk(data)} == {"the same.jpg"}


def test_names_lose_their_dot_and_slash() -> None:
    assert [member.name for member in walk(tar_bytes([("././a/b.jpg", b"1")]))] == ["a/b.jpg"]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (BLOCK, r"member 'a\.jpg' at offset 512: expected 600 bytes, got 0"),
        (BLOCK + 599, r"member 'a\.jpg' at offset 512: expected 600 bytes, got 599"),
        (BLOCK + 600, "expected its last member to be padded to offset 1536, got an end at 1112"),
        (3 * BLOCK + 7, "expected a header of 512 bytes at offset 1536, got 7"),
    ],
)
def test_truncated_archive_names_member_and_sizes(cut: int, message: str) -> None:
    data = tar_bytes([("a.jpg", b"1" * 600), ("b.jpg", b"2")])[:cut]
    with pytest.raises(DataError, match=rf"x\.tar: truncated: {message}"):
        walk(data)


def test_member_that_lies_about_its_size() -> None:
    data = tar_bytes([("a.jpg", b"\xff" * 600), ("b.jpg", b"2" * 600)])
    with pytest.raises(DataError, match=r"'a.jpg' at offset 512: expected 8589934591 bytes, got"):
        walk(with_field(data, 124, b"77777777777\0"))
    with pytest.raises(DataError, match=r"header at offset 1024.*the member before lies about"):
        walk(with_field(data, 124, b"00000000001\0"))
    with pytest.raises(
        DataError, match=r"'a.jpg' at offset 512: expected a size, got b'-0000000001"
    ):
        walk(with_field(data, 124, b"-0000000001\0"))
    with pytest.raises(DataError, match="expected a size"):
        walk(with_field(data, 124, b"\xff" * 12))


def test_wrong_checksum() -> None:
    data = bytearray(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2")]))
    data[2 * BLOCK] ^= 1
    with pytest.raises(DataError, match="header at offset 1024, got bytes whose checksum is wrong"):
        walk(bytes(data))


def test_archive_cut_between_members_leaves_a_remark() -> None:
    remarks: list[str] = []
    data = InMemory("x.tar", tar_bytes([("a.jpg", b"1")])[: 2 * BLOCK])
    assert len(list(members(data, Problems("fail"), remarks))) == 1
    assert "without the mark of an archive's end" in remarks[0]


def test_bytes_behind_the_end_are_reported() -> None:
    """A block that was lost in the middle reads as zeros, and would end the archive unnoticed."""
    data = bytearray(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2")]))
    data[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    with pytest.raises(DataError, match=r"offset 1024 ends the archive, but .* not all zero"):
        walk(bytes(data))
    problems = Problems("skip")
    assert [member.name for member in walk(bytes(data), problems)] == ["a.jpg"]
    assert problems.count == 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.FIFOTYPE, "a FIFO"),
    ],
)
def test_links_and_devices_are_no_files(kind: bytes, what: str) -> None:
    data = tar_bytes([of_type("a.jpg", kind, "../../etc/passwd"), ("b.jpg", b"2")])
    with pytest.raises(DataError, match=f"'a.jpg' at offset 512: expected a file, got {what}"):
        walk(data)
    problems = Problems("skip")
    assert [member.name for member in walk(data, problems)] == ["b.jpg"]
    assert problems.count == 1


def test_sparse_members_are_refused() -> None:
    data = tar_bytes([("a.jpg", b"1")])
    with pytest.raises(DataError, match=r"expected a plain file, got type 'S' \(sparse"):
        walk(with_field(data, 156, b"S"))
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(DataError, match="is sparse"):
        walk(tar_bytes([(info, b"1")], tarfile.PAX_FORMAT))


def test_long_headers_take_time_in_proportion() -> None:
    def headed(kind: bytes, data: bytes) -> bytes:
        return tar_bytes([(of_type("x", kind)[0], data), ("a.jpg", b"1")])

    began_s = time.thread_time()
    walk(headed(b"x", b"5 a=\n" * 200_000))
    found, *_ = walk(headed(b"L", b"./" * 500_000 + b"b.jpg"))
    assert found
    assert time.thread_time() - began_s < 4  # it was 7 s and 12 s


def test_damaged_pax_header() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"comment": "12345"}
    data = tar_bytes([(info, b"1")], tarfile.PAX_FORMAT)
    for wrong in (b"99 comment=12345\n", b"17comment=12345\n", b"00 comment=12345\n"):
        at = data.index(b"17 comment=")
        damaged = data[:at] + wrong[:17] + data[at + 17 :]
        with pytest.raises(DataError, match=r"expected lines '<length> <key>=<value>'"):
            walk(damaged)
    with pytest.raises(DataError, match="at most 1048576 bytes in the extended header"):
        walk(with_field(data + bytes(2 << 20), 124, b"00010000000\0"))


# ---- WebDataset ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("urls", "extensions"),
    [
        ("webdataset/imagenet1k-train-{0000..0001}.tar", ("jpg", "cls")),
        ("webdataset/imagenet1k-validation-00.tar", ("jpg", "cls")),
        ("webdataset_variants/jpeg_txt_number/val-000000.tar", ("jpeg", "txt")),
        ("webdataset_variants/jpeg_txt_wnid/val-000000.tar", ("jpeg", "txt")),
    ],
)
def test_same_samples_as_webdataset(urls: str, extensions: tuple[str, str]) -> None:
    reader = pytest.importorskip("webdataset.tariterators")
    image, label = extensions
    expected = []
    for path in expand_pattern(str(FIXTURES / urls)):
        with open(path, "rb") as file:
            expected += reader.group_by_keys(
                reader.tar_file_expander([{"url": path, "stream": file}])
            )
    source = open_source(FIXTURES / urls, progress=False)
    assert source.kind == "webdataset"
    assert source.index.label is not None
    ours = list(zip(stored(source), source.index.label.tolist(), strict=True))
    assert len(ours) == len(expected)
    for ((name, wnid, data), number), sample in zip(ours, expected, strict=True):
        assert name.endswith(f"{sample['__key__']}.{image}")
        assert data == sample[image]
        assert sample[label].decode() in (str(number), wnid)


def test_splits_by_the_names_of_shards() -> None:
    train = open_source(FIXTURES / "webdataset", "train", progress=False)
    val = open_source(FIXTURES / "webdataset", "val", progress=False)
    assert (len(train.index), len(val.index)) == (20, 10)
    assert train.index.classes == val.index.classes
    assert train.index.classes[0] == "n01440764"
    assert names(train)[0] == "imagenet1k-train-0000/n02123045_29116.jpg"
    assert names(val)[0] == "ILSVRC2012_val_00000001.jpg"
    with pytest.raises(SplitNeededError, match="split='train' or split='val'"):
        open_source(FIXTURES / "webdataset", progress=False)


def test_labels_of_json_and_class_names_of_keys() -> None:
    source = open_source(FIXTURES / "webdataset_variants/png_json", "val", progress=False)
    name, wnid, data = stored(source)[0]
    assert (name, wnid) == ("val/n07753592/ILSVRC2012_val_00000001.png", "n07753592")
    assert data.startswith(b"\x89PNG")


def test_class_names_beside_numbers_are_taken_where_they_are_distinct(tmp_path: Path) -> None:
    def written(name: str, second: bytes) -> Source:
        rows = [
            b'{"label": 0, "class_name": "tench"}',
            b'{"label": 1, "class_name": "%s"}' % second,
        ]
        files = [
            member
            for i, row in enumerate(rows)
            for member in ((f"{i}.jpg", JPEG), (f"{i}.json", row))
        ]
        return open_source(write_tar(tmp_path / name, files), progress=False)

    assert written("a.tar", b"goldfish").index.classes == ("tench", "goldfish")
    assert written("b.tar", b"tench").index.classes == ("0", "1")


def test_numbers_as_text_in_json_are_numbers(tmp_path: Path) -> None:
    files = [
        member
        for i in range(12)
        for member in ((f"{i}.jpg", JPEG), (f"{i}.json", b'{"label": "%d"}' % i))
    ]
    source = open_source(write_tar(tmp_path / "a.tar", files), progress=False)
    assert list(source.index.targets) == list(range(12))  # not as text sorts: 0, 1, 10, 11, 2


def test_names_as_labels_are_sorted_over_all_shards(tmp_path: Path) -> None:
    for i, name in enumerate(("zebra", "ant", "bee")):
        write_tar(
            tmp_path / f"{i}.tar", [("x.JPG", JPEG), ("x.Json", b'{"label": "%s"}' % name.encode())]
        )
    source = open_source(tmp_path, progress=False)
    assert source.index.classes == ("ant", "bee", "zebra")
    assert source.index.label is not None
    assert source.index.label.tolist() == [2, 0, 1]
    assert names(source) == ["0/x.JPG", "1/x.JPG", "2/x.JPG"]


def test_files_that_belong_to_no_sample_are_ignored(tmp_path: Path) -> None:
    files = [
        ("README.txt", b"about"), ("__meta__.json", b"{}"), (".hidden.jpg", b"x"),
        ("LICENSE", b"x"), *shard(2), ("0001.seg.png", b"x"), ("index.json", b"[]"),
        ("0009.idx", b"x"),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", files), progress=False)
    assert names(source) == ["0000.jpg", "0001.jpg"]
    assert source.notes == ()


WRONG = {
    "no image": ([("bad.cls", b"1")], "expected one image, got none"),
    "no label": ([("bad.jpg", JPEG)], "expected a label in .cls, .json .* got none"),
    "no label in .json": (
        [("bad.jpg", JPEG), ("bad.json", b'{"width": 3}')], "expected a label .* got none in .json"
    ),
    "two images": (
        [("bad.cls", b"1"), ("bad.jpg", JPEG), ("bad.png", JPEG)],
        "expected one image, got 'bad.jpg' and 'bad.png'",
    ),
    "two labels": (
        [("bad.cls", b"1"), ("bad.cls", b"2"), ("bad.jpg", JPEG)], "one member .cls, got two"
    ),
    "duplicate key": ([("0000.cls", b"1"), ("0000.jpg", JPEG)], "got another .a duplicate"),
    "empty image": ([("bad.cls", b"1"), ("bad.jpg", b"")], "expected an image, got 0 bytes"),
    "no whole number": ([("bad.cls", b"1.5"), ("bad.jpg", JPEG)], r"whole number in .cls, got b'1"),
    "underscores": ([("bad.cls", b"1_0"), ("bad.jpg", JPEG)], "expected a whole number in .cls"),
    "negative": ([("bad.cls", b"-1"), ("bad.jpg", JPEG)], r"label in \[0, 100000\), got -1"),
    "too large": ([("bad.cls", b"100000"), ("bad.jpg", JPEG)], r"label in \[0, 100000\), got 1"),
    "a name": ([("bad.txt", b"cat"), ("bad.jpg", JPEG)], "expected a number as label, as before"),
    "caption": ([("bad.txt", b"c" * 201), ("bad.jpg", JPEG)], "class name of 1 to 200 printable"),
    "no UTF-8": ([("bad.txt", b"\xff\xfe"), ("bad.jpg", JPEG)], "expected UTF-8 in .txt"),
    "no JSON": ([("bad.json", b"{"), ("bad.jpg", JPEG)], "expected JSON in .json"),
    "deep JSON": ([("bad.json", b"[" * 100_000), ("bad.jpg", JPEG)], "expected JSON in .json"),
    "JSON without keys": ([("bad.json", b"5"), ("bad.jpg", JPEG)], "expected an object in .json"),
    "JSON with true": (
        [("bad.json", b'{"label": true}'), ("bad.jpg", JPEG)], "expected a number or a class name"
    ),
    "name that is no text": (
        [("bad.json", b'{"label": "\\ud800"}'), ("bad.jpg", JPEG)], "printable characters"
    ),
    "leads outside": (
        [("../../bad.cls", b"1"), ("../../bad.jpg", JPEG)], "expected a path inside the archive"
    ),
    "absolute": ([("/etc/bad.cls", b"1"), ("/etc/bad.jpg", JPEG)], "a path inside the archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_samples_are_refused_or_left_out(case: str, tmp_path: Path) -> None:
    files, message = WRONG[case]
    path = write_tar(tmp_path / "a.tar", [*shard(2), *files, *shard(2, first=2)])
    with pytest.raises(DataError, match=message) as raised:
        open_source(path, progress=False)
    assert str(path) in str(raised.value)
    assert "on_error='skip'" in str(raised.value)
    source = open_source(path, progress=False, on_error="skip")
    assert names(source) == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.jpg"]
    assert "left out 1 of 5" in source.notes[0]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    key = os.fsdecode(b"caf\xe9")
    path = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", JPEG), (f"{key}.cls", b"0")])
    assert names(open_source(path, progress=False)) == [f"{key}.jpg"]


def test_labels_that_no_sample_has_are_remarked_on(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.cls", b"9")])
    source = open_source(path, progress=False)
    assert len(source.index.classes) == 10
    assert "labels go up to 9, and 9 of them occur in no sample" in source.notes[0]


def test_truncated_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", shard(3))
    os.truncate(path, 4 * BLOCK + 7)
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=r"a\.tar: truncated: expected a header"):
            open_source(path, progress=False, on_error=on_error)


@pytest.mark.parametrize(
    ("mode", "command"), [("w:gz", "gzip -d"), ("w:bz2", "bzip2 -d"), ("w:xz", "xz -d")]
)
def test_compressed_shards_say_what_to_do(mode: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, mode) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(FileNotFoundError, match=rf"a\.tar: is compressed.*\({command}\)"):
        open_source(path, progress=False)
    path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"holds a\.tar\.gz, which is compressed"):
        open_source(tmp_path, progress=False)


def test_compressed_shard_among_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", shard(1))
    (tmp_path / "b.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(DataError, match=r"b\.tar: is compressed: decompress it first \(zstd -d\)"):
        open_source(tmp_path, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_shard_without_permission(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", shard(1)).chmod(0)
    with pytest.raises(OSError, match=r"Permission denied: '.*a\.tar'"):
        open_source(tmp_path, progress=False)
    write_tar(tmp_path / "b.tar", shard(1)).chmod(0)
    (tmp_path / "a.tar").chmod(0o600)
    with pytest.raises(PermissionError, match=r"b\.tar"):
        open_source(tmp_path, progress=False)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*a\.tar'"):
        open_source(tmp_path, progress=False)
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "a.jpg").write_bytes(JPEG)
    assert open_source(tmp_path, progress=False).kind == "imagefolder"


@pytest.mark.parametrize("content", [b"", bytes(10240), b"no tar at all" * 100])
def test_what_is_no_archive_of_images(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"a\.tar: (holds no images|is no tar archive)"):
        open_source(tmp_path / "a.tar", progress=False)


def test_visit_gets_the_samples_of_the_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*shard(3), ("bad.jpg", JPEG), *shard(3, first=3)])
    seen: list[tuple[int, str, bytes]] = []

    def visit(sample: Seen) -> None:
        seen.append((sample.sample, sample.name, bytes(sample.data)))

    source = find_source(path).open(Opening("skip", False, visit))
    assert seen == [(i, name, data) for i, (name, _, data) in enumerate(stored(source))]
    assert len(seen) == 6


# ---- class folders -------------------------------------------------------------------------------


def folders(*paths: str) -> list[tuple[str, bytes]]:
    return [(path, JPEG + path.encode()) for path in paths]


@pytest.mark.parametrize("above", ["", "train/", "data/imagenet/train/"])
def test_same_labels_as_the_folder_it_would_be_extracted_to(above: str, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    files = folders(
        f"{above}n02/b.JPEG", f"{above}n01/deep/c.png", f"{above}n02/a.JPEG", f"{above}n01/d.JPEG"
    )
    path = write_tar(tmp_path / "x.tar", [*files, (f"{above}n01/notes.md", b"x")])
    source = open_source(path, progress=False)
    assert source.kind == "tar"
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    theirs = ImageFolder(str(tmp_path / "out" / above))
    expected = {
        (os.path.relpath(name, tmp_path / "out"), theirs.classes[label], Path(name).read_bytes())
        for name, label in theirs.samples
    }
    assert source.index.classes == tuple(theirs.classes)
    assert set(stored(source)) == expected
    assert names(source) == [name for name, _ in files]


def test_archive_of_both_splits(tmp_path: Path) -> None:
    files = folders("x/train/n01/a.jpg", "x/train/n02/b.jpg", "x/val/n02/c.jpg", "x/val/n01/d.jpg")
    path = write_tar(tmp_path / "x.tar", files)
    os.utime(path, (1, 1))  # so that indexes are kept, one for each split
    assert names(open_source(path, "train", False)) == ["x/train/n01/a.jpg", "x/train/n02/b.jpg"]
    val = open_source(path, "val", False)
    assert [(name, wnid) for name, wnid, _ in stored(val)] == [
        ("x/val/n02/c.jpg", "n02"), ("x/val/n01/d.jpg", "n01"),
    ]  # fmt: skip
    with pytest.raises(SplitNeededError, match="holds train and val"):
        open_source(path, progress=False)


def test_one_archive_a_class(tmp_path: Path) -> None:
    for wnid in ("n01443537", "n01440764"):
        write_tar(tmp_path / f"{wnid}.tar", folders(f"{wnid}_1.JPEG", f"{wnid}_2.JPEG"))
    source = open_source(tmp_path, progress=False)
    assert source.index.classes == ("n01440764", "n01443537")
    assert names(source)[0] == "n01440764/n01440764_1.JPEG"
    assert all(wnid == name.partition("/")[0] for name, wnid, _ in stored(source))


def test_wrong_members_of_class_folders(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    good = folders("n01/a.jpg", "n02/b.jpg")
    for wrong, message in (
        (folders("n01/a.jpg"), "got another .a duplicate"),
        (folders("../n01/z.jpg"), "a path inside the archive"),
        (folders("z.jpg"), "an image in a class folder, got one outside"),
        ([("n01/z.jpg", b"")], "got 0 bytes"),
        ([of_type("n01/z.jpg", tarfile.SYMTYPE, "a.jpg")], "expected a file, got a symbolic link"),
    ):
        write_tar(path, [*good, *wrong])
        with pytest.raises(DataError, match=message):
            open_source(path, progress=False)
        source = open_source(path, progress=False, on_error="skip")
        assert names(source) == [name for name, _ in good]


def test_an_image_above_the_class_folders_does_not_make_one_class_of_all(tmp_path: Path) -> None:
    files = folders("train/n01/a.jpg", "train/n02/b.jpg", "train/logo.png")
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=r"in class folders alone, found some in train/ and in"):
        open_source(path, progress=False)
    path = write_tar(tmp_path / "y.tar", folders("train/n01/a.jpg"))
    assert open_source(path, progress=False).index.classes == ("n01",)


def test_images_without_labels_or_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", folders("a.jpg", "b.jpg"))
    with pytest.raises(FileNotFoundError, match=r"no images with labels .* or in class folders"):
        open_source(tmp_path, progress=False)


def test_archives_that_lie_extracted_beside_themselves(tmp_path: Path) -> None:
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "n01440764" / "a.JPEG").write_bytes(JPEG)
    write_tar(tmp_path / "n01440764.tar", folders("a.JPEG"))
    assert open_source(tmp_path, progress=False).kind == "imagefolder"


# ---- damage at random ----------------------------------------------------------------------------

SOUND = tar_bytes([*shard(3), (LONG, b"x"), ("é" * 60 + ".txt", b"y")], tarfile.PAX_FORMAT)


def check_opening(damaged: bytes) -> None:
    """Expect a DataError, or samples that lie where tarfile finds them, inside the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(damaged)
        try:
            source = open_source(path, progress=False, on_error="skip")
        except (DataError, FileNotFoundError):
            return
    index = source.index
    assert index.length is not None
    assert int((index.offset + index.length).max()) <= len(damaged)
    ours = zip(index.offset.tolist(), index.length.tolist(), strict=True)
    assert set(ours) <= {(member.offset, member.length) for member in by_tarfile(damaged)}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_any_flipped_bits(flips: Iterable[tuple[int, int]]) -> None:
    damaged = bytearray(SOUND)
    for position, bits in flips:
        damaged[position] ^= bits
    check_opening(bytes(damaged))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SOUND)))
def test_any_truncation(length: int) -> None:
    check_opening(SOUND[:length])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2),
    st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155)]),
    st.data(),
)
def test_any_field_with_a_right_checksum(
    member: int, field: tuple[int, int], data: st.DataObject
) -> None:
    begin, length = field
    value = data.draw(st.binary(min_size=length, max_size=length))
    check_opening(with_field(tar_bytes(shard(3)), begin, value, at=member * 2 * BLOCK))
