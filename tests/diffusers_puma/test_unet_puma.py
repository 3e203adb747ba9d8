import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_puma.unet_puma import PumaUNet2DConditionModel, coordinate_channels

STOCK = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 24,
    "encoder_hid_dim": 12,
    "encoder_hid_dim_type": "text_proj",
    "use_linear_projection": True,
}


def tiny_unet(**kwargs) -> PumaUNet2DConditionModel:
    torch.manual_seed(0)
    return PumaUNet2DConditionModel(**{**STOCK, "num_tokens": 16, **kwargs}).eval()


def inputs(batch: int = 2, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(500), torch.randn(batch, tokens, 12, generator=generator)


@torch.no_grad()
def test_equals_stock_unet_without_position_table():
    unet = tiny_unet()
    stock = UNet2DConditionModel(**STOCK).eval()
    stock.load_state_dict(unet.state_dict())
    torch.testing.assert_close(unet(*inputs()).sample, stock(*inputs()).sample, rtol=0, atol=0)


@torch.no_grad()
def test_position_table_is_added_on_conditional_rows_only():
    unet = tiny_unet(use_position_table=True)
    _, _, features = inputs()
    projected = unet.encoder_hid_proj(features)
    states = unet.project_features(features, torch.tensor([True, False]))
    torch.testing.assert_close(states[0], projected[0] + unet.position_table[0])
    torch.testing.assert_close(states[1], projected[1])
    torch.testing.assert_close(unet.project_features(features, False), projected)
    torch.testing.assert_close(unet.project_features(features)[1], projected[1] + unet.position_table[0])


@torch.no_grad()
def test_projected_once_equals_projected_inside():
    unet = tiny_unet(use_position_table=True)
    sample, timestep, features = inputs()
    conditional = torch.tensor([True, False])
    inside = unet(sample, timestep, features, added_cond_kwargs={"conditional": conditional}).sample
    states = unet.project_features(features, conditional)
    outside = unet(sample, timestep, states, added_cond_kwargs={"projected": True}).sample
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert not torch.allclose(inside, unet(sample, timestep, features).sample)


def test_new_position_table_tells_tokens_apart():
    table = tiny_unet(use_position_table=True).position_table[0]
    assert torch.cdist(table, table).fill_diagonal_(1.0).min() > 0.1


@pytest.mark.parametrize("extra", [{}, {"use_position_table": True, "position_channels": 8, "in_channels": 12}])
@torch.no_grad()
def test_save_and_load_keep_config_and_output(tmp_path, extra):
    unet = tiny_unet(**extra)
    unet.save_pretrained(tmp_path)
    loaded = PumaUNet2DConditionModel.from_pretrained(tmp_path)

    def public(config):
        return {key: value for key, value in config.items() if not key.startswith("_")}

    assert public(loaded.config) == {
        key: list(value) if isinstance(value, tuple) else value for key, value in public(unet.config).items()
    }
    assert "kwargs" not in loaded.config
    for key, value in {**STOCK, "num_tokens": 16, **extra}.items():
        assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value), key
    torch.testing.assert_close(loaded(*inputs()).sample, unet(*inputs()).sample, rtol=0, atol=0)

    again = PumaUNet2DConditionModel.from_config(loaded.config)
    assert public(again.config) == public(loaded.config)


@torch.no_grad()
def test_coordinate_channels_break_translation_symmetry():
    sample = torch.zeros(2, 4, 6, 8)
    channels = coordinate_channels(sample, 8)
    assert channels.shape == (2, 8, 6, 8)
    columns = channels[0].flatten(1).T
    assert torch.cdist(columns, columns).fill_diagonal_(1.0).min() > 0.05
    unet = tiny_unet(position_channels=8, in_channels=12)
    assert unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 12)).sample.shape == (1, 4, 8, 8)


def test_gradients_reach_projection_and_table():
    unet = tiny_unet(use_position_table=True)
    conditional = torch.tensor([True, False])
    unet(*inputs(), added_cond_kwargs={"conditional": conditional}).sample.sum().backward()
    assert unet.encoder_hid_proj.weight.grad.abs().sum() > 0
    assert unet.position_table.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 15}, "num_tokens must be a square number"),
        ({"position_channels": 6, "in_channels": 10}, "position_channels must be a multiple of 4"),
        ({"position_channels": 4}, "below in_channels=4"),
        ({"encoder_hid_dim": None, "encoder_hid_dim_type": None}, "encoder_hid_dim must be"),
    ],
)
def test_inconsistent_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**arguments)


def test_features_of_another_scale_are_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, 16, 12\), got \(2, 4, 12\)"):
        tiny_unet()(*inputs(tokens=4))


def test_coordinate_channels_are_their_formula():
    """A trained decoder reads them, so they may not change."""
    channels = coordinate_channels(torch.zeros(1, 4, 6, 8), 8)[0]
    y, x = (torch.arange(6)[:, None] + 0.5) / 6, (torch.arange(8)[None] + 0.5) / 8
    angles = [torch.pi * 2**n * place.expand(6, 8) for place in (y, x) for n in range(2)]
    torch.testing.assert_close(channels, torch.stack([*(a.sin() for a in angles), *(a.cos() for a in angles)]))
