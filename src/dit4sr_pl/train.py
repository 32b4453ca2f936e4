"""Trains DiT4SR or a baseline, or resumes a training.

python -m dit4sr_pl.train [+ablation=NAME] [experiment=NAME] [ckpt_path=FILE] [-m ...]
"""

import functools
import logging
import os
import shlex
import signal
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.benchmarks import name_benchmark
from dit4sr_pl.cli.checks import check_backbone, check_compiler, check_data, check_readable, check_writable
from dit4sr_pl.cli.command import choice, command, conf_folder
from dit4sr_pl.common.devices import ALL, device_count
from dit4sr_pl.common.hub import locate
from dit4sr_pl.common.processes import end_with_parent
from dit4sr_pl.common.run_identity import images_per_step
from dit4sr_pl.scores.weight_files import Weights, check_metrics, refuse_set_scores
from dit4sr_pl.training.former_run import CHECKPOINTS
from dit4sr_pl.training.leader import Decision, agree, forget, start_torch
from dit4sr_pl.training.run_folder import (
    Start,
    finish,
    finished_steps,
    is_restart,
    newest_checkpoint,
    open_run,
    settle,
)

if TYPE_CHECKING:
    from lightning import Trainer

    from dit4sr_pl.data.module import SuperResolutionData
    from dit4sr_pl.model import TrainedPart
    from dit4sr_pl.scores.results import Result
    from dit4sr_pl.training.module import SuperResolutionModule

log = logging.getLogger("dit4sr_pl.train")  # `__name__` is `__main__` in a command


@command("train")
def main(cfg: DictConfig) -> None:
    """Runs the command."""
    train(cfg)


def train(cfg: DictConfig) -> dict[str, float]:
    """Runs or resumes one training from its composed config.

    Returns:
        Scores of the last validation and the last loss by their logged names; {}: the run was already finished.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent(signal.SIGKILL)  # without the first process it would wait for it
    check(cfg)
    with ExitStack() as stack:
        stack.callback(forget)
        decision = agree(cfg.trainer, functools.partial(decide, cfg, stack))
        return {} if decision.finished else fit(cfg, Path(cfg.output), decision)


def decide(cfg: DictConfig, stack: ExitStack) -> Decision:
    """Locks and checks the run's folder, until the stack is closed, and decides where to start; see `agree`."""
    folder = stack.enter_context(open_run(cfg))
    limits = cfg.trainer.max_steps, cfg.trainer.get("max_time")
    if not cfg.overwrite and cfg.ckpt_path is None and (steps := finished_steps(folder, *limits)):
        way = "a larger trainer.max_steps" if steps >= limits[0] else "another trainer.max_time or a ckpt_path"
        log.info("%s: finished at step %d; give %s to train longer", folder, steps, way)
        return Decision(finished=steps)
    log.info("%s: training to step %d; loading PyTorch, photos and network", folder, cfg.trainer.max_steps)
    tell_global_batch(cfg)
    start_torch()
    recomputed = gradient_checkpointing(cfg)
    checkpoint = cfg.ckpt_path
    if checkpoint is None and not cfg.overwrite:
        checkpoint = newest_checkpoint(folder, cfg.trainer.max_steps)
    if checkpoint is None:
        return Decision(gradient_checkpointing=recomputed)
    step = step_of(checkpoint, cfg.trainer.max_steps)
    return Decision(0, str(checkpoint), step, Path(checkpoint).stat().st_size, recomputed)


