"""The text stream's input: SD3's two CLIP encoders and T5, through diffusers."""

from functools import lru_cache

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

REMEMBERED = 128  # prompts; of SD3 with 256 tokens of T5 in float32 700 MB


class PromptEncoder:
    """Frozen text encoders that remember the prompts that came last: one that every image has is encoded once.

    Args:
        pipeline: an SD3 pipeline with its text encoders (transformer and VAE may be None).
        t5_tokens: tokens that T5 gives; 77 in training and 256 in the released inference, with SD3.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, t5_tokens: int):
        self.pipeline = pipeline
        self.t5_tokens = t5_tokens
        self.remembered = lru_cache(REMEMBERED)(self.encode)

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Prompt embeddings `(B, 77 + t5_tokens, D_text)` and pooled ones `(B, D_pooled)` for SD3's tokenizers."""
        embeds, pooled = zip(*(self.remembered(prompt, device) for prompt in prompts), strict=True)
        return torch.cat(embeds).to(device), torch.cat(pooled).to(device)

    @torch.no_grad()
    def encode(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        # What is remembered stays on the CPU, in half the bytes, but exact where the encoders are.
        return embeds.cpu(), pooled.cpu()
