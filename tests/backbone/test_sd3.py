import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import SequentialHook
from diffusers import AutoencoderDC, AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.sd3 import Backbone, encoders_of
from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.resize import LazyEnlargement, enlarge

CPU = torch.device("cpu")


def test_tiny_sd3_is_a_whole_pipeline_of_at_most_40_mb(tiny_backbone):
    assert sum(file.stat().st_size for file in (ASSETS / "tiny-sd3").rglob("*")) <= 40e6
    assert isinstance(tiny_backbone.coder.vae, AutoencoderDC)
    assert tiny_backbone.coder.factor == 8 and tiny_backbone.transformer.config.in_channels == 16
    assert tiny_backbone.scheduler.config.shift == 3.0


def test_components_are_read_only_when_asked_for(monkeypatch):
    read = []
    monkeypatch.setattr(Backbone, "read", lambda self, kind, **arguments: read.append(arguments.get("subfolder")))
    backbone = Backbone("tiny-sd3", "float32", 8)
    assert read == []
    _ = backbone.scheduler
    assert read == ["scheduler"]


@pytest.mark.parametrize("shown", [True, False])
def test_reading_a_component_leaves_progress_bars_as_they_were(shown):
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    before = [each.is_progress_bar_enabled() for each in libraries]
    seen = []

    class Component:
        @classmethod
        def from_pretrained(cls, *_, **__):
            seen.extend(each.is_progress_bar_enabled() for each in libraries)
            raise OSError("there is none")

    try:
        for each in libraries:
            each.enable_progress_bar() if shown else each.disable_progress_bar()
        with pytest.raises(FileNotFoundError):
            Backbone("tiny-sd3", "float32", 8).read(Component)
        assert seen == [False, False] and [each.is_progress_bar_enabled() for each in libraries] == [shown, shown]
    finally:
        for each, enabled in zip(libraries, before, strict=True):
            each.enable_progress_bar() if enabled else each.disable_progress_bar()


def test_moving_reads_nothing_and_counts_for_what_is_read_later():
    backbone = Backbone("tiny-sd3", "float32", 8)
    vae = backbone.coder.vae
    backbone.to(torch.device("meta"))
    assert {"transformer", "text_encoders", "prompts"}.isdisjoint(vars(backbone))
    for model in (vae, backbone.transformer, backbone.text_encoders.text_encoder_3):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_half_downloaded_file_is_named_with_what_to_do(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-sd3", folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5_000_000])
    with pytest.raises(FileNotFoundError, match=r"model\.backbone\.name=.*transformer cannot be read"):
        _ = Backbone(str(folder), "float32", 8).transformer


@pytest.mark.parametrize("missing", ["", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_what_is_missing_is_named_with_what_to_do(tmp_path, missing):
    folder = tmp_path / "model"
    if missing:
        shutil.copytree(ASSETS / "tiny-sd3", folder)
        (folder / missing).unlink()
    backbone = Backbone(str(folder), "float32", 8)
    with pytest.raises(FileNotFoundError, match=r"model\.backbone\.name=.*cannot be read.*Give a folder"):
        _ = backbone.transformer, backbone.coder


def test_prompts_equal_diffusers_and_those_of_a_batch_are_encoded_once_and_together(tiny_backbone, monkeypatch):
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        ASSETS / "tiny-sd3", transformer=None, vae=None, dtype=torch.float32
    )
    prompts = ["a cat", "", "a cat"]
    expected, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=8
    )
    encoder, calls = PromptEncoder(pipeline, 8), []
    for model in encoders_of(pipeline):
        model.register_forward_pre_hook(lambda model, inputs: calls.append((type(model).__name__, len(inputs[0]))))
    embeds, pooled_embeds = encoder(prompts, CPU)
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled_embeds, pooled)
    models = [type(model).__name__ for model in encoders_of(pipeline)]
    assert embeds.shape == (3, 16, 64) and calls == [(model, 2) for model in models]  # two prompts, together
    calls.clear()
    assert torch.equal(encoder(["a dog", "", "a bird"], CPU)[0][1], embeds[1])
    assert calls == [(model, 2) for model in models]
    together = encoder(["a dog", "a bird"], CPU)
    for prompt, *ours in zip(["a dog", "a bird"], *together, strict=True):
        alone = PromptEncoder(pipeline, 8)([prompt], CPU)
        torch.testing.assert_close(tuple(each[None] for each in ours), alone, atol=1e-5, rtol=1e-4)


