"""Trains on one machine, or on every host of a pod: the same as `python -m tfm train`, from a checkout.

For example:

    python train.py --config=configs/multi30k.py --workdir=runs/multi30k --data.corpus='text:DIR/{split}.{lang}'

Run on every host of a pod at once; the same command again resumes.
"""

import sys

from tfm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
