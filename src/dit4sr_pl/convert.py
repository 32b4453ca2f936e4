"""python -m dit4sr_pl.convert [release=NAME] input=PATH output=PATH: released folders to LR-stream files, and back"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checks import check_backbone, check_readable, check_writable
from dit4sr_pl.cli.command import command


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
    from dit4sr_pl.model import DiT4SRTransformer, save_part
    from dit4sr_pl.model.trained_part import base_of, part_of

    net = DiT4SRTransformer.from_reference(cfg.input, **cfg.release)
    save_part(part_of(net, base_of(net, cfg.model.backbone.name)), cfg.output)


def write_release(cfg: DictConfig) -> None:
    """Writes an LR-stream file as a folder in the released layout."""
    from hydra.utils import instantiate

    from dit4sr_pl.model import load_part
    from dit4sr_pl.model.reference_format import write_released
    from dit4sr_pl.model.trained_part import fit_part
    from dit4sr_pl.restoration.restorer import build_network

    part = load_part(cfg.input)
    if part.network_config["network"] != "dit4sr":
        raise ValueError(
            f"{cfg.input}: a {part.network_config['network']}; the released layout is for DiT4SR's LR stream"
        )
    net = build_network(instantiate(cfg.model.backbone).transformer, part.network_config)
    fit_part(net, part, cfg.input)
    write_released(net.base, net.lr_stream, Path(cfg.output))


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    for key in ("input", "output"):
        if OmegaConf.is_missing(cfg, key):
            raise ValueError(f"no value for {key}; give it as {key}=PATH")
    check_readable(cfg.input, "input")
    if Path(cfg.input).is_dir():
        if "release" not in cfg:
            raise ValueError("no value for release; say which one the folder is: release=dit4sr_q, dit4sr_f, dit4sr_r1")
        if Path(cfg.output).suffix != ".safetensors":
            raise ValueError(f"output={cfg.output}: give a file name that ends in .safetensors")
        check_writable(Path(cfg.output).parent, "output")
    else:
        check_backbone(cfg.model.backbone)
        check_writable(cfg.output, "output")


if __name__ == "__main__":
    main()
