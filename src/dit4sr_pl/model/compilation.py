"""Compiling a network block by block: blocks of one kind share their code, so few graphs serve the whole network."""

import torch
from torch import nn

# PyTorch's limit is 8 versions of a block's code. A network has up to four kinds of blocks, and each takes a version
# per shape, and per precision and use of gradients.
VERSIONS = 64


def compile_blocks(net: nn.Module) -> None:
    """Compiles every block of a network, when it runs first, for exactly the shapes that come.

    Args:
        net: DiT4SR or a baseline.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    for block in net.units:
        block.compile(fullgraph=True, dynamic=False)


def is_compiled(net: nn.Module) -> bool:
    """Returns whether the blocks of a network are compiled, so that every new shape costs a compilation."""
    return any(block._compiled_call_impl is not None for block in net.units)
