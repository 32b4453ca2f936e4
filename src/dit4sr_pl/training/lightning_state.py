"""The one place that uses undocumented attributes of Lightning (read from version 2.6.6) and of PyTorch (2.14.1).

tests/training/test_lightning_state.py fails when one of them changes.
"""

import inspect
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter


def batches_done(trainer: Trainer) -> int:
    """Returns the number of the batch that runs or has just ended, counted from 1 over all starts of the run.

    Lightning 2.6.6: `fit_loop.total_batch_idx`.
    """
    return trainer.fit_loop.total_batch_idx + 1


def validation_interval(trainer: Trainer) -> int | None:
    """Returns after how many batches a validation follows; None: there is no validation, or `limit_validation` set 0.

    Lightning 2.6.6: `val_check_batch`, and `val_loop.skip`, which is True where there are no validation images.
    """
    if trainer.fit_loop.epoch_loop.val_loop.skip or trainer.limit_val_batches == 0:
        return None
    return trainer.val_check_batch


def validation_follows(trainer: Trainer) -> bool:
    """Returns whether a validation follows the batch that has just ended.

    Lightning 2.6.6 also validates when `should_stop` is set, whatever the interval.
    """
    if (interval := validation_interval(trainer)) is None:
        return False
    return trainer.should_stop or batches_done(trainer) % interval == 0


def count_batches_anew(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Lets the batches of a checkpoint that is about to be loaded count as `accumulate_grad_batches` per step.

    Lightning 2.6.6 takes an optimizer step whenever the number of batches is a multiple of `accumulate_grad_batches`,
    and restores that number as it was counted with the accumulation of then: `fit_loop` > `epoch_loop.batch_progress`.
    A checkpoint of this project lies between two steps.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    total = checkpoint["global_step"] * trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches  # an int is the number of batches after which Lightning counts from 0 again
    current = (total - 1) % limit + 1 if isinstance(limit, int) and limit else total
    if (progress["total"]["ready"], progress["current"]["ready"]) == (total, current):
        return
    for counts, ready in ((progress["total"], total), (progress["current"], current)):
        before = counts["ready"]
        counts.update({name: count - before + ready for name, count in counts.items()})


def drop_unread_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Removes the states of callbacks that this run does not have from a checkpoint that is about to be loaded.

    Lightning 2.6.6 would ask the user to add these callbacks, such as averaging, to the run.
    """
    keys = {callback.state_key for callback in trainer.callbacks}
    checkpoint["callbacks"] = {key: state for key, state in checkpoint["callbacks"].items() if key in keys}


def keep_options(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Puts the options of this run into the states of a checkpoint that is about to be loaded.

    Lightning 2.6.6 and PyTorch 2.14.1 save some options together with what was learnt, such as the patience of
    `EarlyStopping` or the growth of float16's scaler, and would take those of then. An option is what a constructor's
    argument and an attribute are named after. The folder of a `ModelCheckpoint` stays: it tells whose files its list
    of the best ones names.
    """
    for callback in trainer.callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if isinstance(state, dict):
            arguments = inspect.signature(type(callback).__init__).parameters.keys() - {"dirpath"}
            options = arguments & vars(callback).keys() & state.keys()
            state |= {name: getattr(callback, name) for name in options}
    plugin = trainer.precision_plugin
    scaler, saved = getattr(plugin, "scaler", None), checkpoint.get(type(plugin).__qualname__)
    if scaler is not None and saved:
        now = scaler.state_dict()
        saved |= {name: now[name] for name in now.keys() - {"scale", "_growth_tracker"}}


def forget_time(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Removes the time that another run took, which `trainer.max_time` would count, from its checkpoint.

    Lightning 2.6.6: the state of `Timer`.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            checkpoint["callbacks"].pop(callback.state_key, None)


def from_all_devices(trainer: Trainer, value: Any) -> list[Any]:
    """Returns the values of all devices, in the order of their ranks. PyTorch 2.14.1: `all_gather_object`."""
    if trainer.world_size == 1:
        return [value]
    gathered: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def limit_validation(trainer: Trainer, limit: float) -> None:
    """Sets the share or number of batches of the following validations; with 0 they are skipped.

    Lightning 2.6.6: a change of `limit_val_batches` during the training takes effect.
    """
    trainer.limit_val_batches = limit


def received_sigterm(trainer: Trainer) -> bool:
    """Returns whether Lightning's own handler has received SIGTERM. Lightning 2.6.6: `received_sigterm`."""
    return trainer.received_sigterm


def signal_started_processes(trainer: Trainer, signum: int) -> None:
    """Sends a signal to the processes that this one has started for further devices. Lightning 2.6.6: `launcher`."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)


def log_step(trainer: Trainer) -> None:
    """Logs what the step that has just run logged; Lightning 2.6.6 does so itself after all callbacks, and then again.

    Lightning 2.6.6: `_logger_connector.update_train_step_metrics`.
    """
    trainer._logger_connector.update_train_step_metrics()


def let_trainer_unscale(optimizer: Optimizer) -> None:
    """Leaves the unscaling of float16's gradients to the trainer, so that they can be clipped.

    A fused optimizer unscales gradients itself. It says so by `_step_supports_amp_scaling` (PyTorch 2.14.1), and
    Lightning 2.6.6 raises an error if gradients are to be clipped while this attribute is True.
    """
    optimizer._step_supports_amp_scaling = False


def weights_before_averaging(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """Returns the trained weights of a checkpoint whose `state_dict` is averaged; None: it is not averaged.

    Lightning 2.6.6: `current_model_state`, which the callback `WeightAveraging` adds.
    """
    return checkpoint.get("current_model_state")


def averages_weights(trainer: Trainer) -> bool:
    """Returns whether one of the callbacks averages weights. It restores trained and averaged weights by itself."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)


def add_summary(writer: SummaryWriter, summary: Any) -> None:
    """Writes a TensorBoard summary that `SummaryWriter` has no method for. PyTorch 2.14.1: `_get_file_writer`."""
    writer._get_file_writer().add_summary(summary)


def averaged_model(callback: WeightAveraging) -> AveragedModel:
    """Returns the average that Lightning's callback has made. Lightning 2.6.6: `_average_model`."""
    return callback._average_model
