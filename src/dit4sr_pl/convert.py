"""python -m dit4sr_pl.convert input=PATH output=PATH|hub:ME/NAME: released folders to LR-stream files, back, and
to the hub; prompt embeddings to ship with them"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checkpoint import follow_checkpoint
from dit4sr_pl.cli.checks import check_backbone, check_readable, check_writable, choose_device
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.common.hub import LR_STREAM, PROMPTS, HubAddress

if TYPE_CHECKING:
    from dit4sr_pl.model import TrainedPart
    from dit4sr_pl.scores.results import Result

SETTINGS = {  # what a model card says of a training, by the keys of its config
    "images per step": "images per step",
    "crop": "data.crop_size",
    "share of empty prompts": "data.empty_prompt_probability",
    "learning rate": "optimizer.lr",
    "loss weighting": "model.weighting",
    "precision": "trainer.precision",
    "decay of averaged weights": "callbacks.ema.decay",
    "seed": "seed",
}


@command("convert")
def main(cfg: DictConfig) -> None:
    """Converts in the direction that input and output decide."""
    check(cfg)
    if writes_prompts(cfg):
        cfg = follow_checkpoint(cfg, str(weights_of(cfg.input)))
        check_backbone(cfg.model.backbone)
    if str(cfg.output).startswith("hub:"):
        return publish(cfg)
    if Path(cfg.output).name == PROMPTS:
        write_prompts(cfg, Path(cfg.output))
    elif weights_of(cfg.input).is_dir():
        read_release(cfg)
    else:
        write_release(cfg)
    print(f"{cfg.output} written")


def weights_of(source: str) -> Path:
    """Returns the LR stream of a run's folder, or else the path itself."""
    return Path(source) / LR_STREAM if (Path(source) / LR_STREAM).is_file() else Path(source)


def writes_prompts(cfg: DictConfig) -> bool:
    """Returns whether prompt embeddings are written, next to weights or alone."""
    return cfg.prompt_embeddings or Path(cfg.output).name == PROMPTS


def write_prompts(cfg: DictConfig, path: Path, part: "TrainedPart | None" = None) -> None:
    """Writes the embeddings of the prompts that restoring without captions needs.

    Args:
        cfg: the config.
        path: the file.
        part: the weights that they come with; None: those of the input.
    """
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.model import load_part
    from dit4sr_pl.publishing.prompt_embeddings import write_prompt_embeddings

    part, backbone = part or load_part(weights_of(cfg.input)), instantiate(cfg.model.backbone)
    backbone.to(torch.device(choose_device(cfg.device, cfg.model.backbone)))
    prompts = {"", *instantiate(cfg.sampler).prompts([""])}
    write_prompt_embeddings(path, backbone, part.base, prompts, cfg.input)
    print(f"{PROMPTS}: {len(prompts)} prompts, {path.stat().st_size / 1e6:.1f} MB")


def read_release(cfg: DictConfig) -> None:
    """Writes the LR stream of a released folder as one LR-stream file."""
    from dit4sr_pl.model import save_part
    from dit4sr_pl.model.trained_part import load_release

    part = load_release(cfg.input, cfg.model.backbone.name, **cfg.get("release", {}))
    if cfg.prompt_embeddings:
        write_prompts(cfg, Path(cfg.output).with_name(PROMPTS), part)
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

    check_replaced(cfg, [*written_over(Path(cfg.output)), *existing(*prompts_beside(cfg, Path(cfg.output)))])
    part = load_part(weights_of(cfg.input))
    if part.network_config["network"] != "dit4sr":
        raise ValueError(
            f"{cfg.input}: a {part.network_config['network']}; the released layout is for DiT4SR's LR stream"
        )
    if "student" in part.network_config:
        raise ValueError(
            f"{cfg.input}: a student; the released layout cannot say how it samples. Share it as output=hub:OWNER/NAME"
        )
    net = build_network(instantiate(cfg.model.backbone).transformer, part.network_config)
    fit_part(net, part, cfg.input)
    net.merge_lora()  # the layout has no place for it
    with folder_lock(Path(cfg.output)):
        if cfg.prompt_embeddings:
            write_prompts(cfg, Path(cfg.output) / PROMPTS, part)
        write_released(net.base, net.lr_stream, Path(cfg.output))
    script, model = "test_wollava_r1.py", "model_dit4sr_r1"
    if legacy_keys(part):
        script, model = "test_wollava.py", "model_dit4sr"
    print(f"run it with the authors' test/{script}, which uses {model}: --transformer_model_name_or_path={cfg.output}")


