"""The command `keras-openllama plot`, from a checkout: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keras_openllama.cli.plot import main

if __name__ == "__main__":
    sys.exit(main(prog="python train/plot.py"))
