"""python -m dit4sr_pl.demo: restores and scores held-out photos; `make demo` runs it after its training."""

from pathlib import Path

from omegaconf import DictConfig

from dit4sr_pl.cli.checks import check_extra, check_readable, check_writable
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.markdown import markdown_table


@command("demo")
def main(cfg: DictConfig) -> None:
    """Writes `comparison.png` and `scores.md` into the output folder and prints the table."""
    check_readable(cfg.trained, "trained")
    check_writable(cfg.output, "output")
    check_extra("the demo", "demo", "skimage", "sklearn")
    print("loading PyTorch and the held-out photos", flush=True)

    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.images.files import write_image
    from dit4sr_pl.images.resize import enlarge
    from dit4sr_pl.restoration.restorer import Restorer

    output, device = Path(cfg.output), torch.device("cpu")
    data, sampler = instantiate(cfg.data), instantiate(cfg.sampler)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    streams = {
        "trained here": (Path(cfg.trained) / "lr_stream.safetensors", cfg.injection_scale),
        "shipped": (cfg.shipped, None),
    }

    columns = {"bicubic": [enlarge(batch["lr"], batch["hr"].shape[-2:]) for batch in batches]}
    for number, (name, (checkpoint, scale)) in enumerate(streams.items(), 1):
        print(f"restoring with the LR stream {name} ({number} of {len(streams)})", flush=True)
        restorer = Restorer.load(instantiate(cfg.model.backbone), sampler, checkpoint, device, injection_scale=scale)
        columns[name] = [
            restorer(batch["lr"], batch["hr"].shape[-2:], batch["prompt"], batch["name"], cfg.seed) for batch in batches
        ]
    columns["ground truth"] = [batch["hr"] for batch in batches]

    write_image(output / "comparison.png", comparison([batch["lr"] for batch in batches], columns))
    print(f"scoring: {', '.join(cfg.metrics)}\n", flush=True)
    table = score_table(columns, instantiate(cfg.metrics))
    (output / "scores.md").write_text(table)
    print(table)
    print(f"picture     {output / 'comparison.png'}   (LR | {' | '.join(columns)})")
    print(f"table       {output / 'scores.md'}")
    print(f"run         {cfg.trained}")
    print("TensorBoard .venv/bin/tensorboard --logdir outputs --samples_per_plugin images=1000")


def comparison(lr: list, columns: dict[str, list]):
    """Returns a picture `(3, photos*H, columns*W)`: for each photo LR with its pixels enlarged, then `columns`.

    Args:
        lr: batches of LR images `(B, 3, h, w)` in 0..1.
        columns: batches of images `(B, 3, H, W)` in 0..1 by the name of their column.
    """
    import torch

    from dit4sr_pl.training.callbacks.validation_scores import validation_strip

    per_photo = zip(torch.cat(lr), *(torch.cat(images) for images in columns.values()), strict=True)
    return torch.cat([validation_strip(*images) for images in per_photo], dim=1)


def score_table(columns: dict[str, list], metrics: dict) -> str:
    """Returns the mean scores of every column against the last one as a Markdown table."""
    rows = []
    *restored, truth = columns
    for name in restored:
        cells = [name]
        for score in metrics.values():
            score.reset()
            for sr, hr in zip(columns[name], columns[truth], strict=True):
                score.update(sr, hr)
            cells.append(f"{score.compute():.3f}")
        rows.append(cells)
    return markdown_table(["", *metrics], rows) + "\n"


if __name__ == "__main__":
    main()
