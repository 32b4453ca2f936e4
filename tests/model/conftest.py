import pytest
import torch
from diffusers import SD3Transformer2DModel

from dit4sr_pl.model import Variant
from testing.networks import VARIANTS


@pytest.fixture(params=VARIANTS)
def variant(request) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture
def base() -> SD3Transformer2DModel:
    """A small SD3.5 with random weights; two of its three blocks have a second attention."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "noisy_latent": torch.randn(2, 4, 8, 12),
        "lr_latent": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([3.0, 870.5]),
        "prompt_embeds": torch.randn(2, 5, 24),
        "pooled_prompt_embeds": torch.randn(2, 20),
    }
