"""Sizes and durations in words, and back; progress bars."""

from __future__ import annotations

import pytest

from imagenet_seq.text import format_bytes, format_seconds, parse_bytes, progress_bar


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("48GB", 48 * 10**9),
        (" 48 gb ", 48 * 10**9),
        ("48G", 48 * 10**9),
        ("1.5GiB", 3 << 29),
        ("512MI", 512 << 20),
        ("64kB", 64_000),
        ("2T", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        ("0", 0),
        ("0.5", 0.5),
    ],
)
def test_sizes_are_read(text: str, num_bytes: float) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "48XB", "48iB", "-1GB", "1e9", "5%", "nan", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 1GB or 512MiB, got"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (48_900, "48.9 KB"),
        (999_949, "999.9 KB"),
        (999_951, "1.0 MB"),
        (146_200_000_000, "146.2 GB"),
        (3.5e15, "3500.0 TB"),
    ],
)
def test_sizes_are_written(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.2, "4.2 s"), (60, "1.0 min"), (5399, "90.0 min"), (7560, "2.1 h")],
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_progress_bar_counts_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("index", 10, unit="file", done=4) as bar:
        bar.update(6)
    assert "index: 100%" in capsys.readouterr().err
    with progress_bar("index", 10, enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
