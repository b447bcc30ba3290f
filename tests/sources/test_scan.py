"""What sources share that must read data to index it: the stream, rows, problems, kept indexes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagenet_seq.errors import DataError
from imagenet_seq.index import cache as kept_index
from imagenet_seq.index.cache import FileStamps, OnError, Scanned, indexed
from imagenet_seq.index.column_file import read_columns, write_columns
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.sources import scan
from imagenet_seq.sources.scan import FileStream, Problems, Rows

OLD_NS = 1_600_000_000 * 10**9
PIECE = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes are kept that can't lie beside the data."""
    monkeypatch.delenv("IMAGENET_SEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "imagenet-seq"


# ---- FileStream ----------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_PIECE_BYTES", PIECE)


def file_of(folder: Path, size: int) -> tuple[str, bytes]:
    content = np.random.default_rng(0).bytes(size)
    (folder / "file").write_bytes(content)
    return str(folder / "file"), content


def scan_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "imagenet-seq-scan"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_returns_what_the_file_holds(tmp_path: Path, seed: int) -> None:
    path, content = file_of(tmp_path, 20_500)
    rng = np.random.default_rng(seed)
    with FileStream(path) as stream:
        assert stream.size == len(content)
        offset = 0
        while offset < len(content):
            length = int(min(rng.integers(0, 3500), len(content) - offset))
            assert stream.take(offset, length) == content[offset : offset + length]
            assert stream.take(offset, length // 2) == content[offset : offset + length // 2]
            offset += length + int(rng.integers(0, 4) == 0) * int(rng.integers(0, 5000))
        assert stream.take(len(content), 0) == b""
    assert not scan_threads()


@pytest.mark.usefixtures("small_pieces")
def test_what_was_taken_stays_valid_when_the_window_moves(tmp_path: Path) -> None:
    path, content = file_of(tmp_path, 10_000)
    with FileStream(path) as stream:
        parts = [stream.take(offset, 700) for offset in range(0, 9800, 700)]
    assert b"".join(parts) == content[:9800]


@pytest.mark.usefixtures("small_pieces")
def test_a_stream_does_not_go_back(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, 10_000)
    with FileStream(path) as stream:
        stream.take(5000, 10)
        with pytest.raises(ValueError, match="offset 0: what lies before 5000 is gone"):
            stream.take(0, 10)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [(0, 101, "expected 101 bytes at offset 0, but the file ends after 100"),
     (100, 1, "ends after 100"), (50, -1, "expected -1 bytes"), (10**15, 1, "ends after 100")],
)  # fmt: skip
def test_a_stream_names_what_lies_beyond_the_end(
    tmp_path: Path, offset: int, length: int, message: str
) -> None:
    path, _ = file_of(tmp_path, 100)
    with FileStream(path) as stream, pytest.raises(DataError, match=message):
        stream.take(offset, length)


def test_a_length_that_no_image_has_costs_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 42)
    with (
        FileStream(str(tmp_path / "sparse")) as stream,
        pytest.raises(DataError, match=r"expected at most 1073741824 bytes at once, got a length"),
    ):
        stream.take(0, 1 << 41)


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_shrinks_is_an_error_each_time(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, 100_000)
    with FileStream(path) as stream:
        os.truncate(path, 0)
        for _ in range(2):
            with pytest.raises(DataError, match=r"was cut short to \d+ bytes while it was read"):
                stream.take(90_000, 10_000)


class Faulty:
    """A file whose reads are short, and which fails after some."""

    def __init__(self, path: str, reads: int, error: Exception | None) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._reads, self._error = reads, error
        self.fileno, self.close = self._file.fileno, self._file.close

    def read(self, size: int) -> bytes:
        self._reads -= 1
        if self._reads < 0 and self._error is not None:
            raise self._error
        return self._file.read(min(size, 37)) or b""


def faulty(monkeypatch: pytest.MonkeyPatch, reads: int, error: Exception | None) -> None:
    monkeypatch.setattr(
        scan, "open", lambda path, *_, **__: Faulty(path, reads, error), raising=False
    )


