"""The text half of the diffusers pipeline: encoders that are read when a prompt comes whose embeddings are not held."""

import logging

from diffusers import StableDiffusion3Pipeline

from dit4sr_pl.backbone.fingerprints import TEXT_PARTS
from dit4sr_pl.backbone.sd3 import TextEncoders, encoders_of
from dit4sr_pl.backbone.shipped_prompts import HeldPrompts, ShippedPrompts
from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.common.hub import hub_errors, pipeline_folder

log = logging.getLogger(__name__)


class TextOnDemand:
    """A part of a pipeline that has SD3's components and an LR stream.

    Attributes:
        shipped: prompt embeddings that came with the LR stream; None: there are none.
        text_source: where text encoders are that were left out, and options of reading; None: they were not.
    """

    shipped: ShippedPrompts | None = None
    text_source: tuple[str, dict] | None = None

    def take_shipped_prompts(self, shipped: ShippedPrompts, source: tuple[str, dict] | None) -> None:
        """Takes prompt embeddings for text encoders that were left out, which are read if the embeddings are others'.

        Args:
            shipped: the embeddings.
            source: see `text_source`.
        """
        self.shipped, self.text_source = shipped, source
        folder = None if source is None else pipeline_folder(source[0])
        if why := self.unfit(self.config.sampler["t5_tokens"]) or shipped.other_encoders(folder):
            log.warning("%s: not used, since it was %s; text encoders are read", shipped.path, why)
            self.shipped = None
            self.read_text_encoders()

    def prompts(self, t5_tokens: int) -> PromptEncoder | HeldPrompts:
        """Returns the text encoders for a number of T5's tokens, behind the embeddings that came with the LR stream."""
        if self.shipped is None or self.unfit(t5_tokens):
            return self.encoder(t5_tokens)
        return HeldPrompts(self.shipped.held, lambda: self.encoder(t5_tokens))

    def unfit(self, t5_tokens: int) -> str:
        """Returns why the embeddings that came with the LR stream do not fit this pipeline; empty: they do."""
        fingerprint = self.lr_stream.config.base["fingerprint"]
        return self.shipped.mismatch(self.transformer, fingerprint, t5_tokens, self.transformer.dtype)

    def encoder(self, t5_tokens: int) -> PromptEncoder:
        """Returns the text encoders, which are read if they were left out; errors are those of reading them."""
        self.read_text_encoders()
        text = {name: getattr(self, name) for name in TEXT_PARTS}
        return PromptEncoder(StableDiffusion3Pipeline(self.transformer, self.scheduler, None, **text), t5_tokens)

    def read_text_encoders(self) -> None:
        """Reads text encoders and tokenizers if they were left out.

        Raises:
            FileNotFoundError: they cannot be read.
            ValueError: the pipeline was loaded without any.
        """
        if self.text_encoder is not None:
            return
        if self.text_source is None:
            raise ValueError("a prompt without embeddings, in a pipeline without text encoders; load it with them")
        name, options = self.text_source
        dtype = self.transformer.dtype
        with hub_errors(name, name):
            text = TextEncoders.from_pretrained(name, transformer=None, vae=None, dtype=dtype, **options)
        self.register_modules(**{part: getattr(text, part) for part in TEXT_PARTS})
        for encoder in encoders_of(text):
            encoder.to(self._execution_device)
        self.maybe_free_model_hooks()  # with offloading: hooks them as the other components
