"""The decorator of all commands: finds configs, runs Hydra, reports a user's mistake in one line. No PyTorch here."""

import errno
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from dit4sr_pl.cli.texts import for_hydra
from dit4sr_pl.common.devices import device_count
from dit4sr_pl.common.processes import end_with_parent
from dit4sr_pl.common.progress import signs_of_life
from dit4sr_pl.common.secrets import hidden, note_used

PACKAGE = Path(__file__).parents[1]
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError)
REMEDIES = {errno.ENOSPC: "free some space, and repeat the command", errno.EROFS: "choose another folder"}
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "give this user access, or choose another path")
# Hydra copies this singleton for every config group that `--help` lists, which takes more than a second in all.
ConfigStore.__deepcopy__ = lambda self, memo: self


def conf_folder() -> Path:
    """Returns the folder `conf/`: within the package if that was installed from a wheel, else that of the checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "conf"


def choice(group: str, default: str | None = None) -> str | None:
    """Returns the option that a command takes of a config group, None outside of one: `${choice:GROUP,DEFAULT}`."""
    return HydraConfig.get().runtime.choices.get(group, default) if HydraConfig.initialized() else None


def ablation_name() -> str | None:
    """Returns the variant that a command trains; for a baseline, which has none, the network: `${ablation_name:}`."""
    network = choice("model/network", "dit4sr")
    return choice("ablation", "full") if network == "dit4sr" else network


def gpus(accelerator: str, devices: int | str | list[int]) -> int | None:
    """Returns the GPUs that a trainer needs on every node; None on CPUs: `${gpus:ACCELERATOR,DEVICES}`."""
    return None if accelerator == "cpu" else device_count(devices, accelerator)


def cpu_precision() -> str:
    """Returns the faster precision of this CPU: bf16-mixed if it has instructions for it, else 32-true.

    bf16-mixed is two to three times as fast with them and thirty times as slow without: `${cpu_precision:}`.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        return "32-true"
    return "bf16-mixed" if "amx_bf16" in flags or "avx512_bf16" in flags else "32-true"


def run_folder(name: str) -> str:
    """Returns the absolute folder of a training whose `output` was not given: `${run_folder:NAME}`.

    It is `hydra.run.dir` (in a sweep `hydra.sweep.subdir` in `hydra.sweep.dir`) if the user gave one, else NAME in
    `hydra.sweep.dir`.
    """
    if not HydraConfig.initialized():
        return os.path.abspath(Path("outputs", name))
    cfg = HydraConfig.get()
    sweeps = cfg.mode == RunMode.MULTIRUN
    unresolved = OmegaConf.to_container(cfg.sweep)["subdir"] if sweeps else OmegaConf.to_container(cfg.run)["dir"]
    if "${output}" in unresolved:  # as in conf/train.yaml, where Hydra's folder follows `output`
        return os.path.abspath(Path(cfg.sweep.dir, name))
    return os.path.abspath(Path(cfg.sweep.dir, cfg.sweep.subdir) if sweeps else cfg.run.dir)


def relative_path(path: str, folder: str) -> str:
    """Returns `path` relative to `folder`: `${relative_path:PATH,FOLDER}`."""
    return os.path.relpath(path, folder)


