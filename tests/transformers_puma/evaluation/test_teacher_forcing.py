"""Teacher forcing against generation and against the training loss."""

import pytest
import torch

from tests.transformers_puma.conftest import IMAGE_LENGTH, make_model, make_picture
from transformers_puma import flatten_scales
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

PROMPTS = ["a", "two cats"]


@pytest.fixture(params=["autoregressive", "next_scale", "prefilled"])
def model(request, processor):
    return make_model(processor, image_decoding=request.param)


def prompts(processor, with_pictures: bool):
    pictures = [[make_picture(1)], [make_picture(2), make_picture(3)]] if with_pictures else None
    return processor.prepare_generation(PROMPTS, pictures)


@pytest.mark.parametrize("with_pictures", [False, True])
def test_a_model_that_is_shown_what_it_wrote_writes_it_again(model, processor, with_pictures):
    inputs = prompts(processor, with_pictures)
    free = model.generate_image_features(**inputs)
    forced = teacher_forced_features(model, **inputs, target_features=flatten_scales(free))
    assert forced.keys() == free.keys()
    for scale in free:
        torch.testing.assert_close(forced[scale], free[scale], atol=1e-4, rtol=1e-4)


def test_its_error_is_the_training_loss(model, processor):
    truth = torch.randn(2, IMAGE_LENGTH, 32, generator=torch.Generator().manual_seed(0))
    inputs = prompts(processor, with_pictures=False)
    forced = teacher_forced_features(model, **inputs, target_features=truth)
    errors = (flatten_scales(forced) - truth).square().mean((0, 2))

    placeholders = torch.full((2, IMAGE_LENGTH), model.config.image_token_id)
    ids = torch.cat([inputs["input_ids"], placeholders], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(placeholders)], dim=1)
    with torch.no_grad():
        losses = model(
            input_ids=ids,
            attention_mask=mask,
            image_features=truth,
            image_loss_mask=torch.ones(2, dtype=torch.bool),
            labels=torch.full_like(ids, -100),
        ).scale_losses
    expected = torch.stack([errors[5:].mean(), errors[1:5].mean(), errors[0]])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


def test_truth_matters_where_it_is_read(model, processor):
    inputs = prompts(processor, with_pictures=False)
    truth = torch.randn(2, IMAGE_LENGTH, 32, generator=torch.Generator().manual_seed(0))
    forced = teacher_forced_features(model, **inputs, target_features=truth)
    changed = truth.clone()
    changed[:, 0] += 1  # the coarsest token
    again = teacher_forced_features(model, **inputs, target_features=changed)
    torch.testing.assert_close(again[2], forced[2])
    reads = model.config.image_decoding != "prefilled"
    assert ((again[1] - forced[1]).abs().max() > 1e-3) == reads


def test_features_that_are_samples_use_the_given_noise(processor):
    model = make_model(processor, image_head="flow")
    torch.nn.init.normal_(model.image_head.out_proj.weight, std=0.5)
    inputs = prompts(processor, with_pictures=False)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    free = model.generate_image_features(**inputs, generator=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = model.draw_feature_noise(2, 0, generators, model.device)
    forced = teacher_forced_features(model, **inputs, target_features=flatten_scales(free), noise=noise)
    for scale in free:
        torch.testing.assert_close(forced[scale], free[scale], atol=1e-4, rtol=1e-4)
