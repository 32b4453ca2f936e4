"""SD3-ControlNet, the paper's own baseline (Section 5.1): a trainable copy of SD3's first blocks next to them.

    noisy latent ──────────────┬── frozen blocks 1..N ─────(+)── velocity
                               │                            │ zero layers
    LR latent ── zero layer ──(+)─ copied blocks 1..L ──────┘

The output of every copied block is added after the frozen blocks that it stands for.
"""

from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor, nn


class SD3ControlNet(nn.Module):
    """diffusers' `SD3ControlNetModel` with the LR latent as its condition; called and trained like DiT4SR.

    Args:
        base: diffusers' SD3 or SD3.5 transformer with its pretrained weights; frozen here.
        num_layers: number of copied blocks, a divisor of the base's number of blocks. The output of each is added after
            as many frozen blocks in a row as the quotient says.
        gradient_checkpointing: whether every block is recomputed in the backward pass instead of keeping its
            activations.

    Raises:
        ValueError: the number of layers does not divide the base's.
    """

    trained_name = "controlnet"  # attribute of what is trained, and its file's name

    def __init__(self, base: SD3Transformer2DModel, num_layers: int = 12, gradient_checkpointing: bool = False):
        super().__init__()
        blocks = len(base.transformer_blocks)
        if num_layers < 1 or num_layers >= blocks or blocks % num_layers:
            # diffusers adds nothing to the last block: a copied block for it alone would never get a gradient.
            raise ValueError(f"sd3_controlnet: num_layers={num_layers}; give a proper divisor of the {blocks} blocks")
        self.num_layers = num_layers
        self.base = base.requires_grad_(False)
        self.controlnet = copy_of(base, num_layers)
        for model in (self.base, self.controlnet):
            if gradient_checkpointing:
                model.enable_gradient_checkpointing()

    @property
    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers one after another; each is called as a whole."""
        return [*self.controlnet.transformer_blocks, *self.base.transformer_blocks]

    @property
    def patch_size(self) -> int:
        """Latents per token along one side."""
        return self.base.config.patch_size

    @property
    def trained(self) -> SD3ControlNetModel:
        """The module that is trained and saved."""
        return self.controlnet

    def network_config(self) -> dict:
        """Returns what a file of trained weights keeps of this network: its kind and its number of layers."""
        return {"network": "sd3_controlnet", "num_layers": self.num_layers}

    def forward(
        self,
        noisy_latent: Tensor,
        lr_latent: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
    ) -> Tensor:
        """Returns the velocity at `noisy_latent`; arguments and result are those of `DiT4SRTransformer`."""
        conditions = {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled_prompt_embeds,
            "timestep": timestep,
            "return_dict": False,
        }
        (residuals,) = self.controlnet(noisy_latent, controlnet_cond=lr_latent, **conditions)
        (velocity,) = self.base(noisy_latent, block_controlnet_hidden_states=residuals, **conditions)
        return velocity


def copy_of(base: SD3Transformer2DModel, num_layers: int) -> SD3ControlNetModel:
    """Returns a copy of the base's embeddings and first blocks with zero layers in and out.

    Every trainable weight of the copy gets a gradient.
    """
    config = dict(base.config) | {"num_layers": num_layers, "extra_conditioning_channels": 0}
    controlnet = SD3ControlNetModel.from_config(config)
    for name in ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks"):
        # Not strict: the base has more blocks.
        getattr(controlnet, name).load_state_dict(getattr(base, name).state_dict(), strict=False)

    # The last copied block's text goes nowhere; a trainable weight without a gradient would stop DDP.
    last = controlnet.transformer_blocks[-1]
    for unused in (last.attn.add_q_proj, last.attn.norm_added_q, last.attn.to_add_out, last.ff_context):
        if unused is not None:
            unused.requires_grad_(False)
    return controlnet
