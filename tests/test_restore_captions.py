"""Prompts of restored photos: captions from files and from a caption model."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.images.files import read_image
from testing.small_photos import write_photo
from testing.stand_ins import Bicubic, command
from testing.toy_llava import save_toy_llava


def test_a_caption_model_describes_what_has_no_prompt(folder, tmp_path, monkeypatch):
    save_toy_llava(tmp_path / "llava")
    toy = [f"captioner.name={tmp_path / 'llava'}", "captioner.max_tokens=6", "captioner.dtype=float32"]
    (folder / "3.txt").write_text("a cat")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-20])
    restorer = Bicubic()
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}", "captioner=llava", *toy]
    assert "4.png" in command(monkeypatch, restorer, *arguments)
    captions = {call.names[0]: call.captions[0] for call in restorer.calls}
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        captioner = instantiate(compose("restore", ["device=cpu", *arguments[2:]]).captioner)
    described = {name: captioner([read_image(folder / f"{name}.png")])[0] for name in "012"}
    assert any(described.values()) and captions == described | {"3": "a cat"}
    assert sorted(path.name for path in folder.glob("*.txt")) == ["3.txt"]
    assert {path.stem for path in (tmp_path / "out").glob("*.txt")} == set("0124")


def test_the_command_filters_captions_as_the_release_does_unless_told_otherwise(tmp_path, monkeypatch):
    photo = tmp_path / "photo.png"
    write_photo(photo)
    photo.with_suffix(".txt").write_text('A sign, "Palio." The sign is the focus of it. It is red.')
    restorer = Bicubic()
    for output, overrides in (("a", []), ("b", ["captions.dropped_words=[]"]), ("c", ["prompt='A focus.'"])):
        assert command(monkeypatch, restorer, f"input={photo}", f"output={tmp_path / output}", *overrides) is None
    filtered, whole, typed = (call.captions[0] for call in restorer.calls)
    assert (filtered, typed) == ('A sign, "Palio. It is red.', "A focus.")  # the quotation mark belongs to the next one
    assert whole == 'A sign, "Palio." The sign is the focus of it. It is red.'


@pytest.mark.slow
def test_captions_outlast_ctrl_c_and_overwrite(folder, tmp_path, monkeypatch):
    asked, stop = [], 2

    def write(images):
        asked.append(images)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return [f"caption {len(asked)}"]

    monkeypatch.setattr("dit4sr_pl.preparation.captioner.Captioner", lambda **options: write)
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}", "captioner=llava"]
    restorer = Bicubic()
    assert command(monkeypatch, restorer, *arguments) == 130 and not restorer.calls
    assert command(monkeypatch, restorer, *arguments) is None and len(asked) == 6
    assert [call.captions[0] for call in restorer.calls] == [f"caption {i}" for i in (1, 4, 6, 3, 5)]
    (tmp_path / "out/3.png").unlink()
    assert command(monkeypatch, restorer, *arguments) is None and len(asked) == 6
    assert command(monkeypatch, restorer, *arguments, "overwrite=true") is None and len(asked) == 6
    assert [call.captions[0] for call in restorer.calls[-5:]] == [f"caption {i}" for i in (1, 4, 6, 3, 5)]
    (tmp_path / "out/3.txt").write_bytes(b"\xff")
    assert "out/3.txt: the caption is not UTF-8" in command(monkeypatch, restorer, *arguments, "overwrite=true")
