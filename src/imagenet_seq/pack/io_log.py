"""Log of the read and write requests of a run, in order, for benchmarks/replay.py."""

from __future__ import annotations

import json
from typing import Literal, TextIO

Operation = Literal["read", "write", "reserve", "delete"]


class IoLog:
    """Appends requests to a file as JSON, which docs/packing.md describes. Not thread-safe."""

    def __init__(self, path: str | None = None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            self._file = open(path, "a", encoding="ascii")  # noqa: SIM115  # closed by __exit__
        self._pass = ""

    def begin_pass(self, name: str) -> None:
        """Set the pass that the following requests belong to."""
        self._pass = name

    def note(self, operation: Operation, file: str, offset: int, size: int, **place: int) -> None:
        """Log a request of `size` bytes; `place` is `address` and `inode` of a source's file."""
        if self._file is None:
            return
        what = {"pass": self._pass, "op": operation, "file": file}
        self._file.write(json.dumps({**what, "offset": offset, "bytes": size, **place}) + "\n")

    def __enter__(self) -> IoLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


NO_LOG = IoLog()
