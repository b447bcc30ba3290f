"""Write LMDB files sequentially, with the values that the original project's tensorpack expects.

The format is that of LMDB 0.9 (`struct MDB_page`, `MDB_node`, `MDB_db` and `MDB_meta` in its
mdb.c), data version 1, on a 64-bit little-endian machine. A file consists of pages. Pages 0 and 1
are meta pages, the newer of which is valid. From its root, branch pages lead to leaf pages; a value
that doesn't fit in a leaf lies in a contiguous run of overflow pages.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import PackError
from imagenet_seq.pack.claim import LMDB_FILE
from imagenet_seq.pack.plan import PackPlan
from imagenet_seq.pack.shards import Packer, Summary
from imagenet_seq.pack.task import RunOptions
from imagenet_seq.sources.formats import lmdb_tree
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.lmdb_tree import NO_PAGE, NODE, PAGE_HEADER

_PAGE_BYTES = 4096
_MAX_KEY_BYTES = 511
_MAX_VALUE_BYTES = 0xFFFFFFFF
_MAX_NODE_BYTES = ((_PAGE_BYTES - PAGE_HEADER.size) // 2 & -2) - 2
"""The value of a larger node goes to overflow pages, so that a page holds at least two keys: half a
page less the node's entry in the table, as in LMDB."""


