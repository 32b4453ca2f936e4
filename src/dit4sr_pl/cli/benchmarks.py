"""`data.validation=NAME`: a benchmark of `conf/dataset/` as the validation images of a training."""

from omegaconf import DictConfig, OmegaConf, open_dict

from dit4sr_pl.cli.command import conf_folder


def name_benchmark(cfg: DictConfig) -> None:
    """Replaces the name of a benchmark in `cfg.data.validation` by its config, in place.

    `data.validation={name: NAME, key: value}` changes keys of it, and `root` is the folder of all benchmarks.

    Raises:
        ValueError: there is no benchmark of this name, or its folder was not given.
    """
    if cfg.data.validation is None:
        return
    given = (
        OmegaConf.create({"name": cfg.data.validation}) if isinstance(cfg.data.validation, str) else cfg.data.validation
    )
    files = {path.stem: path for path in sorted((conf_folder() / "dataset").glob("*.yaml"))}
    if given.get("name", "folder") not in files:
        raise ValueError(f"data.validation={given.name}: no such benchmark; choose one of {', '.join(files)}")
    words = OmegaConf.load(conf_folder() / "captions.yaml").captions.dropped_words
    layers = [OmegaConf.create({"dropped_words": list(words)})]  # captions lose the same sentences as in evaluate
    layers += [OmegaConf.load(files[name]) for name in ("folder", given.get("name", "folder"))]
    benchmark = OmegaConf.merge(*layers, given)
    folder = OmegaConf.to_container(benchmark)["folder"]
    if "${root}" in folder and cfg.root is None:
        raise ValueError(
            f"data.validation={benchmark.name}: no folder; give root=FOLDER of all benchmarks, or "
            f"'data.validation={{name: {benchmark.name}, folder: FOLDER}}'"
        )
    benchmark.root = cfg.root
    OmegaConf.resolve(benchmark)
    with open_dict(cfg):
        cfg.data.validation = {key: value for key, value in benchmark.items() if key not in ("defaults", "root")}
