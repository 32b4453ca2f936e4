"""The input of the text stream: SD3's two CLIP encoders and T5, through diffusers."""

from functools import lru_cache

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dit4sr_pl.backbone.text_length import check_t5_tokens

REMEMBERED = 128  # prompts; 700 MB for SD3 with 256 tokens of T5 in float32


class PromptEncoder:
    """Frozen text encoders that remember the last prompts, so that a prompt that every image has is encoded once.

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
        self.remembered = lru_cache(REMEMBERED)(self.encode)

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings `(B, T, D_text)` and pooled ones `(B, D_pooled)`.

        With SD3's tokenizers T is `77 + t5_tokens`.
        """
        embeds, pooled = zip(*(self.remembered(prompt, device) for prompt in prompts), strict=True)
        return torch.cat(embeds).to(device), torch.cat(pooled).to(device)

    @torch.no_grad()
    def encode(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the embeddings of one prompt, on the CPU in the encoders' own dtype."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        # Remembered embeddings stay on the CPU, in the encoders' dtype: half the bytes of float32, and exact.
        return embeds.cpu(), pooled.cpu()
