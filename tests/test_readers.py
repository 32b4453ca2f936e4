"""Malformed files: every reader answers in one line that names the file, or reads the file."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dit4sr_pl.backbone.prompt_cache import PromptCache
from dit4sr_pl.backbone.shipped_prompts import ShippedPrompts
from dit4sr_pl.data.manifest import read_manifest
from dit4sr_pl.images.captions import open_captions
from dit4sr_pl.images.files import write_image
from dit4sr_pl.model import load_part
from dit4sr_pl.model.reference_format import INDEX, shards_of
from dit4sr_pl.preparation.build_manifest import build_manifest
from dit4sr_pl.preparation.embeddings import write_embeddings
from dit4sr_pl.scores.results import read_result, read_scores
from dit4sr_pl.training.run_folder import finished_steps, read_config
from testing import ROOT
from testing.releases import write_toy_prompts

RUN = ROOT / "tests" / "made_at_6d90829" / "run"
MUTATIONS = int(os.environ.get("MUTATIONS", 60))  # of each reader's file
CPU = torch.device("cpu")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Returns a file's bytes with a cut, changed or inserted bytes, or a changed number or bracket."""
    at = draw.randrange(len(data))
    kinds = (
        lambda: data[:at],
        lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + draw.randbytes(8) + data[at + 8 :],
        lambda: data[:at] + draw.choice([b"{", b"[", b'"', b"null", b"-1", b"\xff", b"\n"]) + data[at:],
        lambda: data.replace(draw.choice([b":", b",", b"{", b"1", b"a"]), b"", 1),
        lambda: draw.choice([b"", b"{}", b"[]", b"null", b"1", b"\0" * 100, b'""']),
    )
    return draw.choice(kinds)()


def cache(folder: Path) -> Path:
    encode = lambda prompt: (torch.rand(1, 4, 6), torch.rand(1, 3))  # noqa: E731
    write_embeddings(["a cat"], encode, folder, "toy", 2, 10**6)
    return folder


def embeddings_file(folder: Path) -> Path:
    return next(cache(folder).glob("*.safetensors"))


def manifest(folder: Path) -> Path:
    write_image(folder / "a.png", torch.rand(3, 8, 8))
    return build_manifest(folder).manifest


def captions(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"image": ["a"], "caption": ["a cat"]}), folder / name)
        else:
            (folder / name).write_text('{"image": "a", "caption": "a cat"}\n')
        return folder / name

    return write


def index(folder: Path) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    return folder / INDEX


def of_run(name: str) -> Callable[[Path], Path]:
    return lambda folder: shutil.copytree(RUN, folder, symlinks=True, dirs_exist_ok=True) / name


def finished(folder: Path) -> Path:
    (folder / "finished.yaml").write_text("steps: 6\n")
    return folder / "finished.yaml"


def read_cache(path: Path) -> None:
    PromptCache(path.parent, "toy", 2, torch.float32)(["a cat", ""], CPU)


READERS = {
    "finished.yaml": (finished, lambda path: finished_steps(path.parent, 1)),
    "config.yaml": (of_run("config.yaml"), read_config),
    "scores.csv": (of_run("scores.csv"), read_scores),
    "results.parquet": (of_run("results.parquet"), lambda path: read_result(path.parent)),
    "LR stream": (of_run("lr_stream.safetensors"), load_part),
    "checkpoint": (lambda folder: next((of_run("checkpoints")(folder)).glob("0*.ckpt")), load_part),
    "embeddings": (embeddings_file, read_cache),
    "prompt embeddings": (write_toy_prompts, ShippedPrompts.read),
    "index of embeddings": (lambda folder: cache(folder) / "index.json", read_cache),
    "index of weights": (index, lambda path: shards_of(path.parent)),
    "manifest": (manifest, read_manifest),
    "captions.jsonl": (captions("captions.jsonl"), open_captions),
    "captions.parquet": (captions("captions.parquet"), open_captions),
    "caption": (captions("a.txt"), lambda path: open_captions(path.parent)["a"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_malformed_file_is_named_in_one_line(tmp_path, name):
    make, read = READERS[name]
    path = make(tmp_path)
    read(path)
    data, draw, refused = path.read_bytes(), random.Random(name), 0
    for number in range(MUTATIONS):
        path.write_bytes(mutated(data, draw))
        try:
            read(path)
        except (ValueError, OSError) as error:
            refused += 1
            line = str(error)
            assert str(tmp_path) in line and "\n" not in line, (number, type(error), line)
    assert refused or name in ("finished.yaml", "caption")
