"""Restoring as a diffusers pipeline: `DiT4SRPipeline.from_pretrained(...)`, then `pipe(image).images[0]`."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,  # by this name, in this module, diffusers learns how an LRStreamModel is loaded
    SD3Transformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.fingerprints import TEXT_PARTS, check_parts, part_fingerprints
from dit4sr_pl.backbone.shipped_prompts import ENCODERS, ShippedPrompts
from dit4sr_pl.backbone.text_on_demand import TextOnDemand
from dit4sr_pl.cli.checks import check_compiler
from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.files import ASSETS, atomic_write, is_shipped
from dit4sr_pl.common.hub import PROMPTS, HubAddress, hub_errors, locate
from dit4sr_pl.common.randomness import generator as seeded
from dit4sr_pl.common.students import fixed_settings
from dit4sr_pl.images.batch import Images, image_names, to_batch
from dit4sr_pl.model import DiT4SRTransformer, LRStream, Student, Variant, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.compilation import capture_graphs, compile_blocks
from dit4sr_pl.model.lora import LoRALayers, shapes_of
from dit4sr_pl.model.trained_part import check_base, fit_state, with_injection_scale
from dit4sr_pl.restoration.color import keep_colorless
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.sampling import restore
from dit4sr_pl.restoration.sizes import result_size

READING = ("revision", "token", "cache_dir", "local_files_only", "proxies", "variant")  # options of every component

OUTPUT_TYPES = ("pil", "pt", "np")


class LRStreamModel(LRStream, ModelMixin, ConfigMixin):
    """The LR stream in the form in which diffusers keeps a model: a folder of `config.json` and safetensors.

    Args:
        dim: width of a token, see `LRStream`.
        dual_attention: see `LRStream`.
        variant: fields of `Variant`.
        base: name and fingerprint of the transformer that it was trained over.
        lora_layers: fields of `LoRA`, and `shapes`, see `LoRALayers`; None: the transformer has no LoRA.
        student: fields of `Student`; None: it is a teacher.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        dim: int,
        dual_attention: list[bool],
        variant: dict,
        base: dict[str, str],
        lora_layers: dict | None = None,
        student: dict | None = None,
    ):
        layers = None if lora_layers is None else LoRALayers.with_shapes(**lora_layers)
        super().__init__(dim, dual_attention, Variant(**variant), student and Student(**student), layers)

    @classmethod
    def from_file(cls, path: str | Path) -> "LRStreamModel":
        """Reads an LR-stream file (`lr_stream.safetensors`), a training checkpoint (`.ckpt`) or a released folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, or holds a ControlNet.
        """
        part = load_part(path)
        if part.network_config["network"] != "dit4sr":
            raise ValueError(
                f"{path}: holds {part.network_config['network']}, and the pipeline runs LR streams only; restore with "
                f"python -m dit4sr_pl.restore checkpoint={path}"
            )
        names = {name.rsplit(".", 2)[0] for name in part.state if name.startswith("blocks.")}
        count = len({name.split(".")[1] for name in names})
        dual_attention = [f"blocks.{index}.attn2" in names for index in range(count)]
        dim = len(part.state["blocks.0.attn.k.weight"])
        config = part.network_config
        lora = config.get("lora")
        layers = lora and lora | {"shapes": shapes_of(part.state)}
        model = cls(dim, dual_attention, config["variant"], part.base, layers, config.get("student"))
        fit_state(model, part.state, path)
        return model.eval()

    def set_injection_scale(self, injection_scale: float) -> None:
        """Sets the factor of LR Injection, here and in the config that is saved.

        Raises:
            ValueError: the factor is not a number, or there is no LR Injection.
        """
        config = {"network": "dit4sr", "variant": self.variant.as_dict()}
        variant = with_injection_scale(config, injection_scale, "lr_stream")["variant"]
        self.variant = Variant(**variant)
        self.register_to_config(variant=variant)


