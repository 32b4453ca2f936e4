"""The input of the text stream: SD3's two CLIP encoders and T5, through diffusers."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dit4sr_pl.backbone.text_length import check_t5_tokens

REMEMBERED = 128  # prompts; 700 MB for SD3 with 256 tokens of T5 in float32
STEPS = 4  # sets of prompts that are remembered of training steps; a run without captions has one
Embeddings = tuple[Tensor, Tensor]  # of prompts, and pooled


class PromptEncoder:
    """Frozen text encoders that remember the last prompts, so that a prompt that every image has is encoded once.

    The prompts of a call that are not remembered pass each encoder together.

    Args:
        pipeline: an SD3 pipeline with its text encoders; transformer and VAE may be None.
        t5_tokens: number of T5's tokens; with SD3, 77 in training and 256 in the released inference.

    Raises:
        ValueError: prompts would be cut to fewer tokens than T5 was trained with.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, t5_tokens: int):
        if pipeline.tokenizer_3 is not None:
            check_t5_tokens(t5_tokens, pipeline.tokenizer_3.model_max_length, "this model")
        self.pipeline = pipeline
        self.t5_tokens = t5_tokens
        self.remembered: dict[str, Embeddings] = {}  # the prompt that came last is the last one
        self.step = lru_cache(STEPS)(self.encode_each)

    def __call__(self, prompts: list[str], device: torch.device) -> Embeddings:
        """Returns prompt embeddings `(B, T, D_text)` and pooled ones `(B, D_pooled)`.

        With SD3's tokenizers T is `77 + t5_tokens`.
        """
        distinct = dict.fromkeys(prompts)
        found = {prompt: self.remembered.pop(prompt) for prompt in distinct if prompt in self.remembered}
        found |= self.encode_each(tuple(prompt for prompt in distinct if prompt not in found), device)
        self.remembered |= {prompt: found[prompt] for prompt in distinct}
        for prompt in list(self.remembered)[:-REMEMBERED]:
            del self.remembered[prompt]
        return gather(found, prompts, device)

    def of_step(self, prompts: list[str], device: torch.device) -> Embeddings:
        """Returns what a call returns, for a training step.

        The last bits of embeddings depend on the prompts that pass the encoders with them. Here these are the step's
        own, whatever came before, so a resumed run gets the same bits.
        """
        return gather(self.step(tuple(sorted(set(prompts))), device), prompts, device)

    def encode_each(self, prompts: tuple[str, ...], device: torch.device) -> dict[str, Embeddings]:
        """Returns the embeddings of different prompts by prompt, each in memory of its own, after one encoding."""
        if not prompts:
            return {}
        rows = (part.split(1) for part in self.encode(list(prompts), device))
        return {prompt: tuple(row.clone() for row in pair) for prompt, *pair in zip(prompts, *rows, strict=True)}

    @torch.no_grad()
    def encode(self, prompts: str | list[str], device: torch.device) -> Embeddings:
        """Returns the embeddings of prompts, one call per encoder, on the CPU in the encoders' own dtype."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        # Remembered embeddings stay on the CPU, in the encoders' dtype: half the bytes of float32, and exact.
        return embeds.cpu(), pooled.cpu()


def gather(found: dict[str, Embeddings], prompts: Iterable[str], device: torch.device) -> Embeddings:
    """Returns the embeddings of prompts, which may repeat, as one batch on a device."""
    embeds, pooled = zip(*map(found.__getitem__, prompts), strict=True)
    return torch.cat(embeds).to(device), torch.cat(pooled).to(device)
