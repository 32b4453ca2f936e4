import pytest


@pytest.fixture(scope="module")
def net(tiny_backbone):
    """A network over tiny-sd3 whose LR stream is not the initial one."""
    import torch

    from dit4sr_pl.model import DiT4SRTransformer

    net = DiT4SRTransformer(tiny_backbone.transformer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.lr_stream.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval()
