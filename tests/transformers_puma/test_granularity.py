import pytest
import torch

from transformers_puma import flatten_scales, multigranular_features, split_scales, tokens_per_scale
from transformers_puma.granularity import scale_of_position


def test_token_counts_of_the_report():
    assert tokens_per_scale(16, 5) == [256, 64, 16, 4, 1]
    assert tokens_per_scale(8, 4) == [64, 16, 4, 1]


@pytest.mark.parametrize(("grid", "scales"), [(16, 6), (12, 4), (4, 0)])
def test_a_grid_that_cannot_be_halved_so_often(grid, scales):
    with pytest.raises(ValueError, match=f"num_scales={scales}"):
        tokens_per_scale(grid, scales)


def test_each_token_is_the_mean_of_its_four_children():
    grid = torch.randn(2, 8, 8, 3)
    scales = multigranular_features(grid, 4)
    assert [tuple(scale.shape) for scale in scales] == [(2, 64, 3), (2, 16, 3), (2, 4, 3), (2, 1, 3)]
    for scale, side in ((1, 2), (2, 4), (3, 8)):
        blocks = grid.unfold(1, side, side).unfold(2, side, side).mean(dim=(-1, -2))
        torch.testing.assert_close(scales[scale], blocks.flatten(1, 2))
    torch.testing.assert_close(multigranular_features(grid.flatten(1, 2), 4)[2], scales[2])


@pytest.mark.parametrize("shape", [(2, 15, 3), (16, 3)])
def test_what_is_no_square_grid(shape):
    with pytest.raises(ValueError, match="features"):
        multigranular_features(torch.zeros(shape), 2)


def test_a_grid_may_be_wider_than_high():
    grid = torch.randn(2, 4, 8, 3)
    left, right = (multigranular_features(half, 3)[1].unflatten(1, (2, 2)) for half in grid.chunk(2, dim=2))
    torch.testing.assert_close(multigranular_features(grid, 3)[1], torch.cat([left, right], dim=2).flatten(1, 2))
    with pytest.raises(ValueError, match="num_scales=3 does not fit a 6 x 6 grid"):
        multigranular_features(torch.zeros(2, 4, 6, 3), 3)


def test_the_sequence_runs_from_coarse_to_fine_and_back():
    scales = multigranular_features(torch.randn(2, 16, 5), 3)
    sequence = flatten_scales(scales)
    assert torch.equal(sequence[:, :1], scales[2]) and torch.equal(sequence[:, 5:], scales[0])
    back = split_scales(sequence, [16, 4, 1])
    assert all(torch.equal(back[i], scales[i]) for i in range(3))
    assert torch.equal(flatten_scales(back), sequence)
    assert list(split_scales(sequence[:, :9], [16, 4, 1])) == [2, 1]
    assert scale_of_position([16, 4, 1]).tolist() == [2] + [1] * 4 + [0] * 16
