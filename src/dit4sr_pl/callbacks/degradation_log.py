"""What was done to the training images."""

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.callbacks.validation_scores import tensorboards


class DegradationLog(Callback):
    """Histograms of the degradation's parameters, one value per image, every `trainer.log_every_n_steps`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        if "degradation" not in batch:
            return  # latents that were encoded before the run
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for name, values in batch["degradation"].scalars().items():
                for writer in tensorboards(trainer):
                    writer.add_histogram(f"degradation/{name}", values, trainer.global_step - 1)  # as the loss
