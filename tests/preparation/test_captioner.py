import copy
import functools
import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch

from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.photo_sets import PhotoSet
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.preparation.captioner import Captioner, one_per_caption, write_captions
from dit4sr_pl.prepare import main
from testing.sigkill import assert_kills_change_nothing
from testing.toy_llava import UNSPOKEN, WORDS, save_toy_llava


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_toy_llava(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(model_folder):
    return Captioner(str(model_folder), "What is it ?", max_tokens=6, max_side=64, dtype="float32", device="cpu")


def write_photos(folder, count):
    for i in range(count):
        picture = enlarge(torch.rand(1, 3, 4, 4, generator=generator("cpu", i)), (40, 30 + 10 * (i % 5)))
        write_image(folder / "deep" / f"{i}.png", picture[0])


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 5)
    return tmp_path / "photos"


def caption_files(folder, captions):
    images = sorted((folder / "deep").iterdir())
    return one_per_caption((image, captions / "deep" / f"{image.stem}.txt") for image in images)


def test_captions_are_the_models_greedy_answers_to_each_image(captioner, photos):
    images = [read_image(photos / "deep" / f"{i}.png") for i in range(5)]
    captions = captioner(images)
    assert len(set(captions)) > 1 and all(captions)
    assert captions == [captioner([image])[0] for image in images]

    processor, model = captioner.processor, captioner.model
    inputs = processor(text="USER : <image> What is it ? ASSISTANT :", images=images[3], return_tensors="pt")
    ids, answer = inputs["input_ids"], []
    while len(answer) < 6 and WORDS.index("</s>") not in answer:
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[UNSPOKEN] = -torch.inf
        answer.append(int(logits.argmax()))
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    assert captions[3] == processor.tokenizer.decode(answer, skip_special_tokens=True)

    captioner = copy.copy(captioner)
    captioner.dropped_words = [captions[0].split()[0]]
    assert captioner(images) == ["" if captioner.dropped_words[0] in caption else caption for caption in captions]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_models_weights_are_the_nearest_ones_of_few_bits(model_folder, captioner, photos, quantization):
    loaded = Captioner(str(model_folder), "What is it ?", 6, 64, "float32", "cpu", quantization=quantization)
    name = "model.language_model.layers.0.mlp.up_proj"
    ours, exact = (each.model.get_submodule(name).weight.detach() for each in (loaded, captioner))
    assert loaded.model.get_memory_footprint() < captioner.model.get_memory_footprint()
    if quantization == "int8":
        largest = exact.abs().amax(dim=1, keepdim=True)
        step = loaded.model.get_submodule(name).weight.SCB[:, None] / 127
        assert (ours * step - exact).abs().max() <= 0.51 * largest.max() / 127
        assert all(loaded([read_image(photos / "deep" / "0.png")]))  # with 4 bits a CPU needs larger layers
    else:
        packed, state = bitsandbytes.functional.quantize_4bit(exact, quant_type="nf4")
        assert ours.dtype == torch.uint8 and torch.equal(ours.flatten(), packed.flatten())
        assert torch.equal(loaded.model.get_submodule(name).weight.quant_state.absmax, state.absmax)


def test_every_caption_is_written_once_and_what_exists_stays(captioner, photos):
    files = caption_files(photos, photos)
    calls = []
    count = lambda images: calls.append(len(images)) or captioner(images)  # noqa: E731
    assert write_captions(files, count, 2) == [] and calls == [2, 2, 1]
    whole = {text: text.read_text() for _, text in files}
    assert [text.name for text in whole] == [f"{i}.txt" for i in range(5)]

    (photos / "deep" / "1.txt").unlink()
    (photos / "deep" / "3.txt").write_text("mine\n")
    assert write_captions(files, count, 2) == [] and calls[3:] == [2]
    assert {text: text.read_text() for _, text in files} == whole | {photos / "deep" / "3.txt": "mine\n"}
    assert {path.suffix for path in (photos / "deep").iterdir()} == {".png", ".txt"}


def caption_for_killing(model_folder, photos, captions):
    torch.set_num_threads(1)
    captioner = Captioner(str(model_folder), "What is it ?", 6, 64, "float32", "cpu")
    with folder_lock(captions):
        assert write_captions(caption_files(photos, captions), captioner, 2) == []


def test_an_empty_file_is_no_caption(photos, tmp_path):
    files = caption_files(photos, tmp_path)
    for _, text in files:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.touch()
    assert write_captions(files, lambda images: ["a bus"] * len(images), 2) == []
    assert {text.read_text() for _, text in files} == {"a bus\n"}


