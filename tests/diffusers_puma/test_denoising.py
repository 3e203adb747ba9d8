"""What the denoising is given: scaled noise and inputs, pictures as the processor has them, features of one prompt."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from diffusers_puma.evaluation import Drawer
from transformers_puma import PumaImageProcessor
from transformers_puma.evaluation.runner import sample_seed

from .conftest import draw, seeds


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@torch.no_grad()
def test_a_scheduler_that_scales_noise_and_inputs_equals_a_plain_loop(decoder_pipeline, pictures, spacing):
    """DDPM starts from unit noise and reads its samples as they are; Euler does neither."""
    pipe = decoder_pipeline
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    features, black = pipe.encode_image(pictures[:1])[3], pipe.black_image_features()[3]
    pipe.scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 8, 8, generator=seeds(0)[0]) * pipe.scheduler.init_noise_sigma
    assert pipe.scheduler.init_noise_sigma > 2
    for t in pipe.scheduler.timesteps:
        sample = pipe.scheduler.scale_model_input(latents, t)
        cond, uncond = (pipe.unet_3(sample, t, source).sample for source in (features, black))
        latents = pipe.scheduler.step(uncond + 2.0 * (cond - uncond), t, latents).prev_sample
    expected = (pipe.vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)
    result = draw(pipe, image=pictures[0], scale=3)
    assert 0.05 < ((result > 0) & (result < 1)).float().mean()  # not all of it is clamped
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_pictures_are_normalised_as_the_processor_says(full_pipeline, pictures):
    """Not every encoder was trained with CLIP's mean and deviation."""
    own = PumaImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.4, 0.5, 0.6])
    full_pipeline.processor.image_processor = own
    shown = [pictures[0], Image.new("RGB", (32, 32))]
    expected = full_pipeline.mllm.encode_image(own(shown, return_tensors="pt")["pixel_values"])
    found = full_pipeline.encode_image(pictures[:1]), full_pipeline.black_image_features()
    for row in range(2):
        torch.testing.assert_close(found[row][0][0], expected[0][row])


def test_each_prompt_may_have_its_own_negative_features(decoder_pipeline, pictures):
    features, negative = decoder_pipeline.encode_image(pictures[:2]), decoder_pipeline.encode_image(pictures[1:])
    given = {"image_features": {3: features[3]}, "negative_image_features": {3: negative[3]}}
    images = draw(decoder_pipeline, **given, num_images_per_prompt=2, seed=[0, 1, 2, 3], guidance_scale=6.0)
    for item in range(4):
        own = {name: {3: value[3][item // 2][None]} for name, value in given.items()}
        alone = draw(decoder_pipeline, **own, seed=[item], guidance_scale=6.0)
        torch.testing.assert_close(images[item : item + 1], alone, atol=1e-5, rtol=0)


def test_the_size_is_that_of_the_finest_decoder_that_is_used(decoder_pipeline, pictures):
    decoder_pipeline.unet_1.register_to_config(sample_size=12)
    drawn = decoder_pipeline(image=pictures[0], scale=[3, 1]).images
    assert {scale: images[0].size for scale, images in drawn.items()} == {3: (24, 24), 1: (24, 24)}
    assert decoder_pipeline(image=pictures[0], scale=3).images[0].size == (16, 16)


def test_settings_of_an_evaluation_reach_the_pipeline(decoder_pipeline, pictures):
    settings = {"num_inference_steps": 2, "guidance_scale": 6.0}
    drawn = Drawer(decoder_pipeline, [3], seeds=[1], **settings).draw(["cat"], image=pictures[:1])[3][0][0]
    generator = torch.Generator().manual_seed(sample_seed(1, "cat"))
    expected = decoder_pipeline(image=pictures[0], scale=3, generator=generator, **settings).images[0]
    assert drawn.tobytes() == expected.tobytes()
