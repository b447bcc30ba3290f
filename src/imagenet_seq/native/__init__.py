"""The native core: the only folder that imports ctypes.

`abi` mirrors ``core/imagenet_seq.h``, `recipe` says what the core does to a sample, `core` has the
functions, and `engine` the threads that read, decode and batch.
"""

from imagenet_seq.native.abi import (
    ABI,
    MAX_GROUP,
    ROWS_READ,
    SAMPLE_CLEAN,
    TABLES_BYTES,
    TASK_BLOCK,
    TASK_ROW,
    Batch,
    Request,
    Task,
    Times,
    View,
)
from imagenet_seq.native.core import (
    apply,
    build_info,
    count_symbols,
    cpu,
    crc32c,
    decode,
    decode_group,
    draw,
    fit_tables,
    kept_table_bytes,
    lock_on_fault,
    look_up,
    memory_file,
    preallocate,
    read_header,
    transcode,
    use_cpu,
)
from imagenet_seq.native.engine import Engine, ReadConfig
