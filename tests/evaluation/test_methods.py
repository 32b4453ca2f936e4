import pickle
import signal
import struct
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.hashing import file_hash
from dit4sr_pl.common.processes import run_to_end
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.evaluation.benchmark_sets import read
from dit4sr_pl.evaluation.methods import LRImage
from dit4sr_pl.evaluation.methods.command import Command
from dit4sr_pl.evaluation.methods.spandrel import in_tiles, load
from dit4sr_pl.images.files import write_image
from dit4sr_pl.model import SD3ControlNet, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.restoration.color import moments
from testing.commands import is_alive, wait_until

METHODS = sorted((conf_folder() / "method").glob("*.yaml"))
PAPER = {"Real-ESRGAN", "SwinIR", "ResShift", "StableSR", "SeeSR", "DiffBIR", "OSEDiff", "SUPIR", "DreamClear"}
PAPER |= {"SD3-ControlNet", "DiT4SR", "Bicubic"}


def method(*overrides):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return instantiate(compose("evaluate", ["device=cpu", *map(str, overrides)]).method)


def photo(height=9, width=11, name="a", caption=""):
    """Returns an LR image of middle grey levels, so that no result overshoots."""
    return LRImage(name, 0.3 + 0.4 * torch.rand(1, 3, height, width, generator=generator("cpu", name)), caption)


def restored(method, *photos):
    return dict(method(photos))


@pytest.mark.slow
def test_every_row_of_the_paper_has_a_method():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        methods = [compose("evaluate", [f"method={path.stem}"]).method for path in METHODS if path.stem != "command"]
    assert {method.label for method in methods} - {None} == PAPER - {"SD3-ControlNet"} | {
        "DiT4SR-R1"
    }  # others as the checkpoint says


@pytest.mark.parametrize(
    "name, label, script", [("dit4sr_released", "DiT4SR-R1", "wollava_r1"), ("dit4sr_released_q", "DiT4SR", "wollava")]
)
def test_each_release_has_the_authors_own_script(name, label, script):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("evaluate", [f"method={name}"]).method
    weights = "preset/models/dit4sr_q" if label == "DiT4SR" else "preset/models/dit4sr_r1"
    assert (cfg.label, cfg.weights.dit4sr, cfg.arguments[0]) == (label, weights, f"test/test_{script}.py")
    assert "--prompt_path={prompts}" in cfg.arguments and "stable-diffusion-3.5-medium" in cfg.weights.sd


def test_bicubic_is_pillows(tmp_path):
    write_image(tmp_path / "a.png", photo().lr[0])
    expected = Image.open(tmp_path / "a.png").resize((44, 36), Image.Resampling.BICUBIC)
    expected.save(tmp_path / "pillow.png")
    sr = restored(method("method=bicubic"), LRImage("a", read(tmp_path / "a.png"), ""))["a"]
    torch.testing.assert_close(sr, read(tmp_path / "pillow.png")[0], atol=1.5 / 255, rtol=0)


def test_dit4sr_gives_four_times_the_size_in_the_enlarged_images_colours():
    tiny = method("sampler.steps=2")
    assert (tiny.label, tiny.variant) == ("DiT4SR", "full") and len(tiny.weights_hash) == 32
    lr = photo(9, 11)
    sr = restored(tiny, lr)["a"]
    assert sr.shape == (3, 36, 44)
    again = restored(tiny, photo(8, 8, "b"), lr)["a"]
    assert torch.equal(sr, again)
    wanted, given = (torch.cat(moments(images)) for images in (lr.lr, sr[None]))
    torch.testing.assert_close(given, wanted, atol=0.05, rtol=0)
    assert not torch.equal(sr, restored(method("sampler.steps=2", "seed=1"), lr)["a"])


@pytest.mark.slow
def test_batches_of_any_size_restore_what_each_image_alone_gives(monkeypatch):
    """The last batch is smaller, and another size lies between; each image has its own noise and prompt."""
    photos = [photo(9, 11, name, f"A {name}.") for name in "abcd"] + [photo(8, 12, "e"), photo(9, 11, "f")]
    small = "sampler.steps=2", "sampler.smallest=2"
    alone, together = (method(*small, f"batch_size={size}") for size in (1, 3))
    assert alone.identity == together.identity
    expected, counts, network = restored(alone, *photos), [], alone.restorer
    monkeypatch.setattr(together, "restorer", lambda lr, *rest: counts.append(len(lr)) or network(lr, *rest))
    results = restored(together, *photos)
    assert list(results) == list(expected) == list("abcdef") and counts == [3, 1, 1, 1]
    for name, image in results.items():
        torch.testing.assert_close(image, expected[name], atol=2e-5, rtol=0)
    assert all((expected["a"] - expected[name]).abs().max() > 0.1 for name in "bcdf")


