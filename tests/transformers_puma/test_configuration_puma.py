import pytest

from transformers_puma import PumaConfig

from .conftest import TEXT, VISION, make_config


def test_the_default_is_the_report():
    config = PumaConfig()
    assert config.tokens_per_scale == [256, 64, 16, 4, 1] and config.image_seq_length == 341
    assert config.scale_loss_weights == [1, 8, 64, 512, 1024] and config.num_location_tokens == 224
    assert (config.text_loss_weight, config.image_loss_weight) == (0.02, 1.0)
    assert config.text_config.hidden_size == 4096 and config.vision_config.hidden_size == 1024


def test_round_trip(processor, tmp_path):
    config = make_config(processor, input_scales=[2, 0], scale_loss_weights=[1, 2.5, 3])
    config.save_pretrained(tmp_path)
    again = PumaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.text_config.model_type == "llama" and again.input_scales == [2, 0]


def test_tuples_are_lists_and_those_of_the_caller_stay_its_own(processor):
    weights = [1, 8, 64]
    config = make_config(processor, scale_loss_weights=weights, input_scales=(2, 0))
    weights[0] = 9
    assert config.scale_loss_weights == [1, 8, 64] and config.input_scales == [2, 0]
    assert make_config(processor, scale_loss_weights=(1, 8, 64)).to_dict()["scale_loss_weights"] == [1, 8, 64]


def test_overrides_and_edits_must_be_consistent_too(processor, tmp_path):
    config = make_config(processor)
    config.save_pretrained(tmp_path)
    assert PumaConfig.from_pretrained(tmp_path, input_scales=[2]).input_scales == [2]
    with pytest.raises(ValueError, match=r"input_scales=\[7\]"):
        PumaConfig.from_pretrained(tmp_path, input_scales=[7])
    config.num_scales = 2
    with pytest.raises(ValueError, match="scale_loss_weights"):
        config.save_pretrained(tmp_path)


HYBRID = {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "vocab_size": 512}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_scales", {"num_scales": 4}),
        ("scale_loss_weights", {"scale_loss_weights": [1, 2]}),
        ("scale_loss_weights", {"scale_loss_weights": [1, float("nan"), 2]}),
        ("text_loss_weight", {"text_loss_weight": float("inf")}),
        ("input_scales", {"input_scales": [1, 1]}),
        ("input_scales", {"input_scales": [3]}),
        ("input_scales", {"input_scales": []}),
        ("image_token_id", {"image_token_id": 512}),
        ("image_start_token_id", {"image_start_token_id": 3, "image_token_id": 3}),
        ("vision_config", {"vision_config": {**VISION, "patch_size": 5}}),
        ("vision_config", {"vision_config": {"model_type": "clip"}}),
        ("vision_config", {"vision_config": {**VISION, "model_type": "siglip_vision_model"}}),
        ("text_config", {"text_config": {"model_type": "t5"}}),
        ("text_config", {"text_config": {"model_type": "gemma3"}}),
        ("text_config", {"text_config": {"model_type": "no such model"}}),
        ("text_config is of an encoder", {"text_config": {"model_type": "bert", "vocab_size": 512}}),
        ("text_config", {"text_config": {"model_type": "vit"}}),
        (
            "output_router_logits=True",
            {"text_config": {**TEXT, "model_type": "mixtral", "output_router_logits": True}},
        ),
        ("text_loss_weight", {"text_loss_weight": -1.0}),
        ("scale_loss_weights", {"scale_loss_weights": [1, 2, -3]}),
        ("num_location_tokens", {"num_location_tokens": -1}),
        ("image_decoding", {"image_decoding": "diffusion"}),
        ("image_decoding", {"image_decoding": "next_scale", "text_config": {**TEXT, "model_type": "mistral"}}),
        ("linear attention of text_config", {"image_decoding": "next_scale", "text_config": HYBRID}),
        ("image_head", {"image_head": "linear"}),
        ("flow_width", {"flow_width": 7}),
        ("flow_num_steps", {"flow_num_steps": 0}),
    ],
)
def test_inconsistent_values_name_the_field(field, values):
    ids = {"image_start_token_id": 500, "image_end_token_id": 501, "image_token_id": 502}
    with pytest.raises(ValueError, match=field):
        PumaConfig(
            **{"text_config": {**TEXT, "vocab_size": 512}, "vision_config": VISION, "num_scales": 3, **ids, **values}
        )
