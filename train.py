"""The guide's command line: `python train.py --config FILE`, the same as `nanovllm train`; torchrun may start it."""

import sys

from nanovllm_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