def environment(name: str, *default: str | None) -> str | None:
    """Returns the value of an environment variable, as OmegaConf's own `${oc.env:NAME,DEFAULT}`, and notes its name."""
    note_used(name)
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", environment, replace=True)
for resolver in (choice, ablation_name, gpus, cpu_precision, run_folder, relative_path):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def command(config_name: str, serves: bool = False) -> Callable:
    """Makes a command of `main(cfg)`, which gets Hydra's config `conf/<config_name>.yaml`.

    A user's mistake ends the process with one line and exit code 1; HYDRA_FULL_ERROR=1 shows its traceback. Ctrl-C ends
    it with 130, and a closed pipe, as of `| head`, without a word with 141.

    Args:
        config_name: name of the command and of its config.
        serves: whether the command waits for requests, so that no line tells how long it has been running.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @wraps(main)
        def entry_point() -> None:
            show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
            mistakes = nullcontext if show_traceback else mistakes_in_one_line

            def task(cfg: DictConfig) -> None:
                quiet_libraries()  # here, because the jobs of a sweep may have processes of their own
                with nullcontext() if serves else signs_of_life(config_name):
                    if HydraConfig.get().mode == RunMode.MULTIRUN:
                        return run_job(main, cfg, show_traceback)
                    with mistakes():  # here, before Hydra adds a line of its own
                        main(cfg)

            # Otherwise Hydra prints several lines and exits by itself.
            with env_override({"HYDRA_FULL_ERROR": "1"}), mistakes("output"):
                given = sys.argv
                sys.argv = [given[0], *with_whole_config(for_hydra(given[1:], config_name))]
                try:
                    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(task)()
                finally:
                    sys.argv = given
                    sys.stdout.flush()  # here, where a closed pipe is no error

        return entry_point

    return decorate


def with_whole_config(arguments: list[str]) -> list[str]:
    """Returns a command's arguments, in which `--cfg hydra --resolve` shows the section of the whole config.

    Hydra itself removes all other sections, to which this one refers, before it resolves it.
    """
    if "--resolve" not in arguments:
        return arguments
    package = "" if {"-p", "--package"} & set(arguments) else "\0--package\0hydra"
    return re.sub(r"(^|\0)(?:--cfg|-c)[=\0]hydra(?=\0|$)", rf"\1--cfg\0all{package}", "\0".join(arguments)).split("\0")


def run_job(main: Callable[[DictConfig], None], cfg: DictConfig, show_traceback: bool) -> None:
    """Runs one job of a sweep.

    SIGTERM ends the process, and the sweep with it; if jobs run side by side, only the job.

    Raises:
        ValueError: the job's error in one line. It refers to no object of the job, so every process can unpickle it.
    """
    side_by_side = choice("hydra/launcher") in ("local", "joblib")
    if side_by_side:
        end_with_parent(signal.SIGTERM)  # upon which a training saves
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


def read_conf(command: str, *arguments: str, **choices: str) -> DictConfig:
    """Returns `conf/<command>.yaml` as the command gets it, with `choices` as options of config groups.

    Args:
        command: the command's name.
        arguments: `key=value` as on the command line; paths and texts need no quotes.
        choices: options by config group.
    """
    options = [f"{group}={option}" for group, option in choices.items()]
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose(command, [*options, *for_hydra(arguments, command)])


def quiet_libraries() -> None:
    """Silences messages of libraries that users cannot act on; their other warnings stay."""
    # diffusers imports bitsandbytes, which pyiqa installs and which warns about kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Both report every caption of more than CLIP's 77 tokens. Most captions are longer, and T5 reads all of them.
    for name in ("diffusers.pipelines.stable_diffusion_3", "transformers.tokenization_utils_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own use of PyTorch
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`", UserWarning)  # diffusers' own use of the hub
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # spandrel's SwinIR
    warnings.filterwarnings("ignore", "The `srun` command is available", UserWarning)  # on a cluster, outside of a job


@contextmanager
def mistakes_in_one_line(folder_key: str | None = None) -> Iterator[None]:
    """Ends the process with `error: ...` in one line for every error that a user can cause.

    Args:
        folder_key: config key of a folder; errors of files are reported as errors of writing there.
    """
    try:
        yield
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
            sys.exit(128 + signal.SIGPIPE)
        if folder_key is not None and getattr(error, "filename", None) is not None:
            sys.exit(
                f"error: {folder_key}={error.filename}: cannot be written ({error.strerror}); choose another folder"
            )
        sys.exit(f"error: {one_line(error)}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"error: {one_line(error)}; the system ends workers if memory is short: lower data.num_workers")
    except KeyboardInterrupt as interrupt:
        print(interrupt if str(interrupt) else "interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def reader_has_left() -> bool:
    """Returns whether the program that stdout is piped into has ended, as `head` does."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError, AttributeError):  # no file of the system
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def one_line(error: BaseException) -> str:
    """Returns the message of the error that was raised first: Hydra wraps errors of the objects that it makes."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # Python's own begins with the number
        place = "" if error.filename is None else f"{error.filename}: "
        text = f"{place}{error.strerror}" + (f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else "")
    if re.match(r"Caught \w+ in DataLoader worker process", text):  # its whole traceback; the last line is the error
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    message = " ".join(text.split()) or type(error).__name__
    if message.startswith("Could not override 'model'"):  # commands took it before there was a group of backbones
        return "model is an option of train and plan; give backbone=sd35_medium or backbone=tiny_sd3"
    return hidden(message)
