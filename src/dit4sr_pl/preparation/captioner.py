"""Captions of images by a vision-language model (paper Section 5.1: LLaVA-1.5), through transformers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from dit4sr_pl.common.files import atomic_write, has_contents
from dit4sr_pl.common.names import check_name, folded
from dit4sr_pl.images.captions import drop_sentences, on_one_line
from dit4sr_pl.images.files import read_image

transformers.utils.logging.disable_progress_bar()


class Captioner:
    """A vision-language model with a chat template.

    Args:
        name: hub id or folder of the model.
        instruction: the request for every image.
        max_tokens: length of a caption, tokens.
        max_side: larger images are reduced to this side, pixels; models of any resolution take a token per patch.
        dtype: dtype of the weights: `float32`, `bfloat16` or `float16`.
        device: device that the model runs on.
        dropped_words: sentences that contain one of these words are left out.
        quantization: `int8` or `nf4`: the weights of linear layers have 8 or 4 bits (bitsandbytes); None: `dtype`.

    Raises:
        FileNotFoundError: the model is missing, gated, incomplete or of another kind; the message says what to do.
        ValueError: the model has no chat template.
    """

    def __init__(
        self,
        name: str,
        instruction: str,
        max_tokens: int,
        max_side: int,
        dtype: str,
        device: str,
        dropped_words: Sequence[str] = (),
        quantization: str | None = None,
    ):
        loading = {"dtype": getattr(torch, dtype)}
        if quantization is not None:
            loading |= {"quantization_config": quantized(quantization, loading["dtype"]), "device_map": {"": device}}
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            self.model = AutoModelForImageTextToText.from_pretrained(name, **loading)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"captioner.name={name}: cannot be read ({reason}). Give a folder or hub id of an image-text-to-text "
                "model (for gated models accept the licence and run `hf auth login`)"
            ) from None
        if self.processor.chat_template is None:
            raise ValueError(f"captioner.name={name}: has no chat template; take an instruction-tuned model")
        self.model.eval()
        if quantization is None:  # else its layers are on the device already
            self.model.to(device)
        self.processor.tokenizer.padding_side = "left"  # the answers of a batch start at one position
        self.name, self.instruction, self.max_tokens, self.max_side = name, instruction, max_tokens, max_side
        self.dropped_words = dropped_words

    @torch.inference_mode()
    def __call__(self, images: Sequence[torch.Tensor]) -> list[str]:
        """Returns the captions of uint8 RGB images `(3, H, W)`, one line each, greedily decoded.

        Raises:
            ValueError: the device's memory is too small.
        """
        inputs = self.processor.apply_chat_template(
            [self.conversation(image) for image in images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        try:
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, **UNSAMPLED)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"captioner.name={self.name}: {len(images)} images of {self.max_side} pixels do not fit into the "
                "device's memory; lower batch_size or captioner.max_side"
            ) from None
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        captions = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [drop_sentences(on_one_line(caption), self.dropped_words) for caption in captions]

    def conversation(self, image: torch.Tensor) -> list[dict]:
        """Returns the chat that asks for one image's caption."""
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.thumbnail((self.max_side, self.max_side))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": self.instruction}]
        return [{"role": "user", "content": content}]


def quantized(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns bitsandbytes' config for linear layers with 8 or 4 bits per weight.

    Args:
        quantization: `int8` or `nf4`.
        dtype: type in which `nf4` layers compute.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


UNSAMPLED = {"temperature": None, "top_p": None, "top_k": None}  # models come with settings for sampling


def one_per_caption(files: Iterable[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Returns pairs of an image and its caption file, each once.

    Raises:
        ValueError: two images share a caption file without regard to case, or its name cannot be used.
    """
    pairs = {}
    for image, text in files:
        check_name(text.name, text.parent)
        other, _ = pairs.setdefault(folded(str(text)), (image, text))
        if other != image:
            raise ValueError(f"{other} and {image} would share the caption {text}; rename one of them")
    return list(pairs.values())


def write_captions(
    files: Sequence[tuple[Path, Path]],
    captioner: Callable[[list[torch.Tensor]], list[str]],
    batch_size: int,
    track: Callable[[list], Iterable] = iter,
) -> list[str]:
    """Writes the missing captions and returns a message for each image that cannot be read.

    Batches are the same in every run, whichever captions exist: in half precision a caption can depend on the other
    images of its batch.

    Args:
        files: pairs of an image and its caption file.
        captioner: function from uint8 RGB images `(3, H, W)` to captions.
        batch_size: number of images per batch.
        track: wraps the batches that are iterated, such as a progress bar.
    """
    failed = []
    batches = [files[first : first + batch_size] for first in range(0, len(files), batch_size)]
    for batch in track([batch for batch in batches if not all(has_contents(text) for _, text in batch)]):
        readable = []
        for image, text in batch:
            try:
                readable.append((text, read_image(image)))
            except ValueError as error:
                failed.append(str(error))
        if all(has_contents(text) for text, _ in readable):
            continue
        captions = captioner([image for _, image in readable])
        for (text, _), caption in zip(readable, captions, strict=True):
            if not has_contents(text):
                with atomic_write(text) as partial:
                    partial.write_text(caption + "\n", encoding="utf-8")
    return failed