def test_embeddings_of_a_training_step_do_not_depend_on_what_came_before(tiny_backbone, monkeypatch):
    """Encoders whose results depend on the number of rows, as matrix products' last bits do, stand in for real ones."""

    def encode_prompt(prompt, **_):
        rows = torch.full((len(prompt), 2, 3), float(len(prompt)))
        calls.append(prompt)
        return rows, None, rows[:, 0], None

    calls, step = [], ["a cat", "", "a dog", ""]
    monkeypatch.setattr(tiny_backbone.text_encoders, "encode_prompt", encode_prompt)
    earlier, resumed = (PromptEncoder(tiny_backbone.text_encoders, 8) for _ in range(2))
    earlier([""], CPU)  # as validation does
    earlier.of_step(["a cat", "a bird"], CPU)
    for ours, theirs in zip(earlier.of_step(step, CPU), resumed.of_step(step, CPU), strict=True):
        assert torch.equal(ours, theirs) and len(ours) == 4
    resumed.of_step(step, CPU)
    assert calls == [[""], ["a bird", "a cat"], *[["", "a cat", "a dog"]] * 2]


def test_without_t5_its_tokens_are_zeros_as_diffusers_has_them(tiny_backbone, tmp_path):
    folder = tmp_path / "sd3"
    shutil.copytree(ASSETS / "tiny-sd3", folder, ignore=shutil.ignore_patterns("*_3"))
    components = json.loads((folder / "model_index.json").read_text())
    components |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(components))
    embeds, pooled = Backbone(str(folder), "float32", 8).prompts(["a cat"], torch.device("cpu"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, vae=None, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        "a cat", "a cat", "a cat", do_classifier_free_guidance=False, max_sequence_length=8
    )
    torch.testing.assert_close((embeds, pooled), (expected, expected_pooled))
    whole, _ = tiny_backbone.prompts(["a cat"], torch.device("cpu"))
    assert embeds.shape == whole.shape and not embeds[:, 8:].any() and torch.equal(embeds[:, :8], whole[:, :8])


def test_prompts_that_came_last_are_remembered_and_no_more(tiny_backbone, monkeypatch):
    monkeypatch.setattr("dit4sr_pl.backbone.text_encoder.REMEMBERED", 3)
    encoder, calls = PromptEncoder(tiny_backbone.text_encoders, 8), []
    encode = tiny_backbone.text_encoders.encode_prompt
    counted = lambda **given: calls.extend(given["prompt"]) or encode(**given)  # noqa: E731
    monkeypatch.setattr(tiny_backbone.text_encoders, "encode_prompt", counted)
    for image in range(9):
        for prompts in ([f"caption {image}"], ["negative"]):  # as with guidance
            encoder(prompts, CPU)
    assert list(encoder.remembered) == ["caption 7", "caption 8", "negative"]
    assert calls.count("negative") == 1 and len(calls) == 10
    batch = [f"caption {image}" for image in range(9)]
    embeds, _ = encoder(batch, CPU)
    assert list(encoder.remembered) == batch[-3:]
    for each in encoder.remembered.values():  # none keeps its batch in memory
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in each)
    torch.testing.assert_close(embeds, torch.cat([encoder([prompt], CPU)[0] for prompt in batch]))


def test_latents_of_tiny_sd3_come_back_as_the_image_and_have_unit_scale(tiny_backbone):
    image = enlarge(torch.rand(2, 3, 4, 6, generator=generator("cpu", 0)), (64, 96))
    latents = tiny_backbone.coder.encode(image)
    assert latents.shape == (2, 16, 8, 12) and 0.2 < latents.std() < 5
    restored = tiny_backbone.coder.decode(latents)
    assert (restored - image).square().mean() < 10 ** (-3.0)  # 30 dB


def test_posterior_of_a_kl_autoencoder_is_sampled_for_hr_only():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    coder, image = LatentCoder(vae), torch.rand(2, 3, 16, 16)
    posterior = vae.encode(2 * image - 1).latent_dist
    torch.testing.assert_close(coder.encode(image), (posterior.mode() - 0.1) * 1.5)

    noise = torch.stack([torch.randn(4, 8, 8, generator=generator("cpu", i)) for i in range(2)])
    torch.testing.assert_close(coder.encode(image, noise), (posterior.mean + posterior.std * noise - 0.1) * 1.5)
    expected = vae.decode(posterior.mode()).sample / 2 + 0.5
    torch.testing.assert_close(coder.decode(coder.encode(image)), expected.clamp(0, 1))
    assert coder.factor == 2


def kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4] * 4,
        norm_num_groups=2,
        shift_factor=0.1,
        **config,
    )


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(64, 96), (168, 96), (40, 200)])
@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderKL"])
def test_tiles_of_an_autoencoder_are_blended_as_diffusers_does(tiny_backbone, kind, height, width):
    coder = tiny_backbone.coder if kind == "AutoencoderDC" else LatentCoder(kl(scaling_factor=1.5))
    image = enlarge(torch.rand(1, 3, 4, 4, generator=generator("cpu", 0)), (height, width))
    latents = coder.encode(image)
    whole = coder.decode(latents)
    assert torch.equal(coder.encode_tiled(image, 28), latents)
    assert torch.equal(torch.cat(list(coder.decode_tiled(latents, 28)), dim=2), whole)

    ours, decoded = coder.encode_tiled(image, 8), torch.cat(list(coder.decode_tiled(latents, 8)), dim=2)
    if kind == "AutoencoderDC":
        coder.vae.enable_tiling(64, 64, 48, 48)
    else:
        coder.vae.enable_tiling()
        coder.vae.tile_sample_min_size, coder.vae.tile_latent_min_size = 64, 8
    torch.testing.assert_close(ours, coder.encode(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded, coder.decode(latents), atol=1e-6, rtol=0)
    coder.vae.disable_tiling()
    assert not torch.equal(ours, latents) and not torch.equal(decoded, whole)


def test_offloaded_components_give_the_same_and_leave_the_device_after_they_ran(tiny_backbone):
    image, cpu = enlarge(torch.rand(1, 3, 4, 4, generator=generator("cpu", 0)), (64, 64)), torch.device("cpu")
    backbone = Backbone("tiny-sd3", "float32", 8)
    early = backbone.vae
    backbone.to(cpu, offload=True)
    for ours, theirs in zip(backbone.prompts(["a cat"], cpu), tiny_backbone.prompts(["a cat"], cpu), strict=True):
        torch.testing.assert_close(ours, theirs)
    latents = tiny_backbone.coder.encode(image)
    torch.testing.assert_close(backbone.coder.encode(image), latents)
    torch.testing.assert_close(backbone.coder.decode(latents), tiny_backbone.coder.decode(latents))
    for model in (early, *encoders_of(backbone.text_encoders)):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert backbone.transformer.device == cpu


@pytest.mark.parametrize(
    "small, large", [((7, 9), (28, 36)), ((5, 8), (14, 22)), ((30, 41), (24, 40)), ((1, 1), (5, 4))]
)
def test_windows_of_an_enlarged_image_are_those_of_the_whole_and_go_on_as_reflection(small, large):
    lr = torch.rand(2, 3, *small)
    extent = tuple(length + more for length, more in zip(large, (0, 47), strict=True))
    whole = np.pad(enlarge(lr, large), [(0, 0), (0, 0), (0, 0), (0, 47)], "reflect")
    windows = LazyEnlargement(lr, large, extent)
    assert windows.shape == whole.shape
    for rows, columns in ((slice(0, 3), slice(None)), (slice(2, 99), slice(3, 7)), (slice(None), slice(2, 50))):
        expected = torch.from_numpy(whole[..., rows, columns])
        torch.testing.assert_close(windows[..., rows, columns], expected, atol=1e-5, rtol=0)


def test_enlarging_equals_pillow():
    small = (torch.rand(3, 12, 20) * 128 + 64).byte()  # mid-grey, since Pillow clips between its two passes
    pillow = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((80, 48), Image.Resampling.BICUBIC)
    ours = enlarge(small[None] / 255, (48, 80))[0] * 255
    difference = ours.permute(1, 2, 0) - torch.from_numpy(np.array(pillow))
    assert difference.abs().max() <= 1.5  # Pillow rounds between them, too


def test_the_autoencoder_computes_in_its_own_dtype_under_autocast(tiny_backbone):
    image = torch.rand(1, 3, 32, 32)
    latents = tiny_backbone.coder.encode(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_backbone.coder.encode(image), latents)
        assert torch.equal(tiny_backbone.coder.decode(latents), tiny_backbone.coder.decode(latents.clone()))


def test_a_component_that_moves_twice_is_hooked_once():
    backbone, cpu = Backbone("tiny-sd3", "float32", 8), torch.device("cpu")
    latents = backbone.coder.encode(torch.full((1, 3, 32, 32), 0.5))
    for offload in (True, True, False):
        backbone.to(cpu, offload)
        hooks = [module._hf_hook for module in backbone.vae.modules() if hasattr(module, "_hf_hook")]
        assert bool(hooks) == offload and not any(isinstance(hook, SequentialHook) for hook in hooks)
        torch.testing.assert_close(backbone.coder.encode(torch.full((1, 3, 32, 32), 0.5)), latents)
