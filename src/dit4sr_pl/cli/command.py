"""What every command shares: find the configs, run Hydra, answer a user's mistake in one line. No heavy imports."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parents[1]
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError)


def conf_folder() -> Path:
    """`conf/`: inside the package where it was installed from a wheel, two floors up in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "conf"


def choice(group: str, unchosen: str | None = None) -> str | None:
    """`${choice:GROUP,unchosen}`: the option that a command took of a config group; None outside of commands."""
    return HydraConfig.get().runtime.choices.get(group, unchosen) if HydraConfig.initialized() else None


def ablation_name() -> str | None:
    """`${ablation_name:}`: the variant that a command trains; of a baseline, which has none, the network."""
    network = choice("model/network", "dit4sr")
    return choice("ablation", "full") if network == "dit4sr" else network


def gpus(accelerator: str, devices: int) -> int | None:
    """`${gpus:ACCELERATOR,DEVICES}`: what a trainer needs on every node; None on CPUs."""
    return None if accelerator == "cpu" else devices


for resolver in (choice, ablation_name, gpus):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def command(config_name: str) -> Callable:
    """Decorates `main(cfg)` of an entry point: Hydra's config `conf/<config_name>.yaml` comes in.

    A user's mistake ends in one line and exit code 1; with HYDRA_FULL_ERROR=1 it comes with its traceback.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @wraps(main)
        def entry_point() -> None:
            mistakes = nullcontext if os.environ.get("HYDRA_FULL_ERROR") == "1" else mistakes_in_one_line

            def task(cfg: DictConfig) -> None:
                quiet_libraries()  # in here, for jobs in processes of their own
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    return run_job(main, cfg, show_traceback=mistakes is nullcontext)
                with mistakes():  # in here, before Hydra adds a line of its own
                    main(cfg)

            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints several lines and exits by itself
            with mistakes():
                hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(task)()

        return entry_point

    return decorate


def run_job(main: Callable[[DictConfig], None], cfg: DictConfig, show_traceback: bool) -> None:
    """One job of a sweep. What it raises says why in one line, holds nothing of the job, and any process can read it.

    SIGTERM ends the process, and the sweep with it; side by side, only a job.
    """
    side_by_side = choice("hydra/launcher") in ("local", "joblib")
    failure = None
    try:
        main(cfg)
    except SystemExit as end:
        if not side_by_side:
            raise
        failure = f"stopped by a signal (exit code {end.code})"
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        kind = "" if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: "
        failure = kind + one_line(error)
    if failure is not None:
        raise ValueError(failure)


def read_conf(command: str, **choices: str) -> DictConfig:
    """`conf/<command>.yaml` as the command itself gets it, with one option chosen per group, for use from Python."""
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose(command, [f"{group}={option}" for group, option in choices.items()])


def quiet_libraries() -> None:
    """Keeps what users read to what this project says; warnings of the libraries stay."""
    # pyiqa brings bitsandbytes, diffusers imports it, and it warns of kernels that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Each caption of more than CLIP's 77 tokens is told of three times; that is most of them, and T5 reads on.
    for name in ("diffusers.pipelines.stable_diffusion_3", "transformers.tokenization_utils_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own use of PyTorch
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # spandrel's SwinIR
    warnings.filterwarnings("ignore", "The `srun` command is available", UserWarning)  # on a cluster, outside of a job


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as interrupt:
        sys.exit(str(interrupt) or "interrupted")


def one_line(error: BaseException) -> str:
    """The message of what was raised first: Hydra wraps errors of the objects it makes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
