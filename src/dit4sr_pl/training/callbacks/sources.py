"""The sources of a run: recorded in its checkpoints, compared when it resumes, and the same on all devices."""

import logging
from collections.abc import Mapping
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.backbone.fingerprints import check_parts, differing
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.training.lightning_state import forget_time, from_all_devices

log = logging.getLogger(__name__)


class Sources(Callback):
    """Compares photos, captions, embeddings, `model.checkpoint`, the teacher and the backbone's parts with those of the
    checkpoint.

    Where the checkpoint is the run's own, a difference ends the start. One of another run (`ckpt_path=`) may be
    continued with other data, which a warning says. What a checkpoint does not record is not compared.

    Args:
        folder: folder of the run's checkpoints.
        embeddings: hash of the cached embeddings of the run's prompts; None: there are none.
    """

    def __init__(self, folder: Path, embeddings: str | None):
        self.folder, self.embeddings = folder, embeddings

    def found(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """Returns the sources, each as a short text; those of the data on the first device of a machine alone."""
        found = {"embeddings": self.embeddings, "model.checkpoint": pl_module.began_with}
        found |= {"model.teacher": pl_module.taught_by}
        if isinstance(trainer.datamodule, SuperResolutionData):
            found |= trainer.datamodule.sources
        return {what: text for what, text in found.items() if text}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Records the sources."""
        checkpoint["sources"] = self.found(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Compares the sources; raises ValueError on all devices if the run cannot continue with these."""
        path = Path(trainer.ckpt_path)
        ours, theirs = self.found(trainer, pl_module), checkpoint.get("sources", {})
        backbone, parts = pl_module.backbone, checkpoint["base"].get("parts", {})
        changed = changes(ours, theirs) if trainer.is_global_zero else ""
        if path.resolve().parent == self.folder.resolve():
            other = differing(backbone.parts, parts) if trainer.is_global_zero else []
            changed = "; ".join([*filter(None, [changed]), *(f"the backbone's {part}" for part in other)])
            if changed := trainer.strategy.broadcast(changed):
                raise ValueError(
                    f"{self.folder.parent}: the run began with other data: {changed}; bring them back, or continue "
                    f"with these in another folder (ckpt_path={path} output=FOLDER)"
                )
            return
        forget_time(trainer, checkpoint)
        check_parts(backbone.name, backbone.parts, parts, path)
        if changed:
            log.warning("%s: trained with other data, as it continues: %s", path, changed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares step and photos over all devices: each lists the folders for itself, and sees them at its time.

        Raises:
            ValueError: devices are at different steps, or have other photos.
        """
        if trainer.world_size == 1:
            return
        data = trainer.datamodule
        listing = data.training.listing() if isinstance(data, SuperResolutionData) else ""
        states = from_all_devices(trainer, (trainer.global_step, listing))
        if len(set(states)) > 1:
            named = "; ".join(
                f"device {rank}: step {step}, photos {photos}" for rank, (step, photos) in enumerate(states)
            )
            raise ValueError(f"the devices do not agree ({named}); wait until all machines see the same files")


def changes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Returns the sources that differ, as a text; empty: none does."""
    differ = [what for what in ours if theirs.get(what, ours[what]) != ours[what]]
    return "; ".join(f"{what}: {ours[what]}, were {theirs[what]}" for what in differ)