def publish(cfg: DictConfig) -> None:
    """Uploads a run's LR stream, or an LR-stream file, with a model card, and prints where it is."""
    from dit4sr_pl.common.hashing import weights_hash
    from dit4sr_pl.model import load_part
    from dit4sr_pl.publishing.model_card import Publication
    from dit4sr_pl.publishing.upload import push
    from dit4sr_pl.scores.results import ROW, read_result

    run = Path(cfg.input) if Path(cfg.input).is_dir() else None
    part = load_part(run / LR_STREAM if run else cfg.input)
    if part.network_config["network"] != "dit4sr":
        raise ValueError(f"{cfg.input}: a {part.network_config['network']}; only LR streams go to the hub")
    own = [run] if run and (run / f"{ROW}.parquet").is_file() else []
    folders = [*own, *map(Path, cfg.card.results)]
    results = {folder: read_result(folder) for folder in folders}
    for folder, result in results.items():
        if result.weights_hash != weights_hash(part.state):
            raise ValueError(f"card.results={folder}: scores of other weights than {cfg.input}; leave it out")
    address = HubAddress.parse(cfg.output)
    training = training_settings(run) if run else {}
    license = {name: cfg.card[name] for name in ("license", "license_name", "license_link") if cfg.card[name]}
    pictures = pictures_of(results)[: cfg.card.pictures]
    with TemporaryDirectory() as folder:
        prompts = Path(folder) / PROMPTS if cfg.prompt_embeddings else None
        if prompts is not None:
            write_prompts(cfg, prompts, part)
        publication = Publication(part, address, training, list(results.values()), pictures, license, prompts)
        page = push(publication, cfg.private)
    print(f"{page}\nrestore with it: python -m dit4sr_pl.restore input=FILE checkpoint={publication.word}")


def pictures_of(results: "Mapping[Path, Result]") -> list[Path]:
    """Returns the restored pictures of results by their folders; of two with one name, the first."""
    pictures: dict[str, Path] = {}
    for folder, result in results.items():
        for picture in sorted((folder / result.pictures).glob("*.png")) if result.pictures else []:
            pictures.setdefault(picture.name, picture)
    return list(pictures.values())


def training_settings(run: Path) -> dict[str, str]:
    """Returns what a model card says of a training, by name, from the run's folder. Paths are not among it."""
    from dit4sr_pl.common.run_identity import flat_settings
    from dit4sr_pl.training.run_folder import finished_steps

    if not (run / "config.yaml").is_file():
        return {}
    settings = flat_settings(OmegaConf.load(run / "config.yaml"))
    found = {name: str(settings[key]) for name, key in SETTINGS.items() if key in settings}
    steps = finished_steps(run, max_steps=0)
    return ({"optimizer steps": str(steps)} if steps else {}) | found


def legacy_keys(part: "TrainedPart") -> bool:
    """Returns whether a part's LR stream runs with legacy keys."""
    return part.network_config["variant"]["legacy_lr_keys"]


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    for key in ("input", "output"):
        if OmegaConf.is_missing(cfg, key):
            raise ValueError(f"no value for {key}; give it as {key}=PATH")
    check_readable(cfg.input, "input")
    if str(cfg.output).startswith("hub:"):
        check_publication(cfg)
    elif Path(cfg.output).name == PROMPTS:
        check_writable(Path(cfg.output).parent, "output")
        check_replaced(cfg, existing(Path(cfg.output)))
    elif weights_of(cfg.input).is_dir():
        if Path(cfg.output).suffix != ".safetensors":
            raise ValueError(f"output={cfg.output}: give a file name that ends in .safetensors")
        check_writable(Path(cfg.output).parent, "output")
        check_replaced(cfg, existing(Path(cfg.output), *prompts_beside(cfg, Path(cfg.output).parent)))
    else:
        check_backbone(cfg.model.backbone)
        check_writable(cfg.output, "output")


def check_replaced(cfg: DictConfig, there: list[Path]) -> None:
    """Raises ValueError if the command would replace files without having been told to."""
    if there and not cfg.overwrite:
        raise ValueError(f"{there[0]}: exists; give another output, or overwrite=true to replace it")


def existing(*paths: Path) -> list[Path]:
    """Returns the paths that exist."""
    return [path for path in paths if path.exists()]


def prompts_beside(cfg: DictConfig, folder: Path) -> list[Path]:
    """Returns the file of prompt embeddings that goes into a folder next to weights, if one does."""
    return [folder / PROMPTS] if cfg.prompt_embeddings else []


def check_publication(cfg: DictConfig) -> None:
    """Checks the options of an upload."""
    HubAddress.parse(cfg.output)
    if Path(cfg.input).is_dir():
        check_readable(Path(cfg.input) / LR_STREAM, "input")
    for folder in cfg.card.results:
        check_readable(folder, "card.results")
    if cfg.private not in (None, True, False):
        raise ValueError(f"private={cfg.private}: must be true, false or null")
    if not isinstance(cfg.card.pictures, int) or cfg.card.pictures < 0:
        raise ValueError(f"card.pictures={cfg.card.pictures}: must be a whole number")


if __name__ == "__main__":
    main()
