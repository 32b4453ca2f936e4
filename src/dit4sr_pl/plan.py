"""python -m dit4sr_pl.plan [+ablation=NAME] [experiment=NAME] [key=value ...]: what a training costs, before it runs"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checks import check_readable
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.devices import device_count
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.progress import work

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from dit4sr_pl.planning.budget import Budget, Spread
    from dit4sr_pl.planning.step_cost import StudentStep

PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")
GIB = 2**30


@command("plan")
def main(cfg: DictConfig) -> None:
    """Prints parameters, FLOPs and memory of the training, and what restoring costs next to the paper's table."""
    OmegaConf.resolve(cfg)
    images = images_per_step(cfg)
    folder, source = find_configs(cfg.model.backbone.name)

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a file every row is one line
    with work("running a step without memory"):
        budget = make_budget(cfg, folder)
    console.print(f"Backbone {cfg.model.backbone.name}: {source}.\n")
    console.print(parameter_table(budget))
    console.print(flops_table(cfg, budget, images))
    console.print(memory_table(cfg, budget, images))
    if cfg.plan.restoring:
        with work("counting what restoring costs"):
            table = restoring_table(cfg)
        console.print(table)


def images_per_step(cfg: DictConfig) -> int:
    """Returns the global batch.

    Raises:
        ValueError: the number of GPUs or the precision cannot be planned with.
    """
    devices = cfg.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices}: give the number of GPUs")
    if cfg.trainer.precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={cfg.trainer.precision}; choose one of {', '.join(PRECISIONS)}")
    return cfg.data.batch_size * devices * cfg.trainer.accumulate_grad_batches