@pytest.mark.slow
def test_killed_at_random_moments_no_caption_is_lost_or_changed(model_folder, tmp_path):
    write_photos(tmp_path / "photos", 20)
    target = functools.partial(caption_for_killing, model_folder, tmp_path / "photos")
    whole = assert_kills_change_nothing(target, tmp_path / "captions", kills=2)
    assert set(whole) == {f"deep/{i}.txt" for i in range(20)}


def test_a_folder_of_captions_mirrors_the_images(captioner, photos, tmp_path):
    files = caption_files(photos, tmp_path / "captions")
    write_captions(files, lambda images: ["A cat. A dog?"] * len(images), 8)
    assert sorted((tmp_path / "captions").rglob("*.*")) == [tmp_path / f"captions/deep/{i}.txt" for i in range(5)]
    assert (tmp_path / "captions/deep/0.txt").read_text() == "A cat. A dog?\n"


def test_two_images_of_one_caption_are_refused():
    paths = [Path("a/1.png"), Path("a/2.png"), Path("a/1.png"), Path("a/1.jpg")]
    files = [(path, path.with_suffix(".txt")) for path in paths]
    assert one_per_caption(files[:3]) == files[:2]
    with pytest.raises(ValueError, match=r"a/1\.png and a/1\.jpg would share the caption a/1\.txt"):
        one_per_caption(files)


def prepare(capsys, monkeypatch, *arguments) -> tuple[str | None, str]:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("sys.argv", ["prepare", "stage=captions", *map(str, arguments)])
    message = None
    try:
        main()
    except SystemExit as exit:
        message = exit.code
    return message, capsys.readouterr().out


def toy(model_folder):
    return [f"captioner.name={model_folder}", "captioner.max_tokens=6", "captioner.dtype=float32", "batch_size=2"]


@pytest.mark.slow
def test_the_command_names_unreadable_images_and_its_shards_make_a_whole(photos, model_folder, capsys, monkeypatch):
    (photos / "broken.png").write_bytes((photos / "deep" / "0.png").read_bytes()[:60])
    arguments = [f"data.folders=[{photos}]", *toy(model_folder)]
    first, out = prepare(capsys, monkeypatch, *arguments, "shard=1/2")
    assert first.startswith("error: not captioned:") and "broken.png" in first and "\n" not in first
    assert "2 of 3 images have captions" in out
    second, out = prepare(capsys, monkeypatch, *arguments, "shard=2/2")
    assert second is None and "3 of 3 images have captions" in out
    assert len(list(photos.rglob("*.txt"))) == 5


@pytest.mark.parametrize(
    "override, message",
    [("quantization=int4", "captioner.quantization=int4: choose int8, nf4 or null"), ("dtype=half", "dtype=half: ch")],
)
def test_a_wrong_type_of_the_weights_is_told_before_the_model_is_read(photos, override, message, capsys, monkeypatch):
    assert message in prepare(capsys, monkeypatch, f"data.folders=[{photos}]", f"captioner.{override}")[0]


def test_a_sets_captions_are_written_where_training_reads_them(photos, model_folder, tmp_path, capsys, monkeypatch):
    options = {"folder": photos, "captions": tmp_path / "captions"}
    arguments = [f"data.sets.mine.{key}={value}" for key, value in options.items()]
    assert prepare(capsys, monkeypatch, *(f"+{text}" for text in arguments), *toy(model_folder))[0] is None
    prompts = [photo.prompt for photo in PhotoSet(**options).photos]
    assert prompts == [" ".join((tmp_path / f"captions/deep/{i}.txt").read_text().split()) for i in range(5)]
    assert all(prompts) and not list(photos.rglob("*.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["nothing there", "no weights", "no template", "another kind"])
def test_a_model_that_cannot_be_used_is_answered_in_one_line(
    model_folder, tmp_path, photos, damage, capsys, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if damage == "nothing there":
        shutil.rmtree(folder)
        folder.mkdir()
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "no template":
        (folder / "chat_template.jinja").unlink()
    if damage == "another kind":
        config = json.loads((folder / "config.json").read_text())["text_config"] | {"architectures": ["LlamaModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    message, _ = prepare(capsys, monkeypatch, f"data.folders=[{photos}]", *toy(folder))
    assert message.startswith(f"error: captioner.name={folder}: ") and message.count("\n") == 0
    assert ("has no chat template" if damage == "no template" else "hf auth login") in message
