"""python -m dit4sr_pl.convert input=PATH output=PATH: released folders to LR-stream files, and back"""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checks import check_backbone, check_readable, check_writable
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.files import folder_lock

if TYPE_CHECKING:
    from dit4sr_pl.model import TrainedPart


@command("convert")
def main(cfg: DictConfig) -> None:
    """Converts in the direction that the input decides."""
    check(cfg)
    if Path(cfg.input).is_dir():
        read_release(cfg)
    else:
        write_release(cfg)
    print(f"{cfg.output} written")


def read_release(cfg: DictConfig) -> None:
    """Writes the LR stream of a released folder as one LR-stream file."""
    from dit4sr_pl.model import save_part
    from dit4sr_pl.model.trained_part import load_release

    part = load_release(cfg.input, cfg.model.backbone.name, **cfg.get("release", {}))
    save_part(part, cfg.output)
    keys = "legacy LR keys, as dit4sr_q and dit4sr_f" if legacy_keys(part) else "LR keys of its own, as dit4sr_r1"
    print(f"{cfg.input}: an LR stream with {keys}")


def write_release(cfg: DictConfig) -> None:
    """Writes an LR-stream file as a folder in the released layout, and prints which of the authors' scripts runs it."""
    from hydra.utils import instantiate

    from dit4sr_pl.model import load_part
    from dit4sr_pl.model.reference_format import write_released, written_over
    from dit4sr_pl.model.trained_part import fit_part
    from dit4sr_pl.restoration.restorer import build_network

    check_replaced(cfg, written_over(Path(cfg.output)))
    part = load_part(cfg.input)
    if part.network_config["network"] != "dit4sr":
        raise ValueError(
            f"{cfg.input}: a {part.network_config['network']}; the released layout is for DiT4SR's LR stream"
        )
    net = build_network(instantiate(cfg.model.backbone).transformer, part.network_config)
    fit_part(net, part, cfg.input)
    with folder_lock(Path(cfg.output)):
        write_released(net.base, net.lr_stream, Path(cfg.output))
    script, model = "test_wollava_r1.py", "model_dit4sr_r1"
    if legacy_keys(part):
        script, model = "test_wollava.py", "model_dit4sr"
    print(f"run it with the authors' test/{script}, which uses {model}: --transformer_model_name_or_path={cfg.output}")


def legacy_keys(part: "TrainedPart") -> bool:
    """Returns whether a part's LR stream runs with legacy keys."""
    return part.network_config["variant"]["legacy_lr_keys"]


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    for key in ("input", "output"):
        if OmegaConf.is_missing(cfg, key):
            raise ValueError(f"no value for {key}; give it as {key}=PATH")
    check_readable(cfg.input, "input")
    if Path(cfg.input).is_dir():
        if Path(cfg.output).suffix != ".safetensors":
            raise ValueError(f"output={cfg.output}: give a file name that ends in .safetensors")
        check_writable(Path(cfg.output).parent, "output")
        check_replaced(cfg, [path for path in [Path(cfg.output)] if path.exists()])
    else:
        check_backbone(cfg.model.backbone)
        check_writable(cfg.output, "output")


def check_replaced(cfg: DictConfig, there: list[Path]) -> None:
    """Raises ValueError if the command would replace files without having been told to."""
    if there and not cfg.overwrite:
        raise ValueError(f"{there[0]}: exists; give another output, or overwrite=true to replace it")


if __name__ == "__main__":
    main()
