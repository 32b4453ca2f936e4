"""The diffusers pipeline gives what the restorer behind the command gives."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch._dynamo.utils import counters

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.files import ASSETS, is_shipped
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Variant, compilation, load_part, lr_stream, save_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.restorer import Restorer
from testing.toy_runs import SAMPLER, SHIPPED

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SETTINGS = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe() -> DiT4SRPipeline:
    pipe = DiT4SRPipeline.from_pretrained("tiny-dit4sr")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def lr() -> torch.Tensor:
    return enlarge(torch.rand(2, 3, 5, 5, generator=generator("cpu", 0)), (14, 18))


def test_it_restores_what_the_restorer_restores(pipe, lr):
    sampler_options = dict(
        added_prompt="sharp", negative_prompt="blurry", tile=4, overlap=2, color="wavelet", smallest=1
    )
    sampler = replace(SAMPLER, steps=2, guidance_scale=1.5, **SHIPPED | sampler_options)
    restorer = Restorer.load(Backbone("tiny-sd3", "float32", 8), sampler, "tiny-dit4sr", torch.device("cpu"))
    expected = restorer(lr, (28, 36), ["a cat", ""], ["0", "1"], seed=3)
    images = pipe(lr, ["a cat", ""], scale=2, guidance_scale=1.5, seed=3, **SETTINGS, **sampler_options).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert not torch.equal(pipe(lr, scale=2, seed=4, **SETTINGS).images, pipe(lr, scale=2, seed=3, **SETTINGS).images)


def test_images_without_colour_come_back_without_and_others_with_theirs(pipe, lr):
    grey = lr.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    mixed = pipe(torch.stack([grey[0], lr[1]]), scale=2, **SETTINGS).images
    spread = 255 * (mixed.amax(1) - mixed.amin(1)).flatten(1).amax(1)
    assert spread[0] <= 3 < spread[1]


def test_projections_are_merged_once_a_call_and_what_is_saved_stays(pipe, lr, monkeypatch):
    before = {name: tensor.clone() for name, tensor in pipe.lr_stream.state_dict().items()}
    products, merged = [], []
    product, network = lr_stream.product, pipe.network
    monkeypatch.setattr(lr_stream, "product", lambda *linears: products.append(linears) or product(*linears))
    monkeypatch.setattr(pipe, "network", lambda: merged.append(network()) or merged[-1])
    pipe(lr, num_inference_steps=2)
    attentions = [module for module in merged[0].lr_stream.modules() if isinstance(module, lr_stream.LRAttention)]
    assert len(products) == sum(3 if each.needs_output else 2 for each in attentions)
    assert all(each.merged for each in attentions)
    assert not any(getattr(module, "merged", False) for module in pipe.lr_stream.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.lr_stream.state_dict().items())
    out = [net.blocks[0].attn.out.weight.data_ptr() for net in (merged[0].lr_stream, pipe.lr_stream)]
    assert out[0] == out[1]


@pytest.mark.slow
def test_the_calls_defaults_are_the_models_own(pipe, lr):
    bars = []
    pipe.progress_bar, ours = lambda total: bars.append(total) or ours(total=total), pipe.progress_bar
    plain = pipe(lr[:1], output_type="np").images
    assert bars == [10] and plain.shape == (1, 56, 72, 3)
    assert (plain == pipe(lr[:1], "", 4, 12, 1.0, seed=0, output_type="np", **SHIPPED).images).all()
    paper = DiT4SRPipeline(**pipe.components)
    assert paper.config.sampler["steps"] == 40 and paper.config.sampler["guidance_scale"] == 8.0


def test_what_it_saves_it_loads_and_restores_the_same(pipe, lr, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {"config.json", "diffusion_pytorch_model.safetensors"} == {
        f.name for f in (tmp_path / "lr_stream").iterdir()
    }
    again = DiT4SRPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for model in (again.transformer, again.vae, again.lr_stream, *(getattr(again, name) for name in ENCODERS)):
        for weight in model.parameters():
            weight.data = weight.data.clone()  # mapped files are not aligned, and sums on a CPU depend on that
    assert torch.equal(again(lr, **SETTINGS).images, pipe(lr, **SETTINGS).images)
    assert again.config.sampler == pipe.config.sampler and again.config.sampler["t5_tokens"] == 8


@pytest.mark.slow
def test_any_lr_stream_over_its_base_in_any_precision(tiny_backbone, lr, tmp_path):
    net = DiT4SRTransformer(tiny_backbone.transformer, Variant(lr_injection="linear", injection_scale=1.2))
    torch.nn.init.normal_(net.lr_stream.blocks[0].injection.linear.weight, std=0.02, generator=generator("cpu", 1))
    save_part(part_of(net, base_of(net, "tiny-sd3")), tmp_path / "d.safetensors")
    arguments = {"lr_stream": tmp_path / "d.safetensors", "text_encoder_3": None, "tokenizer_3": None}
    pipe = DiT4SRPipeline.from_pretrained("tiny-sd3", **arguments)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.network().variant == net.variant
    pipe.save_pretrained(tmp_path / "saved")
    half = DiT4SRPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.lr_stream.dtype == half.transformer.dtype == torch.bfloat16
    difference = half(lr, **SETTINGS).images - pipe(lr, **SETTINGS).images
    assert 0 < difference.abs().mean() < 0.02


@pytest.mark.slow
def test_the_factor_of_lr_injection_is_an_argument_that_saved_folders_keep(pipe, lr, tmp_path):
    scaled = DiT4SRPipeline.from_pretrained("tiny-dit4sr", injection_scale=0.3)
    scaled.set_progress_bar_config(disable=True)
    sampler = replace(SAMPLER, steps=2, smallest=16, **SHIPPED)
    arguments = Backbone("tiny-sd3", "float32", 8), sampler, "tiny-dit4sr", torch.device("cpu"), False, 0.3
    expected = Restorer.load(*arguments)(lr, (56, 72), ["", ""], ["0", "1"], seed=0)
    images = scaled(lr, **SETTINGS).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert (images - pipe(lr, **SETTINGS).images).abs().max() > 0.01
    scaled.save_pretrained(tmp_path)
    assert DiT4SRPipeline.from_pretrained(tmp_path).network().variant.injection_scale == 0.3


def test_pillow_images_in_and_out(pipe, lr):
    pixels = (lr * 255).round().byte()
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    restored = pipe(images, num_inference_steps=2).images
    expected = (pipe(pixels / 255, **SETTINGS).images * 255).round().byte()
    assert [image.size for image in restored] == [(72, 56)] * 2
    for image, each in zip(restored, expected, strict=True):
        assert image.tobytes() == each.permute(1, 2, 0).numpy().tobytes()
    ((alone,),) = pipe(images[0], num_inference_steps=2, return_dict=False)
    levels = [torch.from_numpy(np.array(image)).int() for image in (alone, restored[0])]
    torch.testing.assert_close(*levels, atol=1, rtol=0)  # sums of another batch size may round to the next level
    with pytest.raises(ValueError, match="one size per call, got 18x14, 14x18"):
        pipe([images[0], images[0].transpose(Image.Transpose.ROTATE_90)])


def test_a_file_is_restored_as_under_its_name(pipe, lr, tmp_path):
    write_image(tmp_path / "cat.png", lr[0])
    expected = pipe(read_image(tmp_path / "cat.png")[None] / 255, names=["cat"], **SETTINGS).images
    assert torch.equal(pipe(str(tmp_path / "cat.png"), **SETTINGS).images, expected)


@pytest.mark.slow
def test_generators_stand_in_for_the_seed(pipe, lr):
    expected = pipe(lr, seed=3, **SETTINGS).images
    generators = [generator("cpu", "restore", 3, place) for place in "01"]
    assert torch.equal(pipe(lr, generator=generators, **SETTINGS).images, expected)


@pytest.mark.slow
def test_offloading_moves_each_component_before_it_works(pipe, lr, monkeypatch):
    """The CPU stands in for the accelerator; the hooks treat `cpu:0` and `cpu` as two devices."""
    expected, moved = pipe(lr, **SETTINGS).images, []
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(component): name for name, component in pipe.components.items()}
    for component in (pipe.vae, pipe.text_encoder_3, pipe.transformer, pipe.lr_stream):
        before = component._hf_hook.pre_forward

        def pre_forward(module, *inputs, before=before, **options):
            moved.append(names[id(module)])
            return before(module, *inputs, **options)

        monkeypatch.setattr(component._hf_hook, "pre_forward", pre_forward)
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: moved.append("freed"))
    assert torch.equal(pipe(lr, **SETTINGS).images, expected)
    pipe.remove_all_hooks()
    steps = ["transformer", "lr_stream"] * 2
    assert moved == ["vae", "text_encoder_3", *steps, "vae", "freed"]
    with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
def test_a_compiled_pipeline_finds_its_graphs_once_and_restores_the_same(pipe, lr, monkeypatch):
    """The compiler's front end runs, which finds graphs and says when they must be found anew; its kernels are those of
    tests/model/test_compilation.py. With tiles the last batch is filled up to one shape.
    """
    compile_eagerly = partial(compilation.compile_blocks, backend="eager")
    monkeypatch.setattr("dit4sr_pl.pipeline.compile_blocks", compile_eagerly)
    compiled = DiT4SRPipeline.from_pretrained("tiny-dit4sr", compile=True)
    compiled.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    counters.clear()
    tiles = {"tile": 4, "overlap": 2, "smallest": 1, "tile_memory": 1e-3, "guidance_scale": 1.5}
    for seed in (0, 1):
        images = compiled(lr, scale=2, seed=seed, **SETTINGS, **tiles).images
        if seed == 0:
            graphs = counters["stats"]["unique_graphs"]
        expected = pipe(lr, scale=2, seed=seed, **SETTINGS, **tiles).images
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert 2 <= graphs <= 3 and counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert not pipe.compile


def test_what_cannot_be_compiled_or_captured_is_refused_in_one_line(pipe, lr, monkeypatch):
    for options in ({}, {"_hf_hook": None}):
        monkeypatch.setattr(pipe, "cuda_graph", True)
        for name, value in options.items():
            monkeypatch.setattr(pipe.transformer, name, value, raising=False)
        message = "without offloading" if options else "cuda_graph=true needs a CUDA device, and not cpu"
        with pytest.raises(ValueError, match=message):
            pipe.prepared_network()
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match="compile=true needs a C\\+\\+ compiler"):
        DiT4SRPipeline.from_pretrained("tiny-dit4sr", compile=True)


def test_a_network_with_graphs_is_kept_until_a_weight_changes(pipe, monkeypatch):
    monkeypatch.setattr("dit4sr_pl.pipeline.capture_graphs", lambda net: None)
    monkeypatch.setattr(pipe, "cuda_graph", True)
    first = pipe.prepared_network()
    assert pipe.prepared_network() is first
    with torch.no_grad():
        pipe.lr_stream.blocks[0].attn.q.weight.mul_(1)
    second = pipe.prepared_network()
    assert second is not first and pipe.prepared_network() is second
    monkeypatch.setattr(pipe, "cuda_graph", False)
    assert pipe.prepared_network() is not second and pipe.captured is None


def test_a_folder_of_another_pipeline_gets_the_papers_sampler_also_by_an_absolute_path(pipe, tmp_path):
    shutil.copytree(ASSETS / "tiny-sd3", tmp_path / "sd3")
    over = DiT4SRPipeline.from_pretrained(tmp_path / "sd3", lr_stream="tiny-dit4sr", dtype=torch.float32)
    assert (over.config.sampler["steps"], over.config.sampler["guidance_scale"]) == (40, 8.0)
    assert pipe.config.sampler["steps"] == 12
    assert not any(map(is_shipped, (ASSETS / "tiny-sd3", ".", "..", "published", "tiny-dit4sr")))


def test_what_it_cannot_run_is_refused_in_one_line(pipe, lr, tiny_backbone, tmp_path):
    baseline = SD3ControlNet(tiny_backbone.transformer, num_layers=1)
    save_part(part_of(baseline, base_of(baseline, "tiny-sd3")), tmp_path / "controlnet.safetensors")
    with pytest.raises(
        ValueError, match="controlnet.safetensors: holds sd3_controlnet, and the pipeline runs LR streams"
    ):
        DiT4SRPipeline.from_pretrained("tiny-sd3", lr_stream=tmp_path / "controlnet.safetensors")
    part = load_part(checkpoint_file("tiny-dit4sr"))
    save_part(replace(part, base=part.base | {"parts": {"vae": "another"}}), tmp_path / "lr_stream.safetensors")
    with pytest.raises(ValueError, match="lr_stream.safetensors: trained over another autoencoder than the vae of"):
        DiT4SRPipeline.from_pretrained(tmp_path / "lr_stream.safetensors")
    other = SD3Transformer2DModel.from_config(tiny_backbone.transformer.config)
    with pytest.raises(ValueError, match="lr_stream: trained over tiny-sd3, and this base model has other weights"):
        DiT4SRPipeline(**pipe.components | {"transformer": other})
    for wrong, message in (
        ({"scale": 0.5}, "scale=0.5"),
        ({"output_type": "jpeg"}, "output_type=jpeg: choose one of pil, pt, np"),
        ({"prompt": ["a"]}, "one prompt each"),
        ({"color": "red"}, "red"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(lr, **wrong)