def test_an_lr_image_of_one_pixel_is_restored():
    assert restored(method("sampler.steps=1"), photo(1, 1))["a"].shape == (3, 4, 4)


def test_the_baseline_is_restored_under_its_own_name(tmp_path, tiny_backbone):
    net = SD3ControlNet(tiny_backbone.transformer, 4)
    save_part(part_of(net, base_of(net, "tiny-sd3")), tmp_path / "controlnet.safetensors")
    baseline = method("sampler.steps=1", f"checkpoint={tmp_path / 'controlnet.safetensors'}")
    assert (baseline.label, baseline.variant) == ("SD3-ControlNet", "")
    assert restored(baseline, photo())["a"].shape == (3, 36, 44)


def weights(kind, folder):
    """Random weights of the published architectures, smaller, as their authors save them."""
    torch.manual_seed(0)
    if kind == "realesrgan":
        net = ESRGAN(num_filters=8, num_blocks=1, scale=4)
    else:
        net = SwinIR(
            img_size=16, window_size=8, depths=[2, 2], embed_dim=12, num_heads=[2, 2], mlp_ratio=2, upscale=4,
            upsampler="nearest+conv", resi_connection="1conv",
        )  # fmt: skip
    torch.save({"params_ema": net.state_dict()}, folder / f"{kind}.pth")
    return net.eval(), folder / f"{kind}.pth"


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in SwinIR, and silent in the command
@pytest.mark.parametrize("kind, label", [("realesrgan", "Real-ESRGAN"), ("swinir", "SwinIR")])
@torch.no_grad()
def test_published_weight_files_give_what_their_network_gives(kind, label, tmp_path):
    net, path = weights(kind, tmp_path)
    found = method(f"method={kind}", f"weights={path}")
    assert (found.label, found.weights_hash) == (label, file_hash(path))
    photos, found.batch_size = [photo(16, 24, name) for name in "abc"], 2
    for (name, sr), lr in zip(restored(found, *photos).items(), photos, strict=True):
        assert name == lr.name
        torch.testing.assert_close(sr, net(lr.lr)[0].clamp(0, 1), atol=1e-6, rtol=0)
    assert restored(found, photo(9, 11))["a"].shape == (3, 36, 44)
    assert method("method=spandrel", f"weights={path}").label == {"realesrgan": "ESRGAN", "swinir": "SwinIR"}[kind]


def write_ncnn(net, path):
    """Writes an ESRGAN's convolutions as ncnn does, in half precision; returns the file."""
    layers, data = ["Input input 0 1 data"], b""
    state = list(net.state_dict().values())
    for i, (weight, bias) in enumerate(zip(state[::2], state[1::2], strict=True)):
        values = weight.numpy().astype("<f2").tobytes()
        data += struct.pack("<I", 0x01306B47) + values + b"\0" * (-len(values) % 4) + bias.numpy().tobytes()
        outputs, _, kernel, _ = weight.shape
        layers += [f"Convolution c{i} 1 1 a b 0={outputs} 1={kernel} 4=1 5=1 6={weight.numel()} 9=2 -23310=1,0.2"]
    path.with_suffix(".param").write_text("\n".join(["7767517", f"{len(layers)} 1", *layers]))
    path.write_bytes(data)
    return path


@torch.no_grad()
def test_ncnns_files_give_what_their_network_gives_in_half_precision(tmp_path):
    torch.manual_seed(0)
    net = ESRGAN(num_filters=7, num_blocks=2, scale=4).half().float().eval()  # odd counts are padded
    path = write_ncnn(net, tmp_path / "x4plus.bin")
    found = method("method=realesrgan", f"weights={path}")
    assert (found.label, found.weights_hash) == ("Real-ESRGAN", file_hash(path))
    lr = photo(16, 24)
    torch.testing.assert_close(restored(found, lr)["a"], net(lr.lr)[0].clamp(0, 1), atol=1e-6, rtol=0)


