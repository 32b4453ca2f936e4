import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.images.captions import drop_sentences, open_captions

CAPTIONS = {"a": " A dog\n runs. ", "sub.x/b.1": "Zwei Bäume", "empty": " "}
CLEAN = {"a": "A dog runs.", "sub.x/b.1": "Zwei Bäume", "empty": "", "absent": ""}


def write_folder(path):
    for name, caption in CAPTIONS.items():
        (path / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.txt").write_text(caption, encoding="utf-8")


def write_parquet(path):
    captions = [caption if caption.strip() else None for caption in CAPTIONS.values()]
    pq.write_table(pa.table({"image": list(CAPTIONS), "model": ["m"] * 3, "caption": captions}), path)


def write_jsonl(path):
    lines = [json.dumps({"image": name, "caption": caption, "model": "m"}) for name, caption in CAPTIONS.items()]
    path.write_text("\n".join(lines) + "\n\n")


@pytest.mark.parametrize(
    "name, write", [("captions", write_folder), ("t.parquet", write_parquet), ("t.jsonl", write_jsonl)]
)
def test_every_form_gives_the_same_captions(name, write, tmp_path):
    write(tmp_path / name)
    captions = open_captions(tmp_path / name)
    assert {image: captions[image] for image in CLEAN} == CLEAN
    assert captions.names() - {"empty"} == {"a", "sub.x/b.1"}  # files are counted without being read


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "image,caption", "t.csv: captions come from a folder of .txt files or a table"),
        ("t.jsonl", '{"image": "a", "caption": "x"}\n{"image": "b", "capt', "t.jsonl, line 2: not of the form"),
        ("t.jsonl", '{"image": "a", "caption": null}', "t.jsonl, line 1: not of the form"),
        ("t.jsonl", '["image", "caption"]', "line 1: not of the form"),
        ("t.jsonl", '{"image": "a", "caption": "x"}\n{"image": "a", "caption": "y"}', "two captions for a"),
        ("t.parquet", "rubbish", "t.parquet: not a parquet table with the text columns image and caption"),
    ],
)
def test_mistakes_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / name)


def test_parquet_table_without_a_column_is_refused(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "text": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="with the text columns image and caption"):
        open_captions(tmp_path / "t.parquet")


def test_absent_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder of captions"):
        open_captions(tmp_path / "absent")


@pytest.mark.parametrize(
    "caption, left",
    [
        ("A red car. In the background, a Blurred tree. It is 3.5 m long!", "A red car. It is 3.5 m long!"),
        ("Black and  white photo.", ""),
        ("The focal point is a cat? A mat", "A mat"),
        ("", ""),
    ],
)
def test_sentences_with_one_of_the_words_go(caption, left):
    assert drop_sentences(caption, ["focal", "blur", "black and white"]) == left


PROMPTS = [json.loads(line) for line in (Path(__file__).parent / "benchmark_prompts.jsonl").read_text().splitlines()]


def test_the_authors_captions_become_the_prompts_that_the_release_makes_of_them():
    """Captions of their benchmark sets: `filtered` is what their script makes of `prompt`."""
    words = read_conf("restore").captions.dropped_words
    assert sum(row["prompt"] != row["filtered"] for row in PROMPTS) > 15
    for row in PROMPTS:
        assert drop_sentences(row["prompt"], words) == row["filtered"]
        assert drop_sentences(row["filtered"], words) == row["filtered"]


def test_llava_and_qwen_are_asked_the_releases_question_and_drop_the_same_sentences():
    for name in ("llava", "qwen"):
        cfg = read_conf("prepare", captioner=name)
        assert cfg.captioner.instruction == (
            "Please describe the actual objects in the image in a very detailed manner. Please do not include "
            "descriptions related to the focus and bokeh of this image. Please do not include descriptions like the "
            "background is blurred."
        )
        assert cfg.captioner.dropped_words == cfg.captions.dropped_words == read_conf("app").captions.dropped_words


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red bus")
    (tmp_path / "table.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a", "caption": "a red bus"}\n')
    assert open_captions(tmp_path)["a"] == open_captions(tmp_path / "table.jsonl")["a"] == "a red bus"


def test_pipes_and_endless_files_are_no_captions(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    (tmp_path / "c.txt").write_text("x" * 70000)
    for name, message in (("a", "not a file"), ("b", "not a file"), ("c", "longer than 65536 bytes")):
        with pytest.raises(ValueError, match=f"{name}.txt: {message}"):
            open_captions(tmp_path)[name]
