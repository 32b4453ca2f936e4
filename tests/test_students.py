"""The file of a student says how it samples, to the pipeline, the page, the hub and every command."""

import asyncio
import dataclasses
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from hydra.utils import instantiate
from PIL import Image
from skimage.data import astronaut

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import Student, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.page.fields import checked
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.pyiqa_loading import create
from testing.commands import call
from testing.local_hub import TOKEN, LocalHub, serving
from testing.pages import make_page
from testing.student_files import STUDENTS, student_net, write_student
from testing.toy_runs import SAMPLER, SHIPPED, TOY_SD3

LR = enlarge(torch.rand(2, 3, 5, 5, generator=generator("cpu", 0)), (14, 18))
NAMES = {"prompt": "a cat", "names": ["a", "b"], "output_type": "pt"}


@pytest.fixture(scope="module")
def files(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return {name: write_student(folder, tiny_backbone, student) for name, student in STUDENTS.items()}


def restored_by(backbone, file, student, **options) -> torch.Tensor:
    sampler = dataclasses.replace(SAMPLER, smallest=16, **SHIPPED | options).for_student(student)
    restorer = Restorer.load(backbone, sampler, file, torch.device("cpu"))
    return restorer(LR, (56, 72), ["a cat", "a cat"], ["a", "b"], 0)


def loaded(name) -> DiT4SRPipeline:
    pipe = DiT4SRPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_pipeline_takes_a_students_steps_from_its_file_and_saves_them(files, tiny_backbone, tmp_path):
    pipe = loaded(files["1 step"])
    expected = restored_by(tiny_backbone, files["1 step"], STUDENTS["1 step"])
    images = pipe(LR, **NAMES).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert pipe.config.sampler["sigmas"] == [0.5] and pipe.config.sampler["added_prompt"] == ""
    torch.testing.assert_close(pipe(LR, num_inference_steps=1, guidance_scale=1.0, **NAMES).images, images)
    with pytest.raises(ValueError, match=r"steps=10: the network is a student \(1 step\), for which steps is 1; leave"):
        pipe(LR, num_inference_steps=10)
    with pytest.raises(ValueError, match=r"guidance_scale=4.0: the network is a student \(1 step\)"):
        pipe(LR, guidance_scale=4.0)
    pipe.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.lr_stream.student == STUDENTS["1 step"] and again.config.sampler == pipe.config.sampler
    torch.testing.assert_close(again(LR, **NAMES).images, images, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_pipeline_gives_the_scale_to_a_network_that_takes_it(files, tiny_backbone):
    name = "guidance as input"
    pipe = loaded(files[name])
    images = pipe(LR, guidance_scale=3.0, num_inference_steps=2, **NAMES).images
    expected = restored_by(tiny_backbone, files[name], STUDENTS[name], guidance_scale=3.0, steps=2)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"negative_prompt=a dog: the network is a student \(guidance as input\)"):
        pipe(LR, negative_prompt="a dog")


def labels(page) -> dict[str, bool]:
    """Returns whether a field of the page is shown, by its label."""

    async def build() -> dict[str, bool]:  # outside of an event loop, Gradio makes some that it does not close
        blocks = page.blocks(4, "", 0).blocks.values()
        return {block.label: block.visible for block in blocks if getattr(block, "label", None)}

    return asyncio.run(build())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("4 steps", ["steps", "guidance", "negative prompt"]),
        ("guidance as input", ["negative prompt"]),
        ("guidance built in", ["guidance", "negative prompt"]),
    ],
)
def test_the_page_does_not_show_what_a_student_fixes(toy_backbone, tmp_path, name, hidden):
    student = STUDENTS[name]
    restorer = Restorer(student_net(toy_backbone, student), toy_backbone, SAMPLER.for_student(student))
    page = make_page(restorer, tmp_path / "page")
    fields = ("scale", "steps", "guidance", "negative prompt")
    assert [label for label in fields if not labels(page)[label]] == hidden
    restoring = {key: field for key, field in page.fields()["restore_file"].items() if key != "file"}
    sent = [2, "", restorer.sampler.steps, 1.0, "none", 0, "", ""]
    assert checked(restoring, sent) == sent
    if name == "4 steps":
        assert checked(restoring, [2, "", None, None, "none", 0, "", None]) == sent
        for place, value, message in (
            (2, 5, "steps=5: must be 4"),
            (3, 2.0, "guidance=2.0: must be 1.0"),
            (7, "a", ""),
        ):
            with pytest.raises(ValueError, match=f"{message}.*since the network is a student \\(4 steps\\)"):
                checked(restoring, [*sent[:place], value, *sent[place + 1 :]])
    Image.new("RGB", (9, 7), "orange").save(tmp_path / "a.png")
    chosen = {"steps": restorer.sampler.steps, "guidance_scale": 1.0, "negative_prompt": ""}
    _, picture = page.restored(tmp_path / "a.png", "a.png", 2, "", 0, chosen, lambda _: None)
    assert picture.color.shape == (3, 14, 18)


