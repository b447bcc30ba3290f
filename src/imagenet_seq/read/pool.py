"""Memory for the blocks of one rank: those being drawn from, and those read ahead of them."""

from __future__ import annotations

import math

from imagenet_seq.index.source import Source
from imagenet_seq.plan.schedule import Schedule
from imagenet_seq.read.arrange import ReadStrategy, mean_block_bytes

_READ_AHEAD_BYTES = 64 << 20  # beyond what the shuffle itself keeps in memory
_FILE_OVERHEAD_BYTES = 16 * 1024  # approximate overhead per open file
_BLOCK_OVERHEAD_BYTES = 32 * 1024  # per block: partial pages at both ends, rounded to 16 KB
_MEAN_FILE_BYTES = 128 * 1024  # assumed where file sizes are not known; ImageNet's mean is 110 KB


def block_memory_bytes(source: Source, schedule: Schedule, strategy: ReadStrategy) -> int:
    """Return the bound of the memory that one rank's blocks take.

    A block shuffle has a pool, and half as many blocks read ahead of it. Windows are two: one in
    use and one being read.
    """
    order = schedule.order
    if order.shuffle != "block" or (source.index.length is None and not source.python_blocks):
        num_samples = len(source.index)
        mean_bytes = strategy.data_bytes // max(1, num_samples) or _MEAN_FILE_BYTES
        window = min(strategy.window, num_samples)
        return max(_READ_AHEAD_BYTES, 2 * window * (mean_bytes + _FILE_OVERHEAD_BYTES))
    # Global positions go to streams and to ranks in turn, so this many streams meet a rank.
    streams = order.num_streams // math.gcd(order.num_streams, schedule.world_size)
    num_blocks = streams * (order.pool_blocks + max(2, order.pool_blocks // 2))
    return num_blocks * (mean_block_bytes(source, order.block_bytes) + _BLOCK_OVERHEAD_BYTES)