class LmdbWriter:
    """Writes an LMDB file of ascending keys from front to back, without a map, lock or hole.

    The same appends give the same bytes. Values lie in the order of the appends, and leaf and
    branch pages together behind them, so that listing the keys reads one place. (Leaves with short
    values lie among the values, because `append` returns a value's offset at once.) LMDB refuses
    the file until `close` has completed it, so also after an exception in the `with` block.

        with LmdbWriter("ILSVRC-train.lmdb") as file:
            file.append(b"00000000", tensorpack_value(jpeg, label))

    An existing file is overwritten.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by close)
        self._file.write(bytes(2 * _PAGE_BYTES))
        self._num_pages = 2
        self._num_overflow_pages = self._num_values = 0
        self._last_key = b""
        self._leaf = _Page(lmdb_tree.LEAF)
        self._leaves: list[tuple[bytes, _Page]] = []  # first key, page

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def append(self, key: bytes, parts: Sequence[bytes | memoryview]) -> int:
        """Append a value and return the offset in the file at which it begins.

        Raises:
            ValueError: where the key is not greater than the one before, or has not 1 to 511 bytes,
                or the value has 4 GiB.
        """
        if not 1 <= len(key) <= _MAX_KEY_BYTES:
            raise ValueError(f"expected a key of 1 to {_MAX_KEY_BYTES} bytes, got {len(key)}")
        if key <= self._last_key:
            raise ValueError(f"expected ascending keys, got {key!r} after {self._last_key!r}")
        size = sum(memoryview(part).nbytes for part in parts)
        if size > _MAX_VALUE_BYTES:
            raise ValueError(f"expected a value of at most {_MAX_VALUE_BYTES} bytes, got {size}")
        self._last_key = key
        self._num_values += 1
        if NODE.size + len(key) + size > _MAX_NODE_BYTES:
            first_page = self._write_overflow(parts, size)
            self._add(key, size, lmdb_tree.IN_OVERFLOW, first_page.to_bytes(8, "little"))
            return first_page * _PAGE_BYTES + PAGE_HEADER.size
        node = self._add(key, size, 0, b"".join(parts))
        if self._leaf.number is None:  # reserve its page now, write it when it is full
            self._leaf.number = self._reserve(1)
            self._file.write(bytes(_PAGE_BYTES))
        return self._leaf.number * _PAGE_BYTES + node + NODE.size + len(key)

    def close(self) -> None:
        """Write the tree and the meta pages, and wait until everything is on the disk."""
        with self._file:
            self._end_leaf()
            root, depth, num_branch_pages = self._write_tree()
            self._sync()  # meta pages come last, because they make the file valid
            tree = (0, 0, depth, num_branch_pages, len(self._leaves), self._num_overflow_pages)
            self._file.seek(0)
            self._file.write(_meta_page(0, self._num_pages, (0, 0, 0, 0, 0, 0, 0, NO_PAGE)))
            self._file.write(_meta_page(1, self._num_pages, (*tree, self._num_values, root)))
            self._sync()

    def _reserve(self, num_pages: int) -> int:
        self._num_pages += num_pages
        return self._num_pages - num_pages

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_overflow(self, parts: Sequence[bytes | memoryview], size: int) -> int:
        num_pages = -(-(PAGE_HEADER.size + size) // _PAGE_BYTES)
        first_page = self._reserve(num_pages)
        self._num_overflow_pages += num_pages
        header = lmdb_tree.OVERFLOW_HEADER.pack(first_page, 0, lmdb_tree.OVERFLOW, num_pages)
        self._file.writelines([header, *parts])
        self._file.write(bytes(-(PAGE_HEADER.size + size) % _PAGE_BYTES))
        return first_page

    def _add(self, key: bytes, size: int, flags: int, content: bytes) -> int:
        """Add a node to the leaf, or to a new one if it is full; return its place there."""
        node = NODE.pack(size & 0xFFFF, size >> 16, flags, len(key)) + key + content
        if not self._leaf.has_room(node):
            self._end_leaf()
        if not self._leaf.nodes:
            self._leaves.append((key, self._leaf))
        return self._leaf.add(node)

    def _end_leaf(self) -> None:
        leaf, self._leaf = self._leaf, _Page(lmdb_tree.LEAF)
        if leaf.number is not None:
            self._file.seek(leaf.number * _PAGE_BYTES)
            self._file.write(leaf.to_bytes())
            self._file.seek(self._num_pages * _PAGE_BYTES)
            leaf.nodes.clear()

    def _write_tree(self) -> tuple[int, int, int]:
        """Write leaves and branches; return the root, the depth and the number of branch pages."""
        children: list[tuple[bytes, int]] = []
        for first_key, leaf in self._leaves:
            if leaf.number is None:
                self._write_page(leaf)
            assert leaf.number is not None
            children.append((first_key, leaf.number))
        depth, num_branch_pages = 1, 0
        while len(children) > 1:
            parents = _branches(children)
            for _, page in parents:
                self._write_page(page)
            children = [(key, page.number) for key, page in parents if page.number is not None]
            depth += 1
            num_branch_pages += len(parents)
        return (children[0][1], depth, num_branch_pages) if children else (NO_PAGE, 0, 0)

    def _write_page(self, page: _Page) -> None:
        page.number = self._reserve(1)
        self._file.write(page.to_bytes())


class _Page:
    """A branch or leaf page being filled: nodes from its end, the table of their places in front.

    Attributes:
        number: page number in the file, once it is known.
        nodes: nodes added so far.
    """

    def __init__(self, flags: int) -> None:
        self.number: int | None = None
        self.nodes: list[bytes] = []
        self._flags = flags
        self._places: list[int] = []

    def has_room(self, node: bytes) -> bool:
        place = self._end - len(node) & -2
        return place >= PAGE_HEADER.size + 2 * (len(self._places) + 1)

    def add(self, node: bytes) -> int:
        """Add a node and return its place in the page."""
        self._places.append(self._end - len(node) & -2)  # nodes begin at even places
        self.nodes.append(node)
        return self._end

    def to_bytes(self) -> bytes:
        page = bytearray(_PAGE_BYTES)
        table = struct.pack(f"<{len(self._places)}H", *self._places)
        free = PAGE_HEADER.size + len(table)
        PAGE_HEADER.pack_into(page, 0, self.number, 0, self._flags, free, self._end)
        page[PAGE_HEADER.size : free] = table
        for place, node in zip(self._places, self.nodes, strict=True):
            page[place : place + len(node)] = node
        return bytes(page)

    @property
    def _end(self) -> int:
        return self._places[-1] if self._places else _PAGE_BYTES


def _branches(children: list[tuple[bytes, int]]) -> list[tuple[bytes, _Page]]:
    """Return one level of branch pages above children, given as (first key, page number)."""
    groups: list[list[tuple[bytes, int]]] = []
    room = 0
    for key, number in children:
        needed = (NODE.size + len(key) + 1 & -2) + 2
        if needed > room:
            groups.append([])
            room = _PAGE_BYTES - PAGE_HEADER.size
        groups[-1].append((key, number))
        room -= needed
    if len(groups[-1]) == 1:  # LMDB refuses a branch with one child
        groups[-1].insert(0, groups[-2].pop())
    return [(group[0][0], _branch(group)) for group in groups]


def _branch(children: list[tuple[bytes, int]]) -> _Page:
    page = _Page(lmdb_tree.BRANCH)
    for i, (first_key, number) in enumerate(children):
        # The first key is empty: all keys below the second one lead to the first child.
        key = first_key if i else b""
        page.add(NODE.pack(number & 0xFFFF, number >> 16 & 0xFFFF, number >> 32, len(key)) + key)
    return page


def _meta_page(number: int, num_pages: int, tree: tuple[int, ...]) -> bytes:
    """Return a meta page, whose number is also that of its transaction."""
    integer_keys = 8  # flag: the keys of the free list are numbers of transactions
    map_bytes = num_pages * _PAGE_BYTES
    content = (
        PAGE_HEADER.pack(number, 0, lmdb_tree.META, 0, 0)
        + lmdb_tree.META_HEAD.pack(lmdb_tree.MAGIC, lmdb_tree.VERSION, 0, map_bytes)
        + lmdb_tree.TREE.pack(_PAGE_BYTES, integer_keys, 0, 0, 0, 0, 0, NO_PAGE)
        + lmdb_tree.TREE.pack(*tree)
        + lmdb_tree.META_TAIL.pack(num_pages - 1, number)
    )
    return content.ljust(_PAGE_BYTES, b"\0")


# ---- tensorpack's values -------------------------------------------------------------------------

Serializer = Literal["pickle", "msgpack"]
"""How tensorpack serialises [uint8 array, label]. Its last release, 0.11, expects pickles, most
earlier ones msgpack; the environment variable TENSORPACK_SERIALIZE overrides that."""

_PICKLED_BEGIN = (
    b"\x80\x03](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
)

_PICKLED_DTYPE = (
    b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ"
    b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89B"
)
"""Protocol 3, which every Python 3 reads, with the module name that every NumPy knows."""


def tensorpack_value(
    jpeg: bytes | memoryview, label: int, serializer: Serializer = "pickle"
) -> list[bytes | memoryview]:
    """Return a value of tensorpack's LMDBSerializer, [uint8 array, label], in parts.

    The image is one of the parts, not copied.

    Raises:
        ValueError: where the label or the image's size is not below 2**31.
    """
    size = memoryview(jpeg).nbytes
    for name, value in ("a label", label), ("an image's size", size):
        if not 0 <= value < 1 << 31:
            raise ValueError(f"expected {name} from 0 to {(1 << 31) - 1}, got {value}")
    if serializer == "pickle":
        begin = _PICKLED_BEGIN + b"J" + struct.pack("<i", size) + _PICKLED_DTYPE
        return [begin + struct.pack("<I", size), jpeg, b"tbJ" + struct.pack("<i", label) + b"e."]
    begin = b"\x92\x85\xc4\x02nd\xc3\xc4\x04type\xa3|u1\xc4\x04kind\xc4\x00\xc4\x05shape\x91"
    begin += _msgpack_head(size, _MSGPACK_UINT) + b"\xc4\x04data"
    return [begin + _msgpack_head(size, _MSGPACK_BIN), jpeg, _msgpack_head(label, _MSGPACK_UINT)]


def tensorpack_keys(num_samples: int, serializer: Serializer = "pickle") -> bytes:
    """Return the value of `KEYS`: the list of all samples' keys."""
    kind = b"C" if serializer == "pickle" else b"\xc4"
    keys = map(tensorpack_key, range(num_samples))
    content = b"".join(kind + bytes((len(key),)) + key for key in keys)
    if serializer == "pickle":
        return b"\x80\x03](" + content + b"e."
    return _msgpack_head(num_samples, _MSGPACK_ARRAY) + content