def test_a_student_goes_to_the_hub_and_comes_back_as_one(toy_backbone, monkeypatch, tmp_path):
    file = write_student(tmp_path, toy_backbone, STUDENTS["4 steps"])
    with serving(LocalHub(), monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert call("dit4sr_pl.convert", f"input={file}", "output=hub:me/student", cwd=tmp_path) is None
        repo = hub.repos["me/student"]
        card = ModelCard(repo.commits[repo.refs["main"]]["README.md"].decode())
        part = load_part(checkpoint_file("hub:me/student"))
    assert part.network_config["student"] == STUDENTS["4 steps"].as_dict()
    assert "a student, distilled from a teacher" in card.text and "restores in 4 steps, with one" in card.text
    assert "| student.sigmas " in card.text and "[1.0, 0.75, 0.5, 0.25]" in card.text
    assert {"distilled", "variant:full"} <= set(card.data.tags)


def test_the_released_layout_is_refused_to_students(toy_backbone, tmp_path):
    file = write_student(tmp_path, toy_backbone, STUDENTS["4 steps"])
    line = call("dit4sr_pl.convert", f"input={file}", "output=back", f"model.backbone.name={TOY_SD3}", cwd=tmp_path)
    assert (
        line.startswith("error: ") and "a student; the released layout cannot say how it samples. Share it as" in line
    )
    assert not list((tmp_path / "back").glob("*"))


@pytest.mark.parametrize("name", ["tiny-student-4", "tiny-student-1"])
def test_a_students_name_is_that_of_a_file_in_the_package(name, files, monkeypatch, tmp_path):
    assets = tmp_path / "assets"
    monkeypatch.setattr("dit4sr_pl.common.hub.ASSETS", assets)
    line = call("dit4sr_pl.restore", f"input={tmp_path}", "output=out", f"checkpoint={name}", cwd=tmp_path)
    assert line.startswith(f"error: {name}: no such file; give an LR-stream file")
    (assets / name).mkdir(parents=True)
    shutil.copy(files["4 steps"], assets / name / "lr_stream.safetensors")
    assert checkpoint_file(name) == assets / name / "lr_stream.safetensors"


@pytest.mark.parametrize("name, sigmas", [("tiny-student-4", 4), ("tiny-student-1", 1)])
def test_a_student_in_the_package_is_closer_to_a_photo_than_bicubic_enlargement(name, sigmas, tiny_backbone):
    file = checkpoint_file(name)
    student = Student.of(load_part(file).network_config)
    assert len(student.sigmas) == sigmas and file.stat().st_size <= 20e6
    hr = torch.from_numpy(astronaut()[None, 64:192, 192:320]).permute(0, 3, 1, 2) / 255
    lr = enlarge(hr, (32, 32))
    sampler = instantiate(read_conf("restore", "input=unused").sampler).for_student(student)
    restored = Restorer.load(tiny_backbone, sampler, file, torch.device("cpu"))(lr, (128, 128), [""], ["a"], 0)
    stlpips = create("stlpips")
    assert stlpips(restored, hr) < 0.8 * stlpips(enlarge(lr, (128, 128)), hr)


@pytest.mark.slow
def test_an_evaluation_of_a_student_is_a_row_of_its_own(toy_backbone, tmp_path, capsys):
    pairs = TOY_SD3.parent / "pairs"
    file = write_student(tmp_path, toy_backbone, STUDENTS["4 steps"])
    command = ["dataset=folder", "dataset.name=toy", f"dataset.lr={pairs / 'lr'}", f"dataset.hr={pairs / 'hr'}"]
    command += ["metrics=[psnr]", f"model.backbone.name={TOY_SD3}", "sampler.smallest=1", f"checkpoint={file}"]
    line = call("dit4sr_pl.evaluate", *command, "output=wrong", "sampler/solver=unipc", cwd=tmp_path)
    assert line == (
        f"error: sampler/solver=unipc: {file} is a student (4 steps), for which solver is 'euler'; leave it out, or "
        "give another checkpoint"
    )
    assert call("dit4sr_pl.evaluate", *command, "output=own", cwd=tmp_path) is None
    identity = json.loads((tmp_path / "own" / "settings.json").read_text())["method"]
    assert identity["label"] == "DiT4SR, 4 steps" and identity["sampler"]["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    capsys.readouterr()
    assert call("dit4sr_pl.compare", "own", cwd=tmp_path) is None
    assert "DiT4SR, 4 steps " in capsys.readouterr().out
