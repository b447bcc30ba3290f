"""OpenCV: imdecode, crop, resize with INTER_AREA, flip, in a pool of threads.

INTER_AREA, since the default INTER_LINEAR skips pixels when it shrinks: faster, but aliased.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peers.measuring import CROP, MEAN, RESIZE, STD, Peer, Task, main, sorted_photos


def version() -> str:
    import cv2

    return str(cv2.__version__)


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw as torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def decode(path: str) -> Any:
    import cv2
    import numpy as np

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.fromfile(path, np.uint8), flags)


def train_image(path: str) -> Any:
    import cv2

    image = decode(path)
    top, left, height, width = random_crop(*image.shape[:2])
    crop = image[top : top + height, left : left + width]
    image = cv2.resize(crop, (CROP, CROP), interpolation=cv2.INTER_AREA)
    return cv2.flip(image, 1) if random.random() < 0.5 else image


def normalized(image: Any) -> Any:
    import numpy as np

    mean, std = np.array([MEAN, STD], np.float32) * 255
    return ((image - mean) / std).transpose(2, 0, 1)


def train(task: Task) -> Callable[[], Iterator[int]]:
    import cv2
    import numpy as np

    cv2.setNumThreads(0)
    pool = ThreadPoolExecutor(task.num_cores)
    paths = sorted_photos(task.folder)

    def one(path: str) -> Any:
        image = train_image(path)
        return normalized(image) if task.dtype == "float32" else image

    def epoch() -> Iterator[int]:
        random.shuffle(paths)
        for first in range(0, len(paths), task.batch_size):
            batch = np.stack(list(pool.map(one, paths[first : first + task.batch_size])))
            yield len(batch)

    return epoch


def val_image(path: str) -> Any:
    import cv2

    image = decode(path)
    height, width = image.shape[:2]
    scale = RESIZE / min(height, width)
    size = (int(width * scale), int(height * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    top, left = round((image.shape[0] - CROP) / 2), round((image.shape[1] - CROP) / 2)
    return image[top : top + CROP, left : left + CROP]


def validate(task: Task) -> Any:
    import numpy as np

    return np.stack([val_image(path) for path in sorted_photos(task.val_folder)])


if __name__ == "__main__":
    main(Peer("pip install opencv-python-headless numpy", train, validate, version))