def find_configs(name: str) -> tuple[Path, str]:
    """Returns the folder with the pipeline's `config.json` files, and in words where it is from.

    Nothing is downloaded.

    Raises:
        FileNotFoundError: the config files are not on this machine.
    """
    is_path = name.startswith((".", "/", "~"))
    if is_path:
        check_readable(Path(name) / "model_index.json", "model.backbone.name")
    shipped = (ASSETS / name, "shipped in this package")
    local = (Path(name), "read from the folder")
    cached = (hub_cache(name), "read from the hub's cache")
    published = (ASSETS / "published" / name, "not on this machine, planned by its published config")
    places = [local] if is_path else [shipped, local, cached, published]
    for folder, source in places:
        if (folder / "transformer" / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            return folder, source
    raise FileNotFoundError(
        f"model.backbone.name={name}: no such folder, not in the hub's cache, and its config is not in this package; "
        "download it, or plan with stabilityai/stable-diffusion-3.5-medium"
    )


def hub_cache(name: str) -> Path:
    """Returns the folder of a hub id's downloaded files, an empty path if there are none."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Path()
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "transformer/config.json")
    return Path(cached).parents[1] if isinstance(cached, str) else Path()


def make_budget(cfg: DictConfig, folder: Path) -> "Budget":
    """Returns the needs of a training whose pipeline has its config files in `folder`."""
    from hydra.utils import instantiate

    from dit4sr_pl.planning.budget import Budget
    from dit4sr_pl.planning.meta_backbone import MetaBackbone

    backbone = MetaBackbone(folder, cfg.model.backbone.dtype)
    averages = any(str(callback.get("_target_")).endswith("WeightAveraging") for callback in cfg.callbacks.values())
    return Budget(
        backbone,
        instantiate(cfg.model.network, gradient_checkpointing=False),
        instantiate(cfg.optimizer),
        batch=cfg.data.batch_size,
        image=cfg.data.crop_size,
        text_tokens=backbone.text_tokens(cfg.model.backbone.t5_tokens),
        precision=cfg.trainer.precision,
        reads_text_encoders=cfg.model.backbone.embeddings is None,
        averages=averages,
        quantization=cfg.model.backbone.quantization,
        make_student_step=make_student_step(cfg, backbone.coder().factor) if "teacher" in cfg.model else None,
    )


def make_student_step(cfg: DictConfig, factor: int) -> "Callable[..., StudentStep]":
    """Returns what makes the step of a student's training, over a base.

    Args:
        cfg: config of the training.
        factor: pixels per latent along one side.
    """
    from functools import partial

    from hydra.utils import instantiate

    from dit4sr_pl.planning.student_steps import guided_step, single_step, trajectory_step

    if cfg.student.guidance == "input":
        return guided_step
    teaching = instantiate(cfg.sampler).changed(start="noise", **instantiate(cfg.model.teaching))
    options = {"teaching": teaching, "crop": min(cfg.model.crop, cfg.data.crop_size) // factor}
    perceptual = instantiate(cfg.model.perceptual)
    if "losses" not in cfg.model:
        options |= {
            "windows": len(cfg.student.sigmas),
            "perceptual": perceptual if cfg.student.loss.perceptual else None,
        }
        return partial(trajectory_step, **options)
    options |= {"losses": dict(cfg.student.loss), "critic": instantiate(cfg.model.critic), "perceptual": perceptual}
    return partial(single_step, **options)


def choose_checkpointing(cfg: DictConfig, total: int, reserved: float) -> tuple[bool, str]:
    """Returns whether a GPU needs gradient checkpointing for a training, and why.

    Args:
        cfg: config of the training.
        total: bytes of the GPU's memory.
        reserved: GiB of it that are kept free.
    """
    from dit4sr_pl.planning.budget import Spread

    budget = make_budget(cfg, find_configs(cfg.model.backbone.name)[0])
    gpus = device_count(cfg.trainer.devices, cfg.trainer.accelerator) * cfg.trainer.num_nodes
    spread = Spread(gpus, cfg.sharded, budget.batch)
    needed, free = budget.peak(spread, budget.batch, checkpointing=False) / GIB, total / GIB - reserved
    return needed > free, f"a step without it takes {needed:.1f} GiB by plan, and {free:.1f} GiB are free"


def new_table(*columns: str) -> "Table":
    """Returns an empty table that is legible both in a terminal and as Markdown."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def parameter_table(budget: "Budget") -> "Table":
    """Returns the table of parameters."""
    table = new_table("parameters", "")
    for name, count in budget.parameters().items():
        table.add_row(name, f"{count:,}")
    return table


def flops_table(cfg: DictConfig, budget: "Budget", images: int) -> "Table":
    """Returns the table of TFLOPs of a step of `images` images."""
    devices = cfg.trainer.devices
    table = new_table(
        "TFLOPs of one step", "per image", f"per GPU of {devices} ({images // devices} images)", f"all {images} images"
    )
    for name, flops in budget.flops_per_image().items():
        table.add_row(name, *(f"{flops * count / 1e12:,.2f}" for count in (1, images // devices, images)))
    return table


def memory_table(cfg: DictConfig, budget: "Budget", images: int) -> "Table":
    """Returns the table of memory, with a column for each way to distribute a step of `images` images over GPUs."""
    from dit4sr_pl.planning.budget import Spread

    gpus = [count for count in cfg.plan.gpus if images % count == 0]
    spreads = [Spread(count, sharded=False, images=images // count) for count in gpus]
    # FSDP shards the plain weights of one network alone.
    if cfg.model.backbone.quantization is None and budget.student_step is None:
        spreads += [Spread(count, sharded=True, images=images // count) for count in gpus if count > 1]
    table = new_table("GiB per GPU", *(str(spread) for spread in spreads))

    batches = [min(budget.batch, spread.images) for spread in spreads]
    table.add_row("images at a time", *map(str, batches))
    table.add_row(
        "times accumulated", *(str(spread.images // at_a_time) for spread, at_a_time in rows(spreads, batches))
    )
    parts = [budget.per_gpu(spread) for spread in spreads]
    for name in parts[0]:
        table.add_row(name, *gib(part[name] for part in parts))
    for checkpointing, how in ((False, ""), (True, ", checkpointed")):
        activations = [budget.activations(at_a_time, checkpointing) for at_a_time in batches]
        table.add_row(f"activations{how}", *gib(activations))
        table.add_row(f"in all{how}", *gib(sum(part.values()) + peak for part, peak in rows(parts, activations)))
    for memory in cfg.plan.memory:
        free = (memory - cfg.plan.reserved) * GIB
        table.add_row(f"fits {memory} GB", *(verdict(budget, *row, free) for row in rows(spreads, batches)))
    return table


def restoring_table(cfg: DictConfig) -> "Table":
    """Returns the table of what restoring an image costs, for the models `plan.restoring`, then the paper's others.

    Seconds are measured with random weights on `plan.device`, or on a GPU if there is one; without a device they are
    predicted from FLOPs at `plan.tflops`.
    """
    import torch
    from hydra import compose

    from dit4sr_pl.comparison import paper

    name = cfg.plan.device or ("cuda" if torch.cuda.is_available() else None)
    device = name and torch.device(name)
    where = torch.cuda.get_device_name(device) if device and device.type == "cuda" else name
    size, theirs = cfg.plan.size, {row["method"]: row for row in paper.read("complexity")}
    table = new_table(
        f"restoring {size}x{size}",
        "million parameters",
        "evaluations",
        "TFLOPs",
        f"seconds on {where}" if device else "seconds, predicted",
        "paper: million parameters",
        "steps",
        "seconds, A100",
    )
    for model, label in cfg.plan.restoring.items():
        cells = restoring_row(compose("train", [f"model={model}"]), size, device, cfg.plan.tflops)
        table.add_row(label or model, *cells, *paper_cells(theirs.pop(label, {})))
    for label, row in theirs.items():
        table.add_row(label, "", "", "", "", *paper_cells(row))
    return table


def restoring_row(cfg: DictConfig, size: int, device: "torch.device | None", tflops: float) -> list[str]:
    """Returns parameters, evaluations, TFLOPs and seconds of a model with its own sampler, or a student with what it
    fixes of its teacher's, as cells of a table."""
    from hydra.utils import instantiate

    from dit4sr_pl.planning.meta_backbone import MetaBackbone
    from dit4sr_pl.planning.restoring_cost import restoring_cost, restoring_seconds

    backbone = MetaBackbone(
        find_configs(cfg.model.backbone.name)[0], "float32" if device and device.type == "cpu" else "float16"
    )
    make = instantiate(cfg.model.network, gradient_checkpointing=False)
    network = backbone.network(make)
    sampler = instantiate(cfg.sampler).for_student(getattr(network, "student", None))
    cost = restoring_cost(backbone, network, sampler, size)
    seconds = cost.flops / 1e12 / tflops
    if device:
        seconds = restoring_seconds(backbone, backbone.network(make), sampler, size, device)
    return [f"{cost.parameters / 1e6:.1f}", str(cost.evaluations), f"{cost.flops / 1e12:.1f}", f"{seconds:.2f}"]


def paper_cells(row: dict[str, str]) -> list[str]:
    """Returns the paper's cells of a method, empty ones for a method that it does not have."""
    return [row.get(name, "") for name in ("params_millions", "steps", "seconds_512x512_a100")]


def verdict(budget: "Budget", spread: "Spread", wanted: int, free: float) -> str:
    """Returns in words whether `wanted` images at a time fit into `free` bytes, and if not, how many do."""
    fit = budget.fitting(spread, free)
    if fit is None:
        return "no"
    at_a_time, checkpointing = fit
    number = "yes" if at_a_time == wanted else f"{at_a_time} at a time"
    return f"{number}, checkpointed" if checkpointing else number


def rows(*columns: list) -> zip:
    """Returns the rows of columns of the same length."""
    return zip(*columns, strict=True)


def gib(counts: Iterable[float]) -> list[str]:
    """Returns bytes as GiB in words."""
    return [f"{count / GIB:.2f}" for count in counts]


if __name__ == "__main__":
    main()
