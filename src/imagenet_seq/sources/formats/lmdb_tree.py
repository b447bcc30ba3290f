"""The pages of an LMDB file: their layout, and a reader that finds all keys and values."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from imagenet_seq.errors import DataError
from imagenet_seq.sources.scan import bytes_bar

MAGIC = 0xBEEFC0DE
VERSION = 1

NO_PAGE = 0xFFFFFFFFFFFFFFFF
"""Root of an empty tree."""

PAGE_HEADER = struct.Struct("<QHHHH")
"""Page number, pad, flags; in a branch or leaf, where its free space begins and ends."""

OVERFLOW_HEADER = struct.Struct("<QHHI")
"""Page number, pad, flags, number of pages in the run."""

BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
"""Flags of pages."""

NODE = struct.Struct("<HHHH")
"""Low and high half of the value's size, flags, size of the key; key and value follow. In a branch,
the first three are the child's page number, low bits first."""

IN_OVERFLOW, SUB_DATABASE = 1, 2
"""Flags of nodes. IN_OVERFLOW: the value is the number of its first overflow page."""

META_HEAD = struct.Struct("<IIQQ")
"""Magic, version, address and size of the map."""

TREE = struct.Struct("<IHHQQQQQ")
"""For the free list, then for the data: pad (for the free list: the page size), flags, depth,
numbers of branch, leaf and overflow pages and of entries, root."""

META_TAIL = struct.Struct("<QQ")
"""Last page used, and number of the transaction; the meta page with the higher one is valid."""

META_BYTES = PAGE_HEADER.size + META_HEAD.size + 2 * TREE.size + META_TAIL.size

KEYS = b"__keys__"
"""Key of tensorpack's list of keys; sorts behind them."""

_MAX_DEPTH = 32
"""LMDB's own limit (CURSOR_STACK)."""


def why_none(head: bytes) -> str | None:
    """Return why a file that begins with `head` is no LMDB that can be read, or None if it is."""
    if len(head) < META_BYTES:
        return f"which is no LMDB: it has {len(head)} bytes"
    magic, version, *_ = META_HEAD.unpack_from(head, PAGE_HEADER.size)
    if magic != MAGIC:
        return (
            f"which is no LMDB of a 64-bit little-endian machine: expected {MAGIC:#x} at "
            f"byte {PAGE_HEADER.size}, got {magic:#x}"
        )
    if version != VERSION:
        return f"an LMDB of data version {version}; expected {VERSION} (LMDB 0.9)"
    return None


# ---- the tree ------------------------------------------------------------------------------------


class Meta(NamedTuple):
    """The content of a meta page."""

    page_bytes: int
    flags: int  # of the database
    depth: int  # levels of the tree
    num_values: int
    root: int  # number of the root page
    last_page: int  # the last one used
    transaction: int


class Values:
    """Keys and places of values, in the order of the tree's leaves in the file."""

    def __init__(self) -> None:
        self._keys, self._begin = bytearray(), array("q", [0])
        self.offset, self.length = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.offset)

    def add(self, key: bytes, offset: int, length: int) -> None:
        """Add a key, and the offset and length of its value."""
        self._keys += key
        self._begin.append(len(self._keys))
        self.offset.append(offset)
        self.length.append(length)

    def key(self, i: int) -> bytes:
        """Return a key."""
        return bytes(self._keys[self._begin[i] : self._begin[i + 1]])


class _Child(NamedTuple):
    """A page of the tree: its number, and bounds of its keys."""

    number: int
    low: bytes
    high: bytes | None