def test_short_reads_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = file_of(tmp_path, 5000)
    faulty(monkeypatch, 10**9, None)
    with FileStream(path) as stream:
        assert stream.take(11, 4989) == content[11:]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_what_the_thread_raises_comes_out_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path, content = file_of(tmp_path, 5000)
    faulty(monkeypatch, 2, error)
    with FileStream(path) as stream:
        assert stream.take(0, 74) == content[:74]
        for _ in range(2):
            with pytest.raises(type(error), match=r"Input/output|no memory"):
                stream.take(70, 10)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, DataError])
def test_an_exception_ends_the_thread(tmp_path: Path, raised: type[BaseException]) -> None:
    path, _ = file_of(tmp_path, 100_000)  # more than the queue takes: the thread waits for room

    def parse() -> None:
        with FileStream(path) as stream:
            stream.take(0, 10)
            raise raised

    with pytest.raises(raised):
        parse()
    assert not scan_threads()


@pytest.mark.usefixtures("small_pieces")
def test_a_digest_gets_every_byte_and_a_bar_moves(tmp_path: Path) -> None:
    path, content = file_of(tmp_path, 10_500)

    class Bar:
        moved = 0

        def update(self, num_bytes: int) -> None:
            self.moved += num_bytes

    digest, bar = hashlib.md5(), Bar()
    with FileStream(path, bar, digest) as stream:
        stream.take(3000, 5)
        stream.finish()
    assert digest.digest() == hashlib.md5(content).digest()
    assert bar.moved == len(content)


