"""Attention maps between a block's streams (paper Figure 4) and the LR tokens after it (supplement Figure 2)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit4sr_pl.model.block import QKV, MMDiTControlBlock
from dit4sr_pl.model.transformer import DiT4SRTransformer

STREAMS = ("noise", "lr", "text")

Maps = dict[tuple[str, str], Tensor]


@dataclass
class Record:
    """The attention maps and LR tokens of one block, from the last forward pass of its network.

    Args:
        attn: maps of the joint attention by the streams of queries and keys, float32, means over heads. X -> L is
            `attn["noise", "lr"]`, `(B, K, K)`, one row per query. The rows of a stream over all the keys that it sees
            sum to 1. A map is missing where a stream does not see the other one (variant A), or has no queries (the
            last block).
        attn2: the same maps of SD3.5's second attention; empty in blocks without it.
        lr: LR tokens after the block, `(B, K, D)`. After the last block they are unfinished, since nothing reads them.
    """

    attn: Maps = field(default_factory=dict)
    attn2: Maps = field(default_factory=dict)
    lr: Tensor | None = None


@contextmanager
def record(net: DiT4SRTransformer, blocks: Iterable[int]) -> Iterator[dict[int, Record]]:
    """Records attention maps and LR tokens while the context is open; the network's output stays the same.

        with record(net, blocks=[3, 6]) as records:
            net(noisy_latent, lr_latent, timestep, prompt_embeds, pooled_prompt_embeds)
        records[6].attn["noise", "lr"]

    Args:
        net: the network to record.
        blocks: indices of its blocks.

    Raises:
        ValueError: the network has no such block.
    """
    records = {index: Record() for index in blocks}
    if absent := records.keys() - set(range(len(net.blocks))):
        raise ValueError(f"blocks {sorted(absent)}: there are none; give some of 0 to {len(net.blocks) - 1}")
    with ExitStack() as opened:
        for index, kept in records.items():
            opened.enter_context(recorded(net.blocks[index], kept))
        yield records


@contextmanager
def recorded(block: MMDiTControlBlock, kept: Record) -> Iterator[None]:
    """Replaces the block's `projections` by a method that records them; the block is unchanged after the context."""
    project = block.projections

    def recording(*tokens) -> list[QKV]:
        streams = project(*tokens)
        maps = maps_of(dict(zip(STREAMS, streams, strict=False)), block.joint)
        setattr(kept, "attn" if len(streams) == len(STREAMS) else "attn2", maps)
        return streams

    block.projections = recording
    hook = block.register_forward_hook(lambda block, before, after: setattr(kept, "lr", after[1].detach()))
    try:
        yield
    finally:
        hook.remove()
        del block.projections


def maps_of(streams: Mapping[str, QKV], joint: bool) -> Maps:
    """Returns the maps of one softmax over all streams or, in variant A, of two: one is the LR stream's alone."""
    if joint:
        return attention_maps(streams)
    others = {name: qkv for name, qkv in streams.items() if name != "lr"}
    return attention_maps(others) | attention_maps({"lr": streams["lr"]})


@torch.no_grad()
def attention_maps(streams: Mapping[str, QKV]) -> Maps:
    """Returns the weights of one attention over all streams, averaged over heads, for every pair of streams.

    Args:
        streams: (query, key, value) by stream, each `(B, heads, tokens, D/heads)`; None for the query of a stream
            that only gives keys.

    Returns:
        Maps `(B, tokens of the query's stream, tokens of the key's stream)`, float32, by the names of both streams.
        The softmax is over the keys of all streams, so a query's weights sum to 1 over its maps.
    """
    queries = {name: q.float() for name, (q, _, _) in streams.items() if q is not None}
    keys = {name: k.float() for name, (_, k, _) in streams.items()}
    every_query, every_key = torch.cat([*queries.values()], dim=2), torch.cat([*keys.values()], dim=2)
    scaled = every_query * every_query.shape[-1] ** -0.5
    # Head by head: all of SD3.5-medium's 24 would take half a gigabyte per image of 512x512.
    heads = zip(scaled.unbind(1), every_key.unbind(1), strict=True)
    weights = sum((q @ k.mT).softmax(dim=-1) for q, k in heads) / scaled.shape[1]

    rows = weights.split([q.shape[2] for q in queries.values()], dim=1)
    return {
        (asking, asked): weights_between
        for asking, row in zip(queries, rows, strict=True)
        for asked, weights_between in zip(keys, row.split([k.shape[2] for k in keys.values()], dim=2), strict=True)
    }