class Tree:
    """Reads the pages of an LMDB file, level by level, each level in the order of the file."""

    def __init__(self, path: str, file: int, meta: Meta) -> None:
        self.path, self.meta, self._file = path, meta, file
        self._seen: set[int] = set()

    def values(self, progress: bool) -> Values:
        """Return all keys and the places of their values; refuse more than keys and values."""
        meta, found = self.meta, Values()
        if meta.flags:
            raise DataError(
                f"{self.path}: expected an LMDB of plain keys with one value each, got flags "
                f"{meta.flags:#x} (DUPSORT, INTEGERKEY or the like)"
            )
        if meta.depth > _MAX_DEPTH:
            raise DataError(f"{self.path}: expected a tree of up to 32 levels, got {meta.depth}")
        pages = [_Child(meta.root, b"", None)] if meta.root != NO_PAGE else []
        for _ in range(meta.depth - 1):
            pages = [child for page in pages for child in self._children(page)]
            pages.sort(key=lambda page: page.number)  # the order of the file
        name, num_bytes = os.path.basename(self.path), len(pages) * meta.page_bytes
        with bytes_bar(f"keys of {name}", num_bytes, progress) as bar:
            for page in pages:
                self._add_leaf(page, found)
                bar.update(meta.page_bytes)
        if len(found) != meta.num_values:
            what = f"{meta.num_values} keys as its meta page says"
            raise DataError(f"{self.path}: expected {what}, found {len(found)}: it is damaged")
        return found

    def _children(self, page: _Child) -> Iterator[_Child]:
        content, places = self._page(page.number, BRANCH)
        keys: list[bytes] = []
        numbers: list[int] = []
        for place in places:
            low, middle, high, key_bytes = self._node(content, place, page.number)
            keys.append(content[place + NODE.size :][:key_bytes])
            numbers.append(low | middle << 16 | high << 32)
        # LMDB ignores the first key of a branch.
        highs: list[bytes | None] = [*keys[1:], page.high]
        return map(_Child, numbers, [page.low, *keys[1:]], highs)

    def _add_leaf(self, page: _Child, found: Values) -> None:
        content, places = self._page(page.number, LEAF)
        last = None
        for place in places:
            low, high, flags, key_bytes = self._node(content, place, page.number)
            begin = place + NODE.size + key_bytes
            key = content[begin - key_bytes : begin]
            in_order = page.low <= key if last is None else last < key
            if not in_order or (page.high is not None and key >= page.high):
                raise self._damaged(page.number, f"key {key!r} is not where it belongs")
            last = key
            length = low | high << 16
            if flags == IN_OVERFLOW and begin + 8 <= len(content):
                number = int.from_bytes(content[begin : begin + 8], "little")
                if not 2 <= number <= self.meta.last_page:
                    raise self._damaged(page.number, f"the value of {key!r} is in page {number}")
                found.add(key, number * len(content) + PAGE_HEADER.size, length)
            elif flags == 0 and begin + length <= len(content):
                found.add(key, page.number * len(content) + begin, length)
            else:
                raise self._refused(page.number, key, flags)

    def _refused(self, page: int, key: bytes, flags: int) -> DataError:
        if flags & SUB_DATABASE:
            return DataError(
                f"{self.path}: holds the named database {key!r}; expected keys and values in the "
                "main one, as tensorpack writes them: copy that database into a file of its own"
            )
        return self._damaged(page, f"key {key!r} has flags {flags:#x} or ends behind the page")

    def _node(self, content: bytes, place: int, page: int) -> tuple[int, int, int, int]:
        if not PAGE_HEADER.size <= place <= len(content) - NODE.size:
            raise self._damaged(page, f"a node at byte {place}")
        node: tuple[int, int, int, int] = NODE.unpack_from(content, place)
        if place + NODE.size + node[3] > len(content):
            raise self._damaged(page, f"a key of {node[3]} bytes at byte {place}")
        return node

    def _page(self, number: int, expected: int) -> tuple[bytes, tuple[int, ...]]:
        """Read a page of the expected kind; return it, and the places of its nodes."""
        if not 2 <= number <= self.meta.last_page:
            what = f"a page number from 2 to {self.meta.last_page}"
            raise DataError(f"{self.path}: expected {what}, got {number}: it is damaged")
        if number in self._seen:
            raise self._damaged(number, "two pages lead to it")
        self._seen.add(number)
        page_bytes = self.meta.page_bytes
        content = os.pread(self._file, page_bytes, number * page_bytes)
        if len(content) != page_bytes:
            raise self._damaged(number, "the file ends before it: it is truncated")
        own_number, _, flags, lower, _ = PAGE_HEADER.unpack_from(content)
        if own_number != number or flags != expected:
            wanted = f"its number and {expected} (branch {BRANCH}, leaf {LEAF})"
            raise self._damaged(number, f"expected {wanted}, got {own_number} and {flags:#x}")
        size = lower - PAGE_HEADER.size
        if size <= 0 or size % 2 or lower > page_bytes:
            raise self._damaged(number, f"a table of {size} bytes")
        return content, struct.unpack_from(f"<{size // 2}H", content, PAGE_HEADER.size)

    def _damaged(self, page: int, what: str) -> DataError:
        offset = page * self.meta.page_bytes
        return DataError(
            f"{self.path}: page {page} (offset {offset}): {what}: the file is damaged, or another "
            "process writes to it: run mdb_stat on it, and copy or write it again"
        )


def newer_meta(path: str, file: int) -> Meta:
    """Return the valid one of the two meta pages."""
    found = [_meta(os.pread(file, META_BYTES, 0))]
    page_bytes = found[0].page_bytes if found[0] else 0
    if page_bytes not in (1 << bits for bits in range(9, 17)):
        what = "an LMDB with pages of 512 to 65536 bytes"
        raise DataError(f"{path}: expected {what}, got {page_bytes}")
    second = _meta(os.pread(file, META_BYTES, page_bytes))
    if second is not None and second.page_bytes == page_bytes:
        found.append(second)
    # Like LMDB: the second one only if it is newer.
    return max((meta for meta in found if meta), key=lambda meta: meta.transaction)


def _meta(head: bytes) -> Meta | None:
    if why_none(head) or PAGE_HEADER.unpack_from(head)[2] & META == 0:
        return None
    free_at = PAGE_HEADER.size + META_HEAD.size
    page_bytes = TREE.unpack_from(head, free_at)[0]
    _, flags, depth, *_, num_values, root = TREE.unpack_from(head, free_at + TREE.size)
    last_page, transaction = META_TAIL.unpack_from(head, free_at + 2 * TREE.size)
    return Meta(page_bytes, flags, depth, num_values, root, last_page, transaction)
