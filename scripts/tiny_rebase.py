"""Copies an LR stream over to another base, as the start of its training there.

    python scripts/tiny_rebase.py --trained src/dit4sr_pl/assets/tiny-dit4sr/lr_stream.safetensors \\
        --base outputs/tiny/base/tiny-sd3 --output outputs/tiny/start.safetensors

An LR stream's file names the base that it was trained over, and no other base takes it. Over a base that was trained
on from that one, its weights are a better start than zeros: give the copy to the training as `model.checkpoint`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.model import load_part, save_part
from dit4sr_pl.model.trained_part import fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="LR-stream file")
    parser.add_argument("--base", type=Path, required=True, help="pipeline to train it over")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args()

    part = load_part(args.trained)
    transformer = Backbone(str(args.base), "float32", t5_tokens=8).transformer
    base = {"name": str(args.base), "fingerprint": fingerprint(transformer)}
    save_part(replace(part, base=base), args.output)


if __name__ == "__main__":
    main()
