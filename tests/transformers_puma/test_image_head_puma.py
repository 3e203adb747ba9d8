"""The flow head: on a mixture that no mean represents, and inside the model."""

import pytest
import torch

from transformers_puma import PumaForConditionalGeneration, flatten_scales
from transformers_puma.image_head_puma import PumaFlowHead
from transformers_puma.training import standardize_feature_heads

from .conftest import make_model, make_picture


@pytest.fixture(scope="module")
def flow_model(processor):
    model = make_model(processor, image_head="flow", flow_width=16, flow_num_layers=1, flow_num_steps=4)
    torch.nn.init.normal_(model.image_head.out_proj.weight, std=0.5)
    return model


def test_a_mixture_is_sampled_not_averaged():
    """The state says nothing (0) or where the feature is (1): two clusters at -2 and 2, or at 2 alone."""
    torch.manual_seed(0)
    head = PumaFlowHead(hidden_size=1, feature_size=2, num_scales=1, width=32, num_layers=2)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    scales = torch.zeros(256, dtype=torch.long)
    for _ in range(400):
        known = torch.arange(256) % 2
        side = torch.where(known == 1, 1, torch.randint(0, 2, (256,)) * 2 - 1)
        features = 2 * side[:, None] + 0.1 * torch.randn(256, 2)
        predicted, target = head.loss_pair(known[:, None].float(), features, scales)
        loss = (predicted - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(2, 1000, 2)
    with torch.no_grad():
        states = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 1000, 1)
        unknown, known = head.predict(states, torch.zeros(1000, dtype=torch.long), noise, num_steps=20)
    near = (unknown.abs() - 2).abs().amax(1) < 1
    assert near.float().mean() > 0.9
    assert 0.4 < (unknown[near][:, 0] > 0).float().mean() < 0.6
    assert (unknown[near][:, 0] * unknown[near][:, 1] > 0).float().mean() > 0.95  # the two channels go together
    assert ((known - 2).abs().amax(1) < 1).float().mean() > 0.95


def test_a_new_head_predicts_no_velocity_and_standardises_nothing(processor):
    head = make_model(processor, image_head="flow").image_head
    assert head(torch.randn(3, 32), torch.rand(3), torch.randn(3, 32)).abs().max() == 0
    assert (head.mean == 0).all() and (head.std == 1).all()


@pytest.mark.parametrize("head", ["regression", "flow"])
def test_a_head_in_single_precision_behind_a_backbone_in_half(processor, head):
    """As an adapter trains it; pictures are drawn without autocast."""
    model = make_model(processor, image_head=head).to(torch.bfloat16)
    model.image_head.float()
    features = model.generate_image_features(**processor.prepare_generation(["a"]))
    assert all(feature.isfinite().all() for feature in features.values())


def test_statistics_are_set_saved_and_undone(processor, tmp_path):
    model = make_model(processor, image_head="flow")
    mean, std = torch.randn(32), torch.rand(32) + 0.5
    standardize_feature_heads(model, mean, std)
    model.save_pretrained(tmp_path)
    head = PumaForConditionalGeneration.from_pretrained(tmp_path).image_head
    noise = torch.randn(1, 5, 32)
    # An untrained head moves nothing: what comes out is the noise with the features' mean and deviation.
    features = head.predict(torch.zeros(1, 5, 32), torch.tensor([2, 1, 1, 1, 1]), noise, num_steps=3)
    torch.testing.assert_close(features, noise * std + mean)


def test_the_same_generator_gives_a_row_the_same_features_in_any_batch_and_down_to_any_scale(flow_model, processor):
    prompts, images = ["a red car", "b", "what"], [[], [make_picture(1)], []]

    def features(rows, scale=0):
        inputs = processor.prepare_generation([prompts[row] for row in rows], [images[row] for row in rows])
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return flow_model.generate_image_features(**inputs, scale=scale, generator=generators)

    together = features([0, 1, 2])
    for row in range(3):
        alone = features([row], scale=1)
        for scale in (2, 1):
            torch.testing.assert_close(alone[scale][0], together[scale][row], rtol=0, atol=1e-4)


def test_seeds_make_different_features(flow_model, processor):
    inputs = processor.prepare_generation(["a red car"])
    first, again, other = (
        flatten_scales(flow_model.generate_image_features(**inputs, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1


def test_wrong_number_of_generators(flow_model, processor):
    inputs = processor.prepare_generation(["a"])
    for generate in (flow_model.generate_image_features, flow_model.generate_interleaved):
        with pytest.raises(ValueError, match="2 generators for 1 prompts"):
            generate(**inputs, generator=[torch.Generator(), torch.Generator()])


def test_sampling_integrates_the_velocity_from_noise_to_a_feature(flow_model):
    """Euler's method, written out with `forward`."""
    states, sample = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    head, scales = flow_model.image_head, torch.tensor([2, 1, 1, 1, 1])
    with torch.no_grad():
        features = head.predict(states, scales, sample, num_steps=3)
        for time in (0.0, 1 / 3, 2 / 3):
            sample = sample + head(sample, torch.full((2, 5), time), states) / 3
    torch.testing.assert_close(features, sample * head.std[scales] + head.mean[scales])


def test_the_loss_is_the_velocitys_weighted_per_scale(flow_model, processor):
    ids = torch.tensor([[*processor.bos_ids, *processor.image_ids]])
    features = torch.randn(1, 21, 32)
    batch = {"input_ids": ids, "image_features": features, "image_loss_mask": torch.tensor([True])}
    torch.manual_seed(3)
    outputs = flow_model(**batch, labels=torch.full_like(ids, -100))
    states = flow_model.model(**batch).last_hidden_state[0, 1:22]
    torch.manual_seed(3)
    noise, time = torch.randn(21, 32), torch.rand(21)
    noisy = (1 - time[:, None]) * noise + time[:, None] * features[0]
    error = (flow_model.image_head(noisy, time, states) - (features[0] - noise)).square().mean(1)
    weights = torch.tensor([64.0] + [8.0] * 4 + [1.0] * 16)
    torch.testing.assert_close(outputs.image_loss, (weights * error).mean())
