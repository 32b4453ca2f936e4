"""Recorded maps and tokens are compared with the attention itself, and the network with one that is not recorded."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from dit4sr_pl.model import DiT4SRTransformer, Variant, block
from dit4sr_pl.model.attention_maps import record
from testing.networks import VARIANTS, randomise

KINDS = VARIANTS | {"legacy": Variant(legacy_lr_keys=True)}


@pytest.fixture(params=KINDS)
def net(base, request) -> DiT4SRTransformer:
    """A network with one head, so that a map is the attention itself and not a mean."""
    config = dict(base.config) | {"num_attention_heads": 1, "attention_head_dim": 32}
    net = DiT4SRTransformer(SD3Transformer2DModel.from_config(config).eval(), KINDS[request.param])
    randomise(net.lr_stream)
    return net


def streams_of(maps, asking: str) -> list[str]:
    return [asked for name, asked in maps if name == asking]


@torch.no_grad()
def test_maps_times_values_is_what_the_attention_returns(net, inputs, monkeypatch):
    calls = []

    def listening(*streams):
        calls.append(([values for _, _, values in streams], joint_attention(*streams)))
        return calls[-1][1]

    joint_attention = block.joint_attention
    monkeypatch.setattr(block, "joint_attention", listening)
    with record(net, range(3)) as records:
        net(**inputs)
    joint = net.variant.lr_integration == "joint"
    for maps, has_text in [(maps, maps is kept.attn) for kept in records.values() for maps in (kept.attn, kept.attn2)]:
        if not maps:
            continue
        text = ["text"] if has_text else []
        for names in [["noise", "lr", *text]] if joint else [["noise", *text], ["lr"]]:
            values, attended = calls.pop(0)
            for asking, expected in zip(names, attended, strict=True):
                assert streams_of(maps, asking) == ([] if expected is None else names)
                if expected is not None:
                    terms = [maps[asking, asked] @ value[:, 0] for asked, value in zip(names, values, strict=True)]
                    torch.testing.assert_close(sum(terms), expected, atol=1e-5, rtol=0)
    assert not calls


@torch.no_grad()
def test_a_map_is_the_mean_over_heads_and_rows_sum_to_one(base, inputs, monkeypatch):
    net = DiT4SRTransformer(base)
    randomise(net.lr_stream)
    seen = []
    attention = block.attention
    monkeypatch.setattr(block, "attention", lambda q, k, v: (seen.append((q, k)), attention(q, k, v))[1])
    with record(net, [1]) as records:
        net(**inputs)
    queries, keys = seen[2]  # block 0 attends twice, then comes block 1
    scores = torch.einsum("bhqd,bhkd->bhqk", queries.double(), keys.double()) / queries.shape[-1] ** 0.5
    maps, tokens = records[1].attn, slice(0, 24)
    torch.testing.assert_close(
        maps["noise", "lr"].double(), scores.softmax(-1).mean(1)[:, tokens, 24:48], atol=1e-6, rtol=0
    )
    assert maps["lr", "noise"].shape == (2, 24, 24) and maps["lr", "text"].shape == (2, 24, 5)
    for asking in ("noise", "lr", "text"):
        rows = sum(maps[asking, asked].sum(-1) for asked in ("noise", "lr", "text"))
        torch.testing.assert_close(rows, torch.ones_like(rows))


@torch.no_grad()
def test_lr_tokens_are_those_that_the_next_block_gets(net, inputs):
    arrived = {}
    for index, after in enumerate(net.blocks):
        after.register_forward_pre_hook(lambda _, streams, index=index: arrived.update({index: streams[1]}))
    with record(net, [0, 1]) as records:
        net(**inputs)
    for index, kept in records.items():
        assert kept.lr.shape == (2, 4 * 6, 32) and torch.equal(kept.lr, arrived[index + 1])


def test_nothing_changes_and_nothing_stays(net, inputs):
    before = [(set(vars(each)), len(each._forward_hooks)) for each in net.blocks]
    plain = net(**inputs)
    with pytest.raises(KeyError), record(net, [0, 2]) as records:
        watched = net(**inputs)
        raise KeyError
    assert torch.equal(plain, watched) and watched.requires_grad
    assert before == [(set(vars(each)), len(each._forward_hooks)) for each in net.blocks]
    tensors = [kept.lr for kept in records.values()] + [m for kept in records.values() for m in kept.attn.values()]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)
    kept = records[0]
    first = kept.attn["noise", "noise"]
    net(**inputs)
    assert kept.attn["noise", "noise"] is first


def test_blocks_that_are_not_there(base):
    with (
        pytest.raises(ValueError, match=r"blocks \[-1, 3\]: there are none; give some of 0 to 2"),
        record(DiT4SRTransformer(base), [-1, 0, 3]),
    ):
        pass