def fit(cfg: DictConfig, folder: Path, decision: Decision) -> dict[str, float]:
    """Trains in a folder that is locked and checked; the result is that of `train`."""
    start_torch()
    import torch
    from hydra.utils import instantiate
    from lightning import seed_everything

    from dit4sr_pl.data.latents import check_autoencoder
    from dit4sr_pl.model import save_part
    from dit4sr_pl.model.trained_part import part_of
    from dit4sr_pl.scores.results import write_result

    decision.wait_for_checkpoint()
    network = {"gradient_checkpointing": decision.gradient_checkpointing}
    seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    callbacks = instantiate(cfg.callbacks)
    data = instantiate(cfg.data)
    module = instantiate(cfg.model, network=network)
    embeddings = None if cfg.model.backbone.embeddings is None else check_prompts(cfg, module, data)
    if cfg.data.get("latents") is not None:
        check_autoencoder(data.training.folders, module.backbone.parts.get("vae"), module.backbone.name)
    changes = Start(cfg, folder, decision.step)
    trainer = make_trainer(cfg, changes, callbacks, embeddings)
    try:
        trainer.fit(module, data, ckpt_path=decision.checkpoint, weights_only=True)
    except BaseException as error:
        if trainer.is_global_zero:
            changes.undo()
        if isinstance(error.__context__, KeyboardInterrupt):  # upon which Lightning exits with code 1
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning ignores from then on
            advice = "the same command resumes from its newest checkpoint"
            raise KeyboardInterrupt(f"{folder}: interrupted at step {trainer.global_step}; {advice}") from None
        raise
    if trainer.global_step == decision.step:
        raise ValueError(f"{folder}: no step was trained; check trainer.limit_train_batches and trainer.max_time")
    part = part_of(module.net, module.trained_over)
    if trainer.is_global_zero:
        save_part(part, folder / f"{module.net.trained_name}.safetensors")
        if "scores" in callbacks and callbacks.scores.restored:
            write_result(result_of(cfg, part, data.validation_name, callbacks.scores.restored), folder)
        finish(folder, trainer.global_step, cfg.trainer.max_steps, cfg.trainer.get("max_time"))
        log.info("%s: finished at step %d", folder, trainer.global_step)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def tell_global_batch(cfg: DictConfig) -> None:
    """Warns if a step has another number of images than the experiment is made for, and says how to reach that."""
    images = images_per_step(cfg)
    if cfg.global_batch is None or images == cfg.global_batch:
        return
    advice = "change data.batch_size, trainer.devices or trainer.accumulate_grad_batches"
    batches, rest = divmod(cfg.global_batch * cfg.trainer.accumulate_grad_batches, images)
    advice = advice if rest else f"trainer.accumulate_grad_batches={batches} makes it {cfg.global_batch}"
    log.warning("a step has %s images, not the experiment's global batch of %d; %s", images, cfg.global_batch, advice)


def make_trainer(cfg: DictConfig, changes: Start, callbacks: Mapping, embeddings: str | None) -> "Trainer":
    """Returns the trainer, which changes the run's folder when the first step is trained.

    Args:
        cfg: the run's config.
        changes: the changes to its folder.
        callbacks: further callbacks by name.
        embeddings: see `Sources`.
    """
    from hydra.utils import instantiate

    from dit4sr_pl.training.callbacks import FirstStep, Sources

    folder = changes.folder
    first_step = FirstStep(changes.begin, functools.partial(settle, folder))
    sources = Sources(folder / CHECKPOINTS, embeddings)
    return instantiate(
        cfg.trainer,
        val_check_interval=validation_interval(cfg.trainer),
        callbacks=[first_step, sources, *callbacks.values()],
        logger=instantiate(cfg.logger, purge_step=changes.step),  # TensorBoard hides repeated steps
        default_root_dir=folder / ".none",  # on SLURM Lightning would prefer an hpc_ckpt file in this folder
    )


def check_prompts(cfg: DictConfig, module: "SuperResolutionModule", data: "SuperResolutionData") -> str | None:
    """Checks the cached embeddings of all prompts of training and of its validation.

    Returns:
        The hash of those of training, see `PromptCache.check`.

    Raises:
        ValueError: the cache lacks some of them, or one of its files is damaged.
    """
    needed = trained = module.prompts(data.training.prompts())
    if data.validation is not None and cfg.trainer.limit_val_batches != 0:
        needed = needed | module.restorer.sampler.prompts(data.validation_captions())
    if missing := module.backbone.prompts.missing(needed):
        more = f" and {len(missing) - 1} more of this run's {len(needed)}" if len(missing) > 1 else ""
        raise ValueError(
            f"{cfg.model.backbone.embeddings}: holds no embeddings of the prompt {missing[0]!r}{more}; run prepare "
            f"stage=embeddings: {embeddings_command(cfg)}"
        )
    module.backbone.prompts.check(needed)
    return module.backbone.prompts.check(trained)