def tensorpack_key(sample: int) -> bytes:
    """Return the key of a sample."""
    return b"%08d" % sample


_MSGPACK_UINT = [(2**7, ">B", 0), (2**8, ">BB", 0xCC), (2**16, ">BH", 0xCD), (2**32, ">BI", 0xCE)]
_MSGPACK_BIN = [(2**8, ">BB", 0xC4), (2**16, ">BH", 0xC5), (2**32, ">BI", 0xC6)]
_MSGPACK_ARRAY = [(16, ">B", 0x90), (2**16, ">BH", 0xDC), (2**32, ">BI", 0xDD)]
"""For each size of number: what it is less than, its format and its type byte."""


def _msgpack_head(value: int, kind: Sequence[tuple[int, str, int]]) -> bytes:
    """Return a number, or the head of as many bytes or elements; ">B": in the type byte."""
    form, code = next((form, code) for end, form, code in kind if value < end)
    return struct.pack(form, code | value) if form == ">B" else struct.pack(form, code, value)


# ---- packing -------------------------------------------------------------------------------------


class LmdbPacker(Packer):
    """Deals samples as for a pack, then writes them into one LMDB file, as tensorpack has it.

    The next run after an interruption begins the file again, so all scratch files stay until then.
    """

    def __init__(self, partial: str, plan: PackPlan, image_bytes: int, options: RunOptions) -> None:
        super().__init__(partial, plan, image_bytes, options)
        # tensorpack reads a file as this variable says.
        named = os.environ.get("TENSORPACK_SERIALIZE")
        self._serializer: Serializer = "msgpack" if named == "msgpack" else "pickle"
        self._flags: list[int] = []

    def _keep_finished(self) -> set[int]:
        return set()

    def _discard(self, bucket: int) -> None:
        pass

    def finish(self, destination: str) -> Summary:
        """Make the file from the dealt samples."""
        path = os.path.join(self._partial, LMDB_FILE)
        with LmdbWriter(path) as self._file:
            self._finish_shards()
            num_samples = len(self._flags)
            if not num_samples:
                raise PackError(f"{self._inputs.index.root}: no image is left to pack")
            keys = tensorpack_keys(num_samples, self._serializer)
            self._file.append(lmdb_tree.KEYS, [keys])
        self._publish(path, destination)
        num_canonical = sum(bool(flags & pack_format.FLAG_CANONICAL) for flags in self._flags)
        return Summary(
            destination,
            num_samples,
            self._inputs.record["bytes"],
            os.path.getsize(destination),
            num_canonical,
            sum(bool(flags & pack_format.FLAG_SHRUNK) for flags in self._flags),
            num_samples - num_canonical,
            tuple(sorted(self._failures.values(), key=lambda failure: failure.name)),
        )

    def _finish_shard(
        self, shard: int, scratch: memoryview, rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Append the samples of what would be a shard."""
        for sample, encoded in self._take_all(shard, scratch, rows, bar):
            value = tensorpack_value(encoded.data, int(self._label[sample]), self._serializer)
            self._file.append(tensorpack_key(len(self._flags)), value)
            self._flags.append(encoded.flags)
