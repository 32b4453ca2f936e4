"""Puts what was trained into the package: the base as tiny-sd3, the LR stream over it as tiny-dit4sr, and its students.

    python scripts/tiny_release.py --base outputs/tiny/base/tiny-sd3 \\
        --trained outputs/tiny_dit4sr/full/seed0/lr_stream.safetensors
    python scripts/tiny_release.py --trained outputs/tiny_student_4/student/seed0/lr_stream.safetensors \\
        --output src/dit4sr_pl/assets/tiny-student-4

The LR stream gets the injection scale that scores best (docs/tiny.md); a student keeps the one it was trained with.
Files get the name of the shipped base, and weights in half precision. The files of the training stay as they are.
"""

import argparse
import shutil
from pathlib import Path

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.model import load_part, save_part
from dit4sr_pl.model.trained_part import TrainedPart, check_base

BASE = "tiny-sd3"
INJECTION_SCALE = 1.5  # trained with 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="LR-stream file of the training")
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny-dit4sr", help="folder in the package")
    parser.add_argument("--base", type=Path, help="pipeline that it was trained over (default: the shipped one)")
    args = parser.parse_args()

    part = load_part(args.trained)
    base = Backbone(str(args.base or ASSETS / BASE), "float32", t5_tokens=8)
    check_base(base.transformer, part.base, args.trained)
    if args.base:
        shutil.copytree(args.base / "transformer", args.output.parent / BASE / "transformer", dirs_exist_ok=True)
    config = part.network_config
    if config.get("student") is None:
        config = config | {"variant": config["variant"] | {"injection_scale": INJECTION_SCALE}}
    half = {name: weight.half() for name, weight in part.state.items()}
    released = TrainedPart(network_config=config, base=part.base | {"name": BASE}, state=half)
    save_part(released, args.output / "lr_stream.safetensors")


if __name__ == "__main__":
    main()