def test_ncnns_files_that_do_not_fit_get_one_line(tmp_path):
    whole = write_ncnn(ESRGAN(num_filters=8, num_blocks=1, scale=4), tmp_path / "whole.bin")
    data, layout = whole.read_bytes(), whole.with_suffix(".param").read_text()
    for name, (found, text, message) in {
        "cut": (data[:-5], layout, "damaged, or cut.param is of another network"),
        "longer": (data + data[:8], layout, "damaged, or longer.param is of another network"),
        "other": (data, layout.replace("0=8 ", "0=9 "), "damaged, or other.param is of another network"),
        "text": (data, "not ncnn's", "damaged, or text.param is of another network"),
        "odd": (b"", "7767517\n0 0", "0 convolutions; no ESRGAN has that many"),
        "alone": (data, None, "alone.param must lie next to it"),
    }.items():
        (tmp_path / f"{name}.bin").write_bytes(found)
        if text is not None:
            (tmp_path / f"{name}.param").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load(tmp_path / f"{name}.bin")
        assert "\n" not in str(error.value)


def test_tiles_are_seamless_where_the_margin_covers_what_the_network_sees():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 3, 5, padding=2), torch.nn.Upsample(scale_factor=4), torch.nn.Conv2d(3, 3, 5, padding=2)
    net = torch.nn.Sequential(*layers).requires_grad_(False)
    lr = photo(23, 30).lr
    for tile, margin in ((64, 0), (8, 3), (10, 3)):
        torch.testing.assert_close(in_tiles(net, lr, tile, margin), net(lr), atol=1e-6, rtol=0)
    assert not torch.allclose(in_tiles(net, lr, 8, 0), net(lr), atol=1e-3)


class Harm:
    def __reduce__(self):
        return open, ("harm.txt", "w")


def test_weight_files_that_will_not_do_are_told_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"params": Harm()}, "harm.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Harm()))
    save_file({"a": torch.zeros(3)}, "other.safetensors")
    torch.save(ESRGAN(num_filters=8, num_blocks=1, scale=2).state_dict(), "double.pth")
    _, path = weights("realesrgan", tmp_path)
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "x.pt").write_bytes(path.read_bytes())
    for name, message in {
        "none.pth": "none.pth: no such file",
        "harm.pth": "damaged or not weights",
        "pickle.pth": "damaged or not weights",
        "cut.pth": "damaged or not weights",
        "other.safetensors": "no network that spandrel knows",
        "double.pth": "a ESRGAN that enlarges x2",
        "x.pt": "must end in",
    }.items():
        with pytest.raises(Exception, match=message):
            method("method=spandrel", f"weights={name}")
    assert not (tmp_path / "harm.txt").exists()


STAND_IN = """
import pathlib, sys
from PIL import Image
source, target, prompts, factor, mode = sys.argv[1:]
print("working on", len(list(pathlib.Path(source).iterdir())), "images")
if mode == "fail":
    sys.exit("no GPU here")
(pathlib.Path(target) / "sample00").mkdir()
suffix = "_0" if any(path.read_text() for path in pathlib.Path(prompts).iterdir()) else ""
for path in sorted(pathlib.Path(source).glob("*.png")):
    image = Image.open(path)
    if mode == path.stem:
        continue
    image = image.resize([int(factor) * side for side in image.size], Image.NEAREST)
    image.save(pathlib.Path(target) / "sample00" / (path.stem + suffix + ".png"))
"""


