"""The command `keras-openllama train-tokenizer`, from a checkout: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keras_openllama.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(prog="python train/train_tokenizer.py"))
