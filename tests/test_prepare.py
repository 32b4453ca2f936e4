"""The command: what it takes, and stages that need no vision-language model; see also test_captioner, test_manifest."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dit4sr_pl.backbone.prompt_cache import PromptCache
from dit4sr_pl.cli.checks import read_shard
from dit4sr_pl.cli.command import conf_folder, mistakes_in_one_line
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.manifest import read_manifest
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.prepare import STAGES, check


def configured(*overrides):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("prepare", [str(override) for override in overrides])


def prepare(*overrides) -> str | None:
    """Returns the command's message if it fails, and None if it works."""
    cfg = configured(*overrides)
    try:
        with mistakes_in_one_line():
            check(cfg)
            STAGES[cfg.stage](cfg, read_shard(cfg.shard))
    except SystemExit as exit:
        return exit.code
    return None


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i in range(4):
        picture = enlarge(torch.rand(1, 3, 4, 4, generator=generator("cpu", i)), (40, 40))
        write_image(folder / f"{i}.png", picture[0])
        (folder / f"{i}.txt").write_text(f"Photo {i // 2}.\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.folders=[.]"], "no value for stage; choose one of captions, embeddings, manifest"),
        (["stage=caption", "data.folders=[.]"], "stage=caption; choose one of captions"),
        (["stage=captions"], r"no photos; give data.folders=\[PATH\]"),
        (["stage=captions", "data.folders=[nowhere]"], "data.folders=nowhere: no such file or folder"),
        (["stage=captions", "data.folders=[.]", "captioner.name=./no"], "captioner.name=./no: no such file"),
        (["stage=captions", "data.folders=[.]", "batch_size=0"], "batch_size=0: must be 1 or more"),
        (
            ["stage=captions", "+data.sets.x.folder=.", "+data.sets.x.captions=a.jsonl"],
            "written as files; give a folder",
        ),
        (
            ["stage=captions", "+data.sets.x.folder=.", "+data.sets.x.captions=/proc/no"],
            "x.captions=/proc/no: cannot be",
        ),
        (["stage=manifest", "data.folders=[/proc]"], "the manifest's folder=/proc: cannot be written"),
        (["stage=manifest", "data.folders=[.]", "processes=0"], "processes=0: must be 1 or more"),
        (["stage=embeddings", "data.folders=[.]", "embeddings=/proc/no"], "cannot be written"),
        (["stage=embeddings", "data.folders=[.]", "model.backbone.embeddings=."], "give embeddings=FOLDER to write"),
        (
            ["stage=embeddings", "data.folders=[.]", "model.backbone.name=./no"],
            "model.backbone.name=no/model_index.json",
        ),
        *(
            (["stage=manifest", "data.folders=[.]", f"shard={text}"], "must be i/n")
            for text in ("0/8", "9/8", "1", "a/b")
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_read(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(configured(*overrides))


def test_every_captioner_config_holds_what_the_class_takes():
    for path in (conf_folder() / "captioner").glob("*.yaml"):
        cfg = configured(f"captioner={path.stem}", "captioner.name=./nowhere")
        OmegaConf.resolve(cfg.captioner)
        with pytest.raises(Exception, match="captioner.name=./nowhere: cannot be read"):
            instantiate(cfg.captioner)


@pytest.mark.slow
def test_embeddings_hold_all_that_training_and_validation_ask_for(photos, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("0.png", "0.txt"):
        (photos / name).rename(tmp_path / "val" / name)
    arguments = [f"data.folders=[{photos}]", f"data.validation_folders=[{tmp_path / 'val'}]", "sampler=paper"]
    arguments += [f"embeddings={tmp_path / 'cache'}", "prompts=[more]", "file_megabytes=0.001"]
    assert prepare("stage=embeddings", *arguments, "shard=1/2") is None
    assert prepare("stage=embeddings", *arguments, "shard=2/2") is None
    sampler = instantiate(configured("sampler=paper").sampler)
    asked = ["Photo 0.", "Photo 1.", "", "more", sampler.negative_prompt]
    asked += [sampler.prompt(""), sampler.prompt("Photo 0.")]
    cache = PromptCache(tmp_path / "cache", "tiny-sd3", 8, torch.float32)
    embeds, pooled = cache(asked, torch.device("cpu"))
    assert embeds.shape == (7, 16, 64) and pooled.shape == (7, 64) and len(cache.files) == 7


@pytest.mark.slow
def test_manifests_are_written_where_training_looks_and_damage_is_told(photos, tmp_path, capsys):
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:60])
    elsewhere = tmp_path / "elsewhere.parquet"
    arguments = [
        f"data.folders=[{photos}]",
        f"+data.sets.mine.folder={photos}",
        f"+data.sets.mine.manifest={elsewhere}",
    ]
    message = prepare("stage=manifest", "processes=1", *arguments)
    assert message.startswith("error: damaged") and message.count("2.png") == 2
    assert "4 photos, 1 of them damaged" in capsys.readouterr().out
    for path in (photos / "manifest.parquet", elsewhere):
        assert read_manifest(path).files == ["0.png", "1.png", "3.png"]

    write_image(photos / "2.png", torch.zeros(3, 9, 9))
    refused = prepare("stage=manifest", *arguments, "shard=1/2")
    assert refused == "error: shard=1/2: stage=manifest runs as one task; give processes=N"
    assert prepare("stage=manifest", "processes=1", *arguments) is None
    assert read_manifest(elsewhere).files == ["0.png", "1.png", "2.png", "3.png"]
