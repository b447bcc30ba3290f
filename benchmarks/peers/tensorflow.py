"""tf.data, as in TensorFlow's ImageNet models: decode_and_crop_jpeg and bilinear resize.

Its resize does not antialias, as in those models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peers.measuring import CROP, MEAN, RESIZE, STD, Peer, Task, main, sorted_photos


def version() -> str:
    import tensorflow

    return str(tensorflow.__version__)


def train_image(path: Any, dtype: str) -> Any:
    import tensorflow as tf

    encoded = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(encoded),
        tf.zeros([1, 0, 4]),
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    box = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.io.decode_and_crop_jpeg(encoded, box, channels=3)
    image = tf.image.resize(image, (CROP, CROP), "bilinear")
    image = tf.image.random_flip_left_right(image)
    if dtype == "float32":
        return (image - [255 * m for m in MEAN]) / [255 * s for s in STD]
    return tf.cast(tf.round(image), tf.uint8)


def train(task: Task) -> Callable[[], Iterator[int]]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(task.num_cores)
    tf.config.threading.set_inter_op_parallelism_threads(task.num_cores)
    paths = sorted_photos(task.folder)
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
    dataset = dataset.map(
        lambda path: train_image(path, task.dtype), num_parallel_calls=task.num_cores
    )
    dataset = dataset.batch(task.batch_size).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = task.num_cores
    dataset = dataset.with_options(options)
    return lambda: (len(batch) for batch in dataset.as_numpy_iterator())


def val_image(path: str) -> Any:
    import tensorflow as tf

    image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    height, width = image.shape[:2]
    scale = RESIZE / min(height, width)
    image = tf.image.resize(image, (int(height * scale), int(width * scale)), "bilinear")
    top, left = round((image.shape[0] - CROP) / 2), round((image.shape[1] - CROP) / 2)
    image = image[top : top + CROP, left : left + CROP]
    return tf.cast(tf.round(image), tf.uint8).numpy()


def validate(task: Task) -> Any:
    import numpy as np

    return np.stack([val_image(path) for path in sorted_photos(task.val_folder)])


if __name__ == "__main__":
    main(Peer("pip install tensorflow-cpu", train, validate, version))