@pytest.fixture
def stand_in(tmp_path):
    """A checkout of someone else's system, which repeats pixels."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "test.py").write_text(STAND_IN)
    (tmp_path / "checkout" / "sd.ckpt").write_bytes(b"weights")

    def build(factor="4", mode="work", **options) -> Command:
        arguments = ["test.py", "{input}", "{output}", "{prompts}", factor, mode]
        settings = dict(label="SeeSR", checkout=tmp_path / "checkout", python=sys.executable, arguments=arguments)
        settings |= dict(weights={"sd": "sd.ckpt"}, outputs="sample00", suffixes=["", "_0"], side=None, seed=0)
        return Command(**settings | dict(work=tmp_path / "work") | options)

    return build


def test_a_command_runs_in_its_checkout_and_its_results_are_collected(stand_in, tmp_path):
    command = stand_in()
    photos = photo(5, 6, "a"), photo(7, 3, "a_0", "A cat."), photo(4, 4, "b c")
    sr = restored(command, *photos)
    for name, lr, _ in photos:
        levels = (lr[0] * 255).round() / 255
        torch.testing.assert_close(sr[name], levels.repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1e-6, rtol=0)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["log.txt"]
    assert "working on 3 images" in (tmp_path / "work" / "log.txt").read_text()
    assert command.identity["weights"] == {"sd": file_hash(tmp_path / "checkout" / "sd.ckpt")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "fail"}, r"SeeSR: its command ended with exit code 1 \(no GPU here\); see .*log.txt"),
        ({"mode": "b"}, r"SeeSR: no result in .*sample00 for b; see .*log.txt"),
        ({"outputs": "elsewhere"}, r"SeeSR: no result in .*elsewhere for a, b; see"),
        ({"factor": "2"}, r"SeeSR: not 4 times as large as the LR image: .*a.png \(22, 18\), .*b.png"),
    ],
)
def test_what_goes_wrong_in_a_command_is_told_in_one_line(stand_in, options, message):
    with pytest.raises(ValueError, match=message):
        restored(stand_in(**options), photo(name="a"), photo(name="b"))


def test_what_a_command_has_made_is_kept_when_it_leaves_out_an_image(stand_in):
    """The next call gives it the others only; so it does after a call that was killed."""
    method = stand_in(mode="b")
    names = []
    with pytest.raises(ValueError, match="no result in .* for b; see"):
        for name, _ in method([LRImage(name, photo(name=name).lr, "") for name in "abc"]):
            names.append(name)
    assert names == ["a", "c"]
    method = stand_in(mode="fail")  # it makes nothing; what is there is from the call before
    with pytest.raises(ValueError, match="exit code 1"):
        for name, _ in method([LRImage(name, photo(name=name).lr, "") for name in "abc"]):
            names.append(name)
    assert names == ["a", "c", "a", "c"]
    assert [path.name for path in (method.work / "lr").iterdir()] == ["b.png"]


@pytest.mark.slow
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, -2)])
def test_a_command_and_all_that_it_started_end_with_the_process_that_started_it(signum, code):
    """Also what it started in a session of its own, as torchrun does, and what its ended children left."""
    program = "import signal, sys, pathlib; from dit4sr_pl.common.processes import run_to_end\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "run_to_end(['sh', '-c', sys.argv[1]], pathlib.Path('.'), sys.stdout)"
    script = "echo $$; sleep 100 & echo $!; setsid sleep 100 & echo $!; (sleep 100 & echo $!); echo; wait"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, "-c", program, script], **pipes) as parent:
        started = [int(line) for line in iter(parent.stdout.readline, "\n")]
        parent.send_signal(signum)
        assert parent.wait() == code and len(started) == 4
        wait_until(lambda: not any(map(is_alive, started)))


@pytest.mark.slow
def test_a_commands_exit_code_is_that_of_a_shell_and_nothing_stays_behind(tmp_path):
    with (tmp_path / "log.txt").open("w+") as log:
        assert run_to_end(["sh", "-c", "sleep 100 & echo $!; exit 3"], tmp_path, log) == 3
        left = int((tmp_path / "log.txt").read_text())
        assert not is_alive(left)
        assert run_to_end(["sh", "-c", "kill -9 $$"], tmp_path, log) == 137
        assert run_to_end(["./none"], tmp_path, log) == 127
    assert "./none: cannot be started (No such file or directory)" in (tmp_path / "log.txt").read_text()


def test_images_that_the_script_would_crop_and_places_that_are_none_are_told(stand_in):
    with pytest.raises(ValueError, match="a: 6x5; SeeSR's script takes 8x8"):
        restored(stand_in(side=8), photo(5, 6, "a"))
    with pytest.raises(ValueError, match="method.arguments: {word} is no placeholder"):
        stand_in(arguments=["test.py", "{word}"])


def test_a_checkout_without_its_weights_is_told_before_anything_runs(stand_in):
    with pytest.raises(
        FileNotFoundError, match="SeeSR: these do not exist: method.python=nopython, method.weights.x=.*no.ckpt"
    ):
        stand_in(python="nopython", weights={"x": "no.ckpt"})
    with pytest.raises(FileNotFoundError, match="method.checkout=nowhere"):
        stand_in(checkout="nowhere")


@pytest.mark.slow
def test_every_command_lines_places_are_filled(tmp_path):
    for path in METHODS:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("evaluate", [f"method={path.stem}", f"output={tmp_path / 'out'}", "seed=7"])
        if not cfg.method._target_.endswith("Command") or path.stem == "command":
            continue
        cfg.method.checkout, cfg.method.python = str(tmp_path), sys.executable
        for place in cfg.method.weights.values():
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
        command = instantiate(cfg.method)
        line = " ".join(command.command)
        assert str(tmp_path / "out" / "command" / "1" / "1" / "lr") in line and "{" not in line
        assert all(str(tmp_path / place) in line for key, place in cfg.method.weights.items() if key != "ram")
        assert "seed=7" in line