def embeddings_command(cfg: DictConfig) -> str:
    """Returns the command that adds the prompts of a run to its cached embeddings."""
    groups = [f"{group}={choice(group)}" for group in ("data", "backbone", "sampler") if choice(group)]
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    taken = ("data.", "+data.", "sampler.", "model.backbone.name=", "model.backbone.t5_tokens=", "root=")
    words = [
        *groups,
        *(word for word in given if word.startswith(taken)),
        f"embeddings={cfg.model.backbone.embeddings}",
        *(["for_students=true"] if "teacher" in cfg.model else []),
    ]
    return shlex.join(["python", "-m", "dit4sr_pl.prepare", "stage=embeddings", *words])


def gradient_checkpointing(cfg: DictConfig) -> bool:
    """Returns whether blocks are computed again in the backward pass; `auto` depends on the GPU's memory."""
    chosen = cfg.model.network.gradient_checkpointing
    if chosen != "auto":
        return chosen
    from dit4sr_pl.plan import choose_checkpointing

    total = gpu_memory(cfg.trainer.accelerator)
    if total is None:
        return False
    chosen, reason = choose_checkpointing(cfg, total, OmegaConf.load(conf_folder() / "plan.yaml").plan.reserved)
    log.info("gradient checkpointing is %s: %s", "on" if chosen else "off", reason)
    return chosen


def gpu_memory(accelerator: str) -> int | None:
    """Returns the bytes of memory of this process's GPU; None: the run has none."""
    import torch

    if accelerator == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory


def validation_interval(trainer: DictConfig) -> int | float | str:
    """Returns `val_check_interval`, which counts optimizer steps, in batches, which Lightning counts."""
    interval = trainer.val_check_interval
    return interval * trainer.accumulate_grad_batches if isinstance(interval, int) else interval


def result_of(cfg: DictConfig, part: "TrainedPart", dataset: str, scores: dict) -> "Result":
    """Returns the last validation in the form of a complete evaluation of `dataset`."""
    from dit4sr_pl.common.hashing import values_hash, weights_hash
    from dit4sr_pl.common.run_identity import result_identity
    from dit4sr_pl.model.trained_part import method_and_variant
    from dit4sr_pl.scores.results import PICTURES, Result, run_name, versions

    method, variant = method_and_variant(part.network_config)
    return Result(
        run=run_name(cfg.output),
        method=method,
        variant=variant,
        dataset=dataset,
        seed=cfg.seed,
        pictures=PICTURES,
        identity_hash=values_hash(result_identity(cfg)),
        weights_hash=weights_hash(part.state),
        network=part.network_config,
        versions=versions(),
        scores=scores,
    )


def step_of(checkpoint: Path | str, max_steps: int) -> int:
    """Returns the step of a checkpoint.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: it is damaged, or no steps are left up to `max_steps`.
    """
    from dit4sr_pl.model.training_state import read_checkpoint

    step = read_checkpoint(checkpoint)["global_step"]
    if step >= max_steps:
        raise ValueError(f"{checkpoint}: is of step {step}; give a larger trainer.max_steps than {max_steps}")
    log.info("resuming from step %d: %s", step, checkpoint)
    return step


