"""Schedules over scales, and features that are samples."""

import pytest
import torch

from diffusers_puma.pipeline_inputs import scale_at

from .conftest import make_language_model

STEPS = 5


def run(pipe, pictures, scale, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(pictures))]
    return pipe(
        image=pictures, scale=scale, num_inference_steps=STEPS, generator=generators, output_type="latent", **kwargs
    ).images


def test_each_step_belongs_to_the_first_decoder_that_is_not_done():
    assert [scale_at([(0.4, 3), (1.0, 0)], step, 5) for step in range(5)] == [3, 3, 0, 0, 0]
    assert [scale_at([(0.05, 4), (0.5, 2), (1.0, 1)], step, 4) for step in range(4)] == [2, 2, 1, 1]


@torch.no_grad()
def test_a_decoder_goes_on_where_another_stopped(decoder_pipeline, pictures):
    """Against the steps written out with stock calls."""
    pipe, picture = decoder_pipeline, pictures[:1]
    features, black = pipe.encode_image(picture), pipe.black_image_features()
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        scale = 3 if step < 2 else 0
        unet = getattr(pipe, f"unet_{scale}")
        conditional, unconditional = (
            unet(latents, timestep, source[scale], added_cond_kwargs={"conditional": torch.tensor([flag])}).sample
            for source, flag in ((features, True), (black, False))
        )
        noise = unconditional + 2.0 * (conditional - unconditional)
        latents = pipe.scheduler.step(noise, timestep, latents, generator=generator).prev_sample
    result = run(pipe, picture, [(0.4, 3), (1.0, 0)])
    torch.testing.assert_close(result, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", [[(1.0, 2)], [(0.5, 2), (1.0, 2)], [(0.01, 4), (1.0, 2)]])
def test_schedules_of_one_decoder_are_that_scale(decoder_pipeline, pictures, schedule):
    assert torch.equal(run(decoder_pipeline, pictures, schedule), run(decoder_pipeline, pictures, 2))


def test_a_callback_sees_which_decoder_is_at_work(decoder_pipeline, pictures):
    scales = []

    def note(pipe, step, timestep, tensors):
        scales.append((pipe.current_scale, tensors["encoder_hidden_states"].shape[1]))
        return {}

    run(
        decoder_pipeline,
        pictures,
        [(0.6, 4), (1.0, 1)],
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["encoder_hidden_states"],
    )
    assert scales == [(4, 1)] * 3 + [(1, 64)] * 2


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([(0.4, 3), (0.9, 0)], "rise from above 0 to 1.0"),
        ([(0.4, 3), (0.4, 2), (1.0, 0)], "rise from above 0 to 1.0"),
        ([(0.0, 3), (1.0, 0)], "rise from above 0 to 1.0"),
        ([(0.4, 3), 0], "list of .until, scale."),
        ([(0.4, 7), (1.0, 0)], "got 7"),
    ],
)
def test_bad_schedules(decoder_pipeline, pictures, schedule, message):
    with pytest.raises(ValueError, match=message):
        run(decoder_pipeline, pictures, schedule)


class TestSampledFeatures:
    @pytest.fixture
    def flow_pipeline(self, full_pipeline):
        full_pipeline.mllm = make_language_model(
            full_pipeline.processor,
            image_decoding="next_scale",
            image_head="flow",
            flow_width=8,
            flow_num_layers=1,
            flow_num_steps=2,
        )
        torch.nn.init.normal_(full_pipeline.mllm.image_head.out_proj.weight)
        return full_pipeline

    def test_each_picture_has_features_of_its_own(self, flow_pipeline):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        output = flow_pipeline(["a", "b"], scale=2, num_images_per_prompt=2, generator=generators)
        assert len(output.images) == 4 and output.image_features[4].shape == (4, 1, 32)
        features = output.image_features[2].flatten(1)
        assert torch.pdist(features).min() > 0.1

    def test_a_picture_of_a_batch_equals_the_picture_alone(self, flow_pipeline):
        def latents(prompts, seeds):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return flow_pipeline(prompts, scale=2, generator=generators, output_type="latent").images

        torch.testing.assert_close(latents(["a", "b"], [5, 6])[1:], latents(["b"], [6]), atol=1e-4, rtol=0)

    def test_the_progress_bar_counts_passes(self, flow_pipeline):
        passes = []
        flow_pipeline.mllm.model.language_model.register_forward_hook(lambda *_: passes.append(1))
        flow_pipeline("a", scale=1)
        assert len(passes) == 4
