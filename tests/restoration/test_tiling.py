import pytest
import torch

from dit4sr_pl.restoration.tiling import TileBatcher, overlapping, shifted, size_of, tiled


@pytest.mark.parametrize("length", [16, 18, 32, 34, 50, 64, 100])
def test_tiles_cover_overlap_and_stay_on_the_patch_grid(length):
    tile, overlap, patch = 32, 12, 2
    tops, bottoms = zip(*overlapping(length, tile, overlap, patch), strict=True)
    assert tops[0] == 0 and all(top % patch == 0 for top in tops)
    assert bottoms == tuple(top + min(tile, length) for top in tops) and bottoms[-1] == length
    assert all(b - a <= tile - overlap for a, b in zip(tops, tops[1:], strict=False))


def test_one_tile_is_no_tile():
    noisy, lr = torch.randn(2, 1, 4, 32, 20)
    predict = lambda noisy, lr, _: noisy.cumsum(-1) * lr  # noqa: E731
    assert torch.equal(
        tiled(predict, noisy, lr, tile=32, overlap=12, patch=2, batcher=TileBatcher(8)), predict(noisy, lr, [0])
    )


def test_blending_leaves_what_tiles_agree_on():
    noisy, lr = torch.randn(2, 2, 4, 70, 44)
    result = tiled(lambda noisy, lr, _: 2 * noisy - lr, noisy, lr, tile=32, overlap=12, patch=2, batcher=TileBatcher(3))
    torch.testing.assert_close(result, 2 * noisy - lr)


def test_weights_are_centred():
    """Two tiles that predict 0 and 1 cross over in the middle of the image, symmetrically."""
    noisy = torch.zeros(1, 1, 32, 48)
    noisy[..., 24:] = 1
    nearest = lambda noisy, *_: noisy.mean(dim=(1, 2, 3), keepdim=True).round().expand_as(noisy)  # noqa: E731
    result = tiled(nearest, noisy, noisy, tile=32, overlap=12, patch=2, batcher=TileBatcher(2))[0, 0, 0]
    torch.testing.assert_close(result + result.flip(0), torch.ones(48))


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_tiles_go_in_batches_over_images_and_keep_their_image(most):
    noisy, lr = torch.randn(2, 3, 4, 52, 32)  # two tiles an image
    calls = []

    def predict(noisy, lr, places):
        images = [image for image, *_ in places]
        calls.append(images)
        return noisy + lr * torch.tensor(images).view(-1, 1, 1, 1)

    result = tiled(predict, noisy, lr, tile=32, overlap=12, patch=2, batcher=TileBatcher(most))
    torch.testing.assert_close(result, noisy + lr * torch.arange(3).view(-1, 1, 1, 1))
    assert sum(calls, []) == [0, 0, 1, 1, 2, 2] and len(calls) == -(-6 // most)


def test_the_last_batch_of_tiles_is_filled_up_for_a_compiled_network():
    (noisy, lr), sizes = torch.randn(2, 1, 4, 64, 96), []

    def predict(noisy, lr, images):
        sizes.append(len(images))
        return 2 * noisy - lr

    arguments = {"tile": 32, "overlap": 12, "patch": 2}
    plain = tiled(predict, noisy, lr, **arguments, batcher=TileBatcher(4))
    assert len(set(sizes)) == 2
    sizes.clear()
    torch.testing.assert_close(tiled(predict, noisy, lr, **arguments, batcher=TileBatcher(4, padded=True)), plain)
    assert set(sizes) == {4}


@pytest.mark.parametrize("length", [32, 34, 50, 64, 100])
@pytest.mark.parametrize("shift", [0, 0.03, 0.25, 0.5, 0.99])
def test_shifted_tiles_lie_side_by_side_on_the_patch_grid(length, shift):
    tile, patch = 32, 2
    spans = shifted(length, shift, tile, patch)
    covered = torch.zeros(length)
    for start, stop in spans:
        assert start % patch == 0 and min(length, tile // 4) <= stop - start <= tile
        covered[start:stop] += 1
    assert covered.min() == 1 and covered.max() <= 2
    cuts = {stop for _, stop in spans[:-1] if stop > tile // 4}
    if length > tile:
        first = round(shift * tile / patch) * patch
        assert cuts == {cut for cut in range(first, length, tile) if cut > tile // 4}
        # Only what the edges leave less than a quarter of is evaluated twice.
        assert (covered == 2).sum() <= 2 * (tile // 4 - patch)


def test_shifted_tiles_evaluate_about_every_latent_once_and_leave_what_tiles_agree_on():
    noisy, lr = torch.randn(2, 2, 4, 70, 100)
    evaluated = []

    def predict(noisy, lr, places):
        evaluated.extend(size_of(place) for place in places)
        assert {tuple(noisy.shape[-2:])} == {size_of(place) for place in places}
        return 2 * noisy - lr

    arguments = {"tile": 32, "overlap": 12, "patch": 2, "batcher": TileBatcher(3)}
    torch.testing.assert_close(tiled(predict, noisy, lr, **arguments, shift=(0.3, 0.6)), 2 * noisy - lr)
    once = noisy[:, 0].numel()
    assert once <= sum(height * width for height, width in evaluated) < 1.1 * once
    evaluated.clear()
    tiled(predict, noisy, lr, **arguments)
    assert sum(height * width for height, width in evaluated) > 2 * once


def test_shifted_latents_that_fit_into_one_tile_are_one_tile():
    noisy, lr = torch.randn(2, 1, 4, 32, 20)
    arguments = {"tile": 32, "overlap": 12, "patch": 2, "batcher": TileBatcher(3)}
    predict = lambda noisy, lr, _: noisy.cumsum(-1) * lr  # noqa: E731
    assert torch.equal(tiled(predict, noisy, lr, **arguments, shift=(0.3, 0.6)), predict(noisy, lr, []))