def check(cfg: DictConfig) -> None:
    """Raises ValueError or FileNotFoundError for every mistake in a config that can be found without PyTorch."""
    OmegaConf.resolve(cfg)
    if missing := OmegaConf.missing_keys(cfg):
        raise ValueError(f"no value for {', '.join(sorted(missing))}; give it as key=value")
    if not isinstance(cfg.trainer.max_steps, int) or cfg.trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps={cfg.trainer.max_steps}: give the number of steps that the run shall have")
    if (devices := device_count(cfg.trainer.devices, cfg.trainer.accelerator)) and cfg.trainer.devices in ALL:
        cfg.trainer.devices = devices  # the same number for everything that reads it
    ignore_repeated_options(cfg)
    name_benchmark(cfg)
    check_data(cfg.data)
    if cfg.ckpt_path is not None:
        check_readable(cfg.ckpt_path, "ckpt_path")
        if not zipfile.is_zipfile(cfg.ckpt_path):
            raise ValueError(f"ckpt_path={cfg.ckpt_path}: truncated or not a checkpoint; resume from an earlier one")
    for name in ("checkpoint", "teacher"):  # students alone have a teacher
        if (given := cfg.model.get(name)) is not None:
            place = locate(given)
            if isinstance(place, Path):  # what is on the hub is looked up when it is read
                check_readable(place, f"model.{name}")
    if cfg.sharded and "teacher" in cfg.model:
        raise ValueError(
            "trainer=fsdp trains no students: two networks read the base, which is sharded for one; use trainer=ddp"
        )
    if "perceptual" in cfg.model and cfg.student.loss.perceptual:
        check_perceptual(cfg.model.perceptual)
    check_processes(cfg.trainer)
    check_whole_steps(cfg.trainer)
    if cfg.sharded and "ema" in cfg.callbacks:
        raise ValueError("trainer=fsdp cannot average weights; add ~callbacks.ema, or use trainer=ddp")
    check_backbone(cfg.model.backbone)
    check_compiler(cfg.model.compile, "model.compile")
    if cfg.trainer.precision == "32-true" and cfg.model.backbone.dtype != "float32":
        raise ValueError(
            f"trainer.precision=32-true computes in float32, and model.backbone.dtype={cfg.model.backbone.dtype} does "
            "not; give model.backbone.dtype=float32, or trainer.precision=bf16-mixed"
        )
    if (chosen := cfg.model.network.gradient_checkpointing) not in (True, False, "auto"):
        raise ValueError(f"model.network.gradient_checkpointing={chosen}: choose true, false or auto")
    if cfg.sharded and cfg.model.backbone.quantization is not None:
        what = f"model.backbone.quantization={cfg.model.backbone.quantization}"
        raise ValueError(f"{what}: trainer=fsdp shards plain weights alone; take trainer=ddp, or no quantization")
    if "scores" in cfg.callbacks:
        refuse_set_scores(cfg.callbacks.scores.metrics)
        check_metrics(cfg.callbacks.scores.metrics, cfg.data.validation_crop if cfg.data.validation is None else None)
    check_writable(cfg.output, "output")


def check_perceptual(perceptual: DictConfig) -> None:
    """Raises FileNotFoundError or ValueError if a weight file of a perceptual loss is missing or another one."""
    if "weights" not in perceptual:
        return  # they come with a package
    weights = Weights(**{name: value for name, value in perceptual.weights.items() if name != "_target_"})
    if missing := weights.missing():
        raise FileNotFoundError(
            f"{weights.path(missing[0])}: no such file, and student.perceptual.name={perceptual.name} needs it; put "
            f"{missing[0]} there, or give perceptual@student.perceptual=stlpips_vgg"
        )
    weights.check(perceptual.name)


def ignore_repeated_options(cfg: DictConfig) -> None:
    """Drops `overwrite` and `ckpt_path` where a scheduler repeats a command that has trained in this folder before.

    With them a requeued job would start again each time.
    """
    given = [f"{key}={cfg[key]}" for key in ("overwrite", "ckpt_path") if cfg[key]]
    if given and is_restart(Path(cfg.output)):
        cfg.overwrite, cfg.ckpt_path = False, None
        log.warning("%s: restarted by the scheduler; it resumes, without %s", cfg.output, " and ".join(given))


def check_processes(trainer: DictConfig) -> None:
    """Raises ValueError unless the number of processes is that of one run; Lightning would train several runs."""
    devices = device_count(trainer.devices, trainer.accelerator)
    asked, started = devices * trainer.num_nodes, int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if started not in (1, asked) and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun starts processes too
        raise ValueError(
            f"SLURM started {started} processes for trainer.devices={trainer.devices} trainer.num_nodes="
            f"{trainer.num_nodes}; make --ntasks-per-node and --nodes equal to these"
        )
    swept = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if asked != 1 and swept and choice("hydra/launcher") in ("basic", "local"):
        raise ValueError(
            "in a sweep over runs on several devices every process would start the whole sweep; start the runs one by "
            "one, or with hydra/launcher=slurm"
        )


def check_whole_steps(trainer: DictConfig) -> None:
    """Raises ValueError if a limit on batches ends within a step: Lightning would take a step with fewer images."""
    for name in ("limit_train_batches", "overfit_batches"):
        limit = trainer.get(name)
        if isinstance(limit, int) and limit % trainer.accumulate_grad_batches:
            raise ValueError(
                f"trainer.{name}={limit}: must be a multiple of trainer.accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}, so that every step has all its batches"
            )


if __name__ == "__main__":
    main()