def test_a_missing_file_is_an_error_without_a_thread(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileStream(str(tmp_path / "none"))
    assert not scan_threads()


# ---- Rows, Problems ------------------------------------------------------------------------------


def test_rows_become_an_index() -> None:
    rows = Rows()
    assert [rows.add("a/ü.jpg", 0, 512, 100, 1), rows.add("b.jpg", 1, 0, 7)] == [0, 1]
    index = rows.index("/data", ["x.tar", "y.tar"], ("p", "q"))
    assert len(rows) == len(index) == 2
    assert (list(index.name), list(index.files)) == (["a/ü.jpg", "b.jpg"], ["x.tar", "y.tar"])
    assert (list(index.file), list(index.offset)) == ([0, 1], [512, 0])
    assert index.length is not None
    assert (list(index.length), list(index.targets)) == ([100, 7], [1, -1])
    relabelled = rows.index("/data", ["x", "y"], ("p", "q"), np.array([0, 0], np.int32))
    assert list(relabelled.targets) == [0, 0]


def test_rows_refuse_what_no_index_can_hold() -> None:
    rows = Rows()
    with pytest.raises(DataError, match=r"/data: x\.tar: expected images, found none"):
        rows.index("/data", ["x.tar"], ())
    rows.add("good", 0, 0, 1, 0)
    with pytest.raises(DataError, match=r"file 0 offset 5: expected a name .* label of 32 bits"):
        rows.add("bad", 0, 5, 1, 1 << 40)
    with pytest.raises(DataError, match="expected a name of valid characters"):
        rows.add("\ud800", 0, 5, 1, 0)
    assert list(rows.index("/data", ["x"], ("p",)).name) == ["good"]  # nothing was added by halves
    rows.add("third", 0, 6, 1, 3)
    with pytest.raises(DataError, match=r"sample 1 \(third\): expected a label in \[0, 2\), got 3"):
        rows.index("/data", ["x"], ("p", "q"))


def test_problems_are_raised_or_counted() -> None:
    with pytest.raises(DataError, match=r"x\.tar: bad\. Repair it.*on_error='skip'"):
        Problems("fail").report("x.tar: bad")
    problems = Problems("skip")
    for number in range(50):
        problems.report(f"bad {number}")
    assert problems.count == 50
    assert problems.messages == [f"bad {number}" for number in range(Problems.SHOWN)]
    (note,) = Scanned(index_of(10), problems=problems.messages, num_problems=problems.count).notes
    assert note.startswith("/data: left out 50 of 60:\n  bad 0\n  bad 1\n")
    assert note.endswith("\n  and 30 more")


# ---- is_permuted ---------------------------------------------------------------------------------


def index_of(size: int, label: Iterable[int] | None = None, files: int = 1) -> Index:
    per_file = -(-size // files)
    return Index(
        file=np.arange(size) // per_file,
        offset=np.arange(size) % per_file * 1000,
        name=Names.from_strings(map(str, range(size))),
        root="/data",
        files=Names.from_strings(f"{number}.tar" for number in range(files)),
        classes=tuple(map(str, range(1000))),
        length=np.full(size, 1000),
        label=None if label is None else np.fromiter(label, np.int32),
    )


def shuffled(size: int, num_classes: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).permutation(np.arange(size) % num_classes)


def test_a_random_order_is_told_by_labels() -> None:
    for seed in range(20):
        assert is_permuted(index_of(50_000, shuffled(50_000, 1000, seed)))
        assert is_permuted(index_of(1200, shuffled(1200, 10, seed)))


@pytest.mark.parametrize(
    "label",
    [
        np.sort(shuffled(20_000, 1000)),
        np.arange(20_000) % 1000,  # dealt in turn
        shuffled(999, 10),  # too few
        np.zeros(20_000, np.int32),
        np.where(np.arange(20_000) == 7, -1, shuffled(20_000, 100)),  # one without a label
        # mixed in itself, but one half of the classes in the first half of the data:
        np.concatenate([shuffled(25_000, 500), 500 + shuffled(25_000, 500, 1)]),
        np.concatenate([shuffled(1000, 500), 500 + shuffled(1000, 500, 1)]),
        # shards that are mixed, of ten classes each:
        np.concatenate([10 * shard + shuffled(1000, 10, shard) for shard in range(20)]),
    ],
)
def test_what_is_not_known_to_be_random_is_not(label: Any) -> None:
    assert not is_permuted(index_of(len(label), label, files=4))


def test_the_order_on_disk_counts_not_that_of_the_index() -> None:
    by_class = index_of(20_000, np.sort(shuffled(20_000, 1000)))
    assert not is_permuted(by_class.take(np.random.default_rng(0).permutation(20_000)))
    assert not is_permuted(index_of(2000))


def notes_on(labels: list[int], classes: tuple[str, ...]) -> tuple[str, ...]:
    rows = Rows()
    for number, label in enumerate(labels):
        rows.add(f"{number}.jpg", 0, number, 1, label)
    return Scanned(rows.index("root", ["a"], classes)).notes


def test_labels_that_are_not_torchvisions_are_told() -> None:
    assert "count from 1" in notes_on([1, 2], ("0", "1", "2"))[0]
    assert notes_on([0, 2], ("0", "1", "2")) == notes_on([1, 2], ("a", "b", "c")) == ()
    assert notes_on([1], ("0", "1")) == notes_on([1, 3], ("0", "1", "2", "3")) == ()
    assert "another order than torchvision" in notes_on([0], ("n00000002", "n00000001"))[0]
    assert notes_on([0], ("n00000001", "n00000002")) == notes_on([0], ("b", "a")) == ()


# ---- a kept index --------------------------------------------------------------------------------


class Data:
    """Two files, and a scan of them that counts how often it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scans = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "a.tar", folder / "b.tar"]
        for file in self.files:
            if not file.exists():
                file.write_bytes(b"12345")
                os.utime(file, ns=(OLD_NS, OLD_NS))
        self.during: Callable[[], None] = lambda: None

    @property
    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.files]

    def scan(self, on_error: OnError = "fail") -> Scanned:
        self.scans += 1
        problems, rows = Problems(on_error), Rows()
        for number, size in enumerate(self.sizes):
            rows.add(f"{number}.jpg", number, 0, size, 0)
        self.during()
        if max(self.sizes) > 100:
            problems.report(f"{self.files[0]}: too large")
        index = rows.index(str(self.folder), ["a.tar", "b.tar"], ("x",))
        extra = {"twice": 2 * np.array(self.sizes, np.int64)}
        return Scanned(index, extra, problems.messages, problems.count, ("a remark",))

    def open(self, on_error: OnError = "fail") -> Scanned:
        files = [str(file) for file in self.files]
        return indexed("test", files[0], files, lambda: self.scan(on_error), on_error)

    @property
    def kept(self) -> list[Path]:
        return list(self.folder.glob(".imagenet-seq-test-*.index"))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


def test_an_index_is_kept_beside_the_data_and_moves_with_it(data: Data, tmp_path: Path) -> None:
    first = data.open()
    assert (data.scans, len(data.kept)) == (1, 1)
    again = data.open()
    assert data.scans == 1
    assert again.index.id == first.index.id
    assert list(again.index.samples) == list(first.index.samples)
    assert (list(again.extra["twice"]), again.notes) == ([10, 10], ("a remark",))
    data.folder.rename(tmp_path / "moved")
    moved = Data(tmp_path / "moved")
    assert moved.open().index.samples[0] == (str(tmp_path / "moved" / "0.jpg"), 0)
    assert moved.open().index.root == str(tmp_path / "moved")
    assert moved.scans == 0


def test_two_kinds_and_two_sources_have_files_of_their_own(data: Data) -> None:
    data.open()
    files = [str(file) for file in data.files]
    indexed("other", files[0], files, data.scan, "fail")
    indexed("test", files[1], files[1:], data.scan, "fail")
    assert data.scans == 3
    assert len(list(data.folder.glob(".imagenet-seq-*.index"))) == 3


def test_an_index_is_kept_in_the_cache_where_the_data_is_read_only(
    data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_columns

    def refuse(path: str, *columns: Any) -> None:
        if os.path.dirname(path) == str(data.folder):
            raise OSError(30, "Read-only file system", path)
        write(path, *columns)

    monkeypatch.setattr(kept_index, "write_columns", refuse)
    data.open()
    data.open()
    assert (data.scans, data.kept, len(list(cache.glob("test-*.index")))) == (1, [], 1)


def test_an_index_is_kept_where_the_user_says(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "chosen"))
    data.open()
    data.open()
    assert (data.scans, data.kept) == (1, [])
    assert len(list((tmp_path / "chosen").glob("test-*.index"))) == 1


def test_where_nothing_can_be_written_it_is_made_each_time(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data.folder / "file").touch()
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(data.folder / "file" / "no_folder"))
    assert len(data.open().index) == len(data.open().index) == 2
    assert data.scans == 2


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_changed_file_is_noticed(data: Data, change: str) -> None:
    data.open()
    file = data.files[1]
    if change == "size":
        file.write_bytes(b"123")
        os.utime(file, ns=(OLD_NS, OLD_NS))
    elif change == "time":
        os.utime(file, ns=(OLD_NS, OLD_NS + 1))
    else:
        file.unlink()
        with pytest.raises(FileNotFoundError):
            data.open()
        return
    assert data.open().index.length is not None
    assert data.scans == 2
    assert list(data.open().extra["twice"]) == [2 * size for size in data.sizes]
    assert data.scans == 2


def test_a_file_that_changes_meanwhile_is_refused(data: Data) -> None:
    data.during = lambda: data.files[0].write_bytes(b"something else")  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"a\.tar: changed while .* was indexed: wait until"):
        data.open()
    assert not data.kept
    data.during = lambda: None
    data.open()


def test_after_a_long_scan_the_user_is_told_why_the_index_was_not_cached(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_index, "_LONG_SCAN_NS", 0)
    (data.folder / "file").touch()
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(data.folder / "file" / "no_folder"))
    assert "set IMAGENET_SEQ_CACHE" in data.open().notes[-1]
    monkeypatch.delenv("IMAGENET_SEQ_CACHE")
    os.utime(data.files[0], ns=(OLD_NS, time.time_ns() + 10**12))
    assert "has a modification time in the future" in data.open().notes[-1]
    os.utime(data.files[0], ns=(OLD_NS, OLD_NS))
    assert data.open().notes == ("a remark",)


def test_a_file_changed_just_now_proves_nothing(data: Data) -> None:
    data.files[0].write_bytes(b"new")
    data.open()
    data.open()
    assert (data.scans, data.kept) == (2, [])


def test_folders_are_known_by_their_time_alone(data: Data) -> None:
    (data.folder / "sub").mkdir()
    os.utime(data.folder / "sub", ns=(OLD_NS, OLD_NS))
    stamps = FileStamps.of([str(data.folder / "sub")], str(data.files[0]))
    assert list(stamps.size) == [-1]
    assert stamps.first_changed(str(data.files[0])) is None
    (data.folder / "sub" / "new").touch()
    assert stamps.first_changed(str(data.files[0])) == str(data.folder / "sub")


def test_what_should_not_last_is_not_kept(data: Data) -> None:
    files = [str(file) for file in data.files]
    scanned = data.scan()
    brief = Scanned(scanned.index, lasting=False)
    indexed("test", files[0], files, lambda: brief, "fail")
    assert not data.kept


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int32, np.int64])
def test_columns_of_a_source_are_kept(data: Data, dtype: type) -> None:
    files = [str(file) for file in data.files]
    scanned = Scanned(data.scan().index, {"extra": np.array([7, 100], dtype)})
    for _ in range(2):
        found = indexed("test", files[0], files, lambda: scanned, "fail").extra["extra"]
        assert (list(found), found.dtype) == ([7, 100], dtype)


def test_columns_that_could_not_be_read_again_are_refused() -> None:
    with pytest.raises(TypeError, match="extra column 'x': can't be cached as int8"):
        Scanned(index_of(2), {"x": np.zeros(2, np.int8)})


def test_an_interrupt_leaves_nothing_behind(data: Data, cache: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    data.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        data.open()
    assert sorted(data.folder.iterdir()) == data.files
    assert not list(cache.glob("*.index"))
    data.during = lambda: None
    assert len(data.open().index) == 2  # and the lock is free


def test_skipping_then_failing_names_the_first_problem(data: Data) -> None:
    data.files[0].write_bytes(bytes(200))
    os.utime(data.files[0], ns=(OLD_NS, OLD_NS))
    with pytest.raises(DataError, match="too large"):
        data.open()
    assert not data.kept
    for _ in range(2):
        assert "left out 1 of 3:\n" in data.open("skip").notes[1]
    assert data.scans == 2
    with pytest.raises(DataError, match=r"a\.tar: too large\. Repair it, or leave"):
        data.open()
    assert data.scans == 2


def test_a_damaged_index_is_made_anew(data: Data) -> None:
    data.open()
    (kept,) = data.kept
    whole = kept.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"x" * len(whole)):
        kept.write_bytes(damaged)
        assert len(data.open().index) == 2
        assert kept.read_bytes() == whole
    assert data.scans == 5


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": None},
        {"root": 7},
        {"said": []},
        {"said": {"problems": [], "num_problems": 1, "remarks": []}},
        {"said": {"problems": [], "num_problems": float("inf"), "remarks": []}},
        {"said": {"problems": [], "num_problems": 0, "remarks": 3}},
    ],
)
def test_an_index_that_says_something_strange_is_made_anew(
    data: Data, change: dict[str, Any]
) -> None:
    data.open()
    (kept,) = data.kept
    header, columns = read_columns(kept)
    write_columns(kept, header, columns)
    data.open()
    assert data.scans == 1
    write_columns(kept, {**header, **change}, columns)
    assert data.open().notes == ("a remark",)
    assert data.scans == 2


def test_two_processes_at_once_scan_once(data: Data) -> None:
    code = (
        "import fcntl, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from test_scan import Data\n"
        "data = Data(Path(sys.argv[2]))\n"
        "def during():\n"
        "    (data.folder / 'scanning').touch()\n"
        "    while not (data.folder / 'go_on').exists(): time.sleep(0.01)\n"
        "data.during = during\n"
        "flock = fcntl.flock\n"
        "def noted_flock(*arguments):\n"
        "    (data.folder / sys.argv[3]).touch()\n"
        "    flock(*arguments)\n"
        "fcntl.flock = noted_flock\n"
        "print(len(data.open().index), data.scans)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(data.folder)]
    processes = [
        subprocess.Popen([*arguments, name], stdout=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    # Both have asked for the lock, and one scans.
    while not all((data.folder / name).exists() for name in ("first", "second", "scanning")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (data.folder / "go_on").touch()
    results = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert results == ["2 0\n", "2 1\n"]
    assert len(data.kept) == 1
