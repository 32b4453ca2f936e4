"""Puts a trained LR stream into the package as tiny-dit4sr, with the injection scale of all of DiT4SR's releases.

    python scripts/tiny_release.py --trained outputs/tiny_dit4sr_anneal/full/seed0/lr_stream.safetensors

The scale is the only thing that changes; the training's file stays as it is.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.model import load_part, save_part

INJECTION_SCALE = 1.2  # trained with 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="LR-stream file of the training")
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny-dit4sr", help="folder of the shipped LR stream")
    args = parser.parse_args()

    part = load_part(args.trained)
    variant = part.network_config["variant"] | {"injection_scale": INJECTION_SCALE}
    save_part(
        replace(part, network_config=part.network_config | {"variant": variant}), args.output / "lr_stream.safetensors"
    )


if __name__ == "__main__":
    main()
