"""python -m dit4sr_pl.restore input=FILE_OR_FOLDER output=FOLDER [checkpoint=PATH] [scale=4]"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.config import check_backbone, check_readable, check_writable, command


@command("restore")
def main(cfg: DictConfig) -> None:
    check(cfg)

    import torch
    from hydra.utils import instantiate
    from rich.progress import track

    from dit4sr_pl.images import find_images, read_image, write_image
    from dit4sr_pl.restorer import Restorer

    source, output = Path(cfg.input), Path(cfg.output)
    files = find_images(source) if source.is_dir() else [source]
    root = source if source.is_dir() else source.parent
    device = torch.device(cfg.device)
    restorer = Restorer.load(instantiate(cfg.model.backbone), instantiate(cfg.sampler), cfg.checkpoint, device)
    failed = []
    for file in track(files, description="restoring"):
        try:
            lr = read_image(file)[None].to(device) / 255
        except ValueError as error:
            failed.append(str(error))
            continue
        name = file.relative_to(root).with_suffix("")
        size = tuple(round(cfg.scale * length) for length in lr.shape[-2:])
        sr = restorer(lr, size, [cfg.prompt], [name.as_posix()], cfg.seed)
        write_image(output / name.with_suffix(".png"), sr[0].cpu())
    print(f"{len(files) - len(failed)} of {len(files)} images restored into {output}")
    if failed:
        raise ValueError("not restored: " + "; ".join(failed))


def check(cfg: DictConfig) -> None:
    if OmegaConf.is_missing(cfg, "input"):
        raise ValueError("no value for input; give an image or a folder of images as input=PATH")
    check_readable(cfg.input, "input")
    if cfg.scale < 1:
        raise ValueError(f"scale={cfg.scale}: must be 1 or more")
    check_backbone(cfg.model.backbone)
    check_writable(cfg.output, "output")


if __name__ == "__main__":
    main()
