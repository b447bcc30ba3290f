"""Writes the files of this folder: run it with pyarrow 0.8.0 (Python 3.6) to 10.0.1, in each.

pyarrow.serialize is gone since release 14, and each file is what one release made of it.
"""

import os

import numpy as np
import pyarrow as pa

IMAGE = b"\xff\xd8" + bytes(bytearray(range(1, 60))) + b"\xff\xd9"
ARRAY = np.frombuffer(IMAGE, np.uint8)

for name, pair in [
    ("list_array", [ARRAY, 7]),
    ("list_array_np", [ARRAY, np.int64(7)]),
    ("tuple_bytes", (IMAGE, 7)),
]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), pa.__version__ + "-" + name)
    with open(path + ".bin", "wb") as file:
        file.write(pa.serialize(pair).to_buffer().to_pybytes())