class DiT4SRPipeline(TextOnDemand, DiffusionPipeline):
    """A pipeline that restores LR images: an LR stream (the trained half of DiT4SR) and the components of an SD3
    pipeline.

    Transformer, autoencoder, tokenizers and text encoders are those of diffusers' `StableDiffusion3Pipeline`. If the LR
    stream comes with prompt embeddings (docs/hub.md), text encoders are None until a prompt needs them.

    Args:
        transformer: the frozen base of the LR stream.
        lr_stream: an LR stream that was trained over this transformer.
        scheduler: the solver of restoring; it replaces the one that the SD3 pipeline came with.
        sampler: defaults of the call, as fields of `Sampler`; the field `solver` is not among them. None: those of
            `conf/sampler/paper.yaml`, with what a student fixes.

    Attributes:
        compile: whether the network's blocks are compiled, for every size of images that comes.
        cuda_graph: whether the network's evaluations replay a CUDA graph per shape. The merged LR stream then stays in
            memory between calls.

    Raises:
        ValueError: the LR stream was trained over other weights.
    """

    compile = cuda_graph = False
    captured: tuple[object, DiT4SRTransformer] | None = None  # a network with graphs, and what it was made of
    # The transformer's hook moves the LR stream too: the two work at the same time.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = list(TEXT_PARTS)

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL | AutoencoderDC,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer: PreTrainedTokenizerBase | None,
        tokenizer_2: PreTrainedTokenizerBase | None,
        tokenizer_3: PreTrainedTokenizerBase | None,
        text_encoder: PreTrainedModel | None,
        text_encoder_2: PreTrainedModel | None,
        text_encoder_3: PreTrainedModel | None,
        lr_stream: LRStreamModel,
        sampler: dict | None = None,
    ):
        super().__init__()
        check_base(transformer, lr_stream.config.base, "lr_stream")
        # Convolutions read channels last, as in training; files do not keep that.
        nn.Module.to(lr_stream, transformer.device, transformer.dtype, memory_format=torch.channels_last)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
            lr_stream=lr_stream,
        )
        if sampler is None:
            sampler = conf_defaults(lr_stream, backbone="sd35_medium", sampler="paper")["sampler"]
        self.register_to_config(sampler=sampler)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        lr_stream: str | Path | LRStreamModel | None = None,
        injection_scale: float | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        **arguments,
    ) -> "DiT4SRPipeline":
        """Loads a pipeline, or builds one from an SD3 pipeline and an LR stream.

        Args:
            name: a folder that `save_pretrained` wrote, or an LR stream, which names its SD3 pipeline: a file,
                `tiny-dit4sr`, `dit4sr_q`, `hub:OWNER/NAME` and whatever else `checkpoint_file` knows. With `lr_stream`:
                the folder or hub id of the SD3 pipeline that it was trained over, or `tiny-sd3`.
            lr_stream: the LR stream, by the same names.
            injection_scale: factor of LR Injection, which `save_pretrained` keeps; None: the LR stream's own.
            compile: see the class.
            cuda_graph: see the class.
            arguments: diffusers' own (`dtype`, `revision`, components) and those of the class. With `lr_stream`, the
                others are taken from `conf/model/` and `conf/sampler/`.

        Raises:
            FileNotFoundError: a file is missing, or a model of the hub cannot be read; the message says what to do.
            ValueError: the LR stream is truncated, or was trained over another base or autoencoder; or there is no
                compiler.
        """
        check_compiler(compile, "compile")
        pipeline = cls._load(name, lr_stream, arguments)
        if injection_scale is not None:
            pipeline.lr_stream.set_injection_scale(injection_scale)
        pipeline.compile, pipeline.cuda_graph = compile, cuda_graph
        return pipeline

    @classmethod
    def _load(cls, name: str | Path, lr_stream: str | Path | LRStreamModel | None, arguments: dict) -> "DiT4SRPipeline":
        weights = Path(name)
        if isinstance(lr_stream, str | Path) or (lr_stream is None and is_lr_stream(name)):
            weights = checkpoint_file(name if lr_stream is None else lr_stream)
            model = LRStreamModel.from_file(weights)
            name, lr_stream = model.config.base["name"] if lr_stream is None else name, model
        if lr_stream is not None:
            tiny = is_shipped(name)
            backbone, sampler = ("tiny_sd3", "tiny_sd3") if tiny else ("sd35_medium", "paper")
            if "torch_dtype" in arguments:  # diffusers' older name of it
                arguments["dtype"] = arguments.pop("torch_dtype")
            defaults = conf_defaults(lr_stream, backbone=backbone, sampler=sampler)
            arguments = defaults | {"lr_stream": lr_stream} | arguments
            name = ASSETS / name if tiny else name
        shipped = ShippedPrompts.beside(weights)
        given = [arguments[part] for part in ENCODERS if part in arguments]
        if given not in ([], [None] * len(ENCODERS)):
            shipped = None  # the caller chose encoders, whose embeddings are others
        left_out = {} if shipped is None else dict.fromkeys(TEXT_PARTS)
        with hub_errors(str(name), str(name)):
            pipeline = super().from_pretrained(name, **arguments | left_out)
        parts = part_fingerprints(str(name), arguments)  # of those that the caller does not bring
        check_parts(str(name), parts, pipeline.lr_stream.config.base.get("parts", {}), weights)
        if shipped is not None:
            options = {key: arguments[key] for key in READING if key in arguments}
            pipeline.take_shipped_prompts(shipped, None if given else (str(name), options))
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        image: Images | list[Images],
        prompt: str | list[str] | None = "",
        scale: float = 4,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        names: list[str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **sampler_options,
    ) -> ImagePipelineOutput | tuple:
        """Restores images of one size.

        Args:
            image: a Pillow image, a path, an array `(h, w, 3)` or `(B, h, w, 3)`, a tensor `(3, h, w)` or
                `(B, 3, h, w)`, or a list of such. Numbers are floats in 0..1 or uint8; grey images have one channel.
            prompt: captions, one for all or one per image; the sampler's added prompt follows each.
            scale: factor of the sides, 1 or more.
            num_inference_steps: number of steps; None: the model's own.
            guidance_scale: scale of guidance; None: the model's own.
            seed: an image's noise depends on it and on the image's name.
            generator: CPU generators, one for all or one per image, in place of the seed.
            names: one per image; with a file's name without suffix the noise and the result are those of `restore` and
                `evaluate`. None: these names of paths, else the places in the list.
            output_type: `pil`, `pt` (`(B, 3, H, W)` in 0..1) or `np` (`(B, H, W, 3)`).
            return_dict: whether the result is an `ImagePipelineOutput`, else a tuple.
            sampler_options: other fields of `Sampler`, such as `negative_prompt`, `color`, `tile`.

        Raises:
            ValueError: the images have several sizes, or numbers do not fit each other or are out of range.
        """
        lr = to_batch(image)
        captions = [prompt or ""] * len(lr) if prompt is None or isinstance(prompt, str) else prompt
        names = image_names(image, len(lr)) if names is None else names
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type}: choose one of {', '.join(OUTPUT_TYPES)}")
        if scale < 1 or len(captions) != len(lr) or len(names) != len(lr):
            raise ValueError(
                f"scale={scale} must be 1 or more, and {len(lr)} images need one prompt each or one for all; names, if "
                "given, are one per image"
            )
        sampler_options |= {"steps": num_inference_steps, "guidance_scale": guidance_scale}
        given = {name: value for name, value in sampler_options.items() if value is not None}
        saved = {"fit": "extend"} | self.config.sampler  # folders of 0.1, which knew no other way, do not name it
        sampler = Sampler(type(self.scheduler).from_config, **saved).changed(**given)
        generator = generator or [seeded("cpu", "restore", seed, name) for name in names]
        generators = generator if isinstance(generator, list) else [generator] * len(lr)
        sr = self.restore(sampler, lr, scale, captions, generators)
        images = VaeImageProcessor(do_normalize=False).postprocess(sr.cpu(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def restore(
        self, sampler: Sampler, lr: Tensor, scale: float, captions: list[str], generators: list[torch.Generator]
    ) -> Tensor:
        """Restores `(B, 3, h, w)` to `(B, 3, scale * h, scale * w)`, both in 0..1, with a bar of the network's
        evaluations.
        """
        size = result_size(lr.shape[-2:], scale)
        lr = lr.to(self._execution_device)
        with self.progress_bar(total=len(sampler.schedule(self.scheduler)[1])) as bar:
            parts = self.prepared_network(), LatentCoder(self.vae), self.prompts(sampler.t5_tokens), self.scheduler
            sr = restore(*parts, sampler, lr, size, captions, generators, on_step=bar.update)
            sr = keep_colorless(sr, lr)
        self.maybe_free_model_hooks()
        return sr

    def prepared_network(self) -> DiT4SRTransformer:
        """Returns the network of a call: compiled, or that of the last call with its graphs, as the attributes say.

        Raises:
            ValueError: graphs are to be captured, and the transformer is not on a CUDA device, or is offloaded.
        """
        weights = [*self.transformer.parameters(), *self.lr_stream.parameters()]
        made_of = self.compile, self.lr_stream.variant, [(weight.data_ptr(), weight._version) for weight in weights]
        if self.cuda_graph and self.captured is not None and self.captured[0] == made_of:
            return self.captured[1]
        self.captured, net = None, self.network()
        if self.compile:
            compile_blocks(net)
        if self.cuda_graph:
            if hasattr(self.transformer, "_hf_hook"):
                raise ValueError("cuda_graph=True: a graph needs weights that stay where they are; without offloading")
            capture_graphs(net)
            self.captured = made_of, net
        return net

    def network(self) -> DiT4SRTransformer:
        """Returns the transformer with a second, merged LR stream and merged LoRA; its other weights are not
        copied."""
        with torch.device("meta"):
            merged = LRStream.over(self.transformer, self.lr_stream.variant, self.lr_stream.student)
        merged.lora = self.lr_stream.lora
        net = DiT4SRTransformer(self.transformer, lr_stream=merged).eval()

        def ready(*_) -> None:
            onload(self.transformer, self.lr_stream)
            if next(merged.parameters()).is_meta:  # the first call, when the weights are on their device
                net.merge_lora()
                ours = self.lr_stream.state_dict()
                merged.load_state_dict({name: ours[name] for name in merged.state_dict()}, assign=True)
                merged.merge(net.base)

        net.register_forward_pre_hook(ready)
        return net

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """Writes the pipeline as diffusers does, with the prompt embeddings that came with the LR stream.

        Args:
            save_directory: the folder.
            options: diffusers' own.
        """
        if self.shipped is not None:
            if self.text_source is not None:
                self.read_text_encoders()
            with atomic_write(Path(save_directory) / PROMPTS) as partial:
                shutil.copyfile(self.shipped.path, partial)
        super().save_pretrained(save_directory, **options)

    def enable_sequential_cpu_offload(self, *_, **__):
        """Raises NotImplementedError: this pipeline cannot offload layer by layer."""
        raise NotImplementedError(
            "DiT4SRPipeline reads weights outside of their layers; use enable_model_cpu_offload()"
        )

    enable_group_offload = enable_sequential_cpu_offload


def is_lr_stream(name: str | Path) -> bool:
    """Returns whether a name is that of an LR stream, and not of a pipeline."""
    place = locate(name)
    if isinstance(place, HubAddress) or place.is_file():
        return True
    configs = place / "config.json", place / "transformer" / "config.json"
    return any(config.is_file() for config in configs) and not (place / "model_index.json").exists()


def conf_defaults(lr_stream: LRStreamModel, **choices: str) -> dict:
    """Returns what `from_pretrained` takes from `conf/`: the weights' dtype, and fields of `Sampler`, with those that
    a student fixes."""
    cfg = read_conf("restore", **choices)
    sampler = dict(cfg.sampler.items())
    if lr_stream.student is not None:
        sampler |= fixed_settings(lr_stream.student.as_dict())
    # Without the solver: a folder from elsewhere must not name what is called.
    sampler = {name: value for name, value in sampler.items() if name not in ("_target_", "solver")}
    return {"sampler": sampler, "dtype": getattr(torch, cfg.model.backbone.dtype)}


def onload(*parts: nn.Module) -> None:
    """Tells diffusers' offloading, which waits for a component's `forward`, that these components are about to work."""
    for part in parts:
        if hasattr(part, "_hf_hook"):
            part._hf_hook.pre_forward(part)
