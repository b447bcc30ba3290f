"""The model of a disk that logs of packing are replayed on, against sums made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MB = 10**6
TURN_S = 60 / 7200 / 2


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import replay

    return replay


def request(operation: str, file: str, offset: int, size: int, **place: int) -> dict[str, Any]:
    line = {"pass": "deal", "op": operation, "file": file, "offset": offset, "bytes": size}
    return {**line, **place}


def source_read(file: str, size: int, address: int = -1, inode: int = 0) -> dict[str, Any]:
    return request("read", file, 0, size, address=address, inode=inode)


def test_seeks_are_those_of_the_data_sheet(replay: Any) -> None:
    def seek_ms(distance: float) -> float:
        head = replay.Head(stretch=1)
        head.transfer(int(distance), 0)
        return float(1e3 * (head.move_s - TURN_S - replay.COMMAND_S))

    capacity = replay.CAPACITY_BYTES
    assert seek_ms(capacity) == pytest.approx(16)
    assert seek_ms(2 << 20) == pytest.approx(1, abs=0.02)
    # Distances between random places have the density 2 (1 - x).
    places = [(i + 0.5) / 1000 for i in range(1000)]
    average = sum(2 * (1 - x) * seek_ms(x * capacity) for x in places) / 1000
    assert average == pytest.approx(8.5, abs=0.01)


def test_stretch_widens_seeks_and_nothing_else(replay: Any) -> None:
    near, far = replay.Head(stretch=1), replay.Head(stretch=100)
    for head in (near, far):
        head.transfer(0, MB)
        head.transfer(2 * MB, MB)  # within what the head passes over
        assert head.seconds == pytest.approx(3 * MB / 180e6)
    near.transfer(10**11, 0)
    far.transfer(10**9 + 3 * MB - 3 * MB // 100, 0)
    assert near.move_s == pytest.approx(far.move_s, rel=1e-6)


def test_going_back_is_a_move(replay: Any) -> None:
    head = replay.Head(stretch=1)
    head.transfer(0, MB)
    head.transfer(0, MB)
    assert head.num_moves == 1


@pytest.mark.parametrize("known", [True, False], ids=["addresses", "inodes"])
def test_a_source_in_order_costs_its_bytes_alone(replay: Any, known: bool) -> None:
    def run(order: list[int]) -> Any:
        place = "address" if known else "inode"
        lines = [source_read(f"{i}", 4096 * 300, **{place: 10 * i}) for i in order]
        return replay.replay(lines).passes["deal"]

    in_order = run(list(range(9)))
    assert in_order.seconds == pytest.approx(9 * 4096 * 300 / 180e6)
    backwards = run(list(range(9))[::-1])
    assert backwards.source.num_moves == 9
    assert backwards.bound_s == in_order.bound_s == in_order.seconds


def test_a_file_lies_in_one_piece_only_if_room_was_reserved(replay: Any) -> None:
    piece = 2 * MB

    def moves_to_read(*reserved: dict[str, Any]) -> int:
        writes = [request("write", f, at, piece) for at in (0, piece) for f in ("a", "b")]
        reads = [{**request("read", f, 0, 2 * piece), "pass": "finish"} for f in ("a", "b")]
        finish = replay.replay([*reserved, *writes, *reads]).passes["finish"]
        assert finish.source.num_bytes == 4 * piece
        return int(finish.source.num_moves)

    assert moves_to_read(*(request("reserve", f, 0, 2 * piece) for f in ("a", "b"))) == 1
    assert moves_to_read() == 4


def test_room_is_counted_until_files_are_deleted(replay: Any) -> None:
    lines = [source_read("s", 8192)]
    for shard in range(3):
        lines += [request("reserve", f"deal{shard}", 0, 4096), request("delete", "deal0", 0, 0)]
    done = replay.replay(lines)
    assert (done.source_bytes, done.peak_bytes) == (8192, 8192)


def test_two_disks_work_at_the_same_time(replay: Any) -> None:
    lines = [source_read("s", 1000 * 4096), request("write", "d", 0, 3000 * 4096)]
    lines += [source_read("t", 1000 * 4096, inode=1)]
    one = replay.replay(lines).passes["deal"]
    two = replay.replay(lines, two_disks=True).passes["deal"]
    assert one.source.num_moves == 2  # to the scratch, which begins behind the source, and back
    assert one.seconds > 5000 * 4096 / 180e6
    assert two.seconds == two.bound_s == pytest.approx(3000 * 4096 / 180e6)


def test_a_packing_stays_near_the_bound(
    make_folder: Callable[..., Path], replay: Any, tmp_path: Path
) -> None:
    source = make_folder(60, num_classes=4) / "train"
    log = tmp_path / "log"
    settings = Settings(shard_bytes=100_000)
    pack_dataset(source, tmp_path / "pack", settings=settings, progress=False, io_log=log)
    done = replay.replay(replay.read_log(str(log)))
    assert list(done.passes) == ["choose tables", "deal", "finish"]
    assert done.source_bytes == sum(path.stat().st_size for path in source.rglob("*.jpg"))
    deal, shards = done.passes["deal"], len(list((tmp_path / "pack").glob("*.tar")))
    # To the scratch once, as all of it fits in memory; the rest of the pass is in order.
    assert deal.source.num_moves <= 2
    # To each shard's scratch, to the shard, to its rows.
    assert done.passes["finish"].source.num_moves <= 3 * shards
    printed = subprocess.run(
        [sys.executable, str(BENCHMARKS / "replay.py"), str(log), "--stretch", "9", "--two-disks"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "ratio" in printed.splitlines()[0]
    assert printed.splitlines()[-1].startswith("for 140 GB: ")


def test_a_torn_log_is_named(replay: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps(source_read("s", 1)) + '\n{"pass": "de')
    with pytest.raises(SystemExit, match=r"log line 2: expected a JSON object"):
        list(replay.read_log(str(log)))
