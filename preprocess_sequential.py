"""Make ILSVRC-train.lmdb and ILSVRC-val.lmdb: `imagenet-seq preprocess` by its former name."""

import sys

from imagenet_seq.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
