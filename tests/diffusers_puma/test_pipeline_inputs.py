"""What `PumaPipeline` refuses, before anything runs."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_puma import PumaPipeline

from .conftest import TOKENS, count_calls, seeds


def features_of(batch: int, *scales: int) -> dict[int, torch.Tensor]:
    return {scale: torch.zeros(batch, TOKENS[scale], 32) for scale in scales}


PICTURE = Image.new("RGB", (8, 8))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "nothing to draw"),
            ({"prompt": 3}, "prompt must be a string or a list of strings, got 3"),
            ({"prompt": []}, "prompt must be a string"),
            ({"image": "cat.png"}, "image must be a PIL image.*got str"),
            ({"image": [[]]}, "no picture"),
            ({"image": np.full((8, 8, 3), 2.0)}, r"\[0, 1\] or bytes, got float64 of shape \(8, 8, 3\), 2.0 to 2.0"),
            (
                {"image": torch.full((3, 8, 8), -1.0)},
                r"\[0, 1\] or bytes, got torch.float32 of shape \(3, 8, 8\), -1.0",
            ),
            ({"image": torch.zeros(8, 8)}, r"got torch.float32 of shape \(8, 8\)"),
            ({"prompt": "a", "image": [PICTURE, PICTURE]}, "1 prompts and 2 images"),
            ({"prompt": ["a", "b"], "image": PICTURE}, "2 prompts and 1 images"),
            ({"image": [[PICTURE, PICTURE]]}, "a reconstruction is of one image, got 2"),
            ({"prompt": "a", "scale": 7}, "scale must be 0..4.*got 7"),
            ({"prompt": "a", "scale": -1}, "scale must be 0..4.*got -1"),
            ({"prompt": "a", "scale": "finest"}, "scale must be 0..4.*got 'finest'"),
            ({"prompt": "a", "scale": [3, 2.5]}, "scale must be 0..4.*got 2.5"),
            ({"prompt": "a", "scale": []}, "scale is an empty list"),
            ({"prompt": "a", "scale": True}, "scale must be 0..4.*got True"),
            ({"prompt": "a", "scale": [{}]}, "scale must be 0..4.*got {}"),
            ({"prompt": "a", "scale": [("0.4", 3), (1.0, 0)]}, "fractions of a schedule must be numbers"),
            ({"prompt": "a", "height": 16.0}, "height must be a positive multiple of 2, got 16.0"),
            ({"prompt": "a", "generator": tuple(seeds(0))}, "generator must be a torch.Generator or a list.*tuple"),
            ({"prompt": ["a", "b"], "generator": [1, 2]}, "generator must be a torch.Generator or a list.*int"),
            ({"prompt": ["a", "b"], "generator": [None, *seeds(0)]}, "generator must be a torch.Generator.*NoneType"),
            ({"prompt": "a", "guidance_scale": "2"}, "guidance_scale must be a finite number, got '2'"),
            ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
            ({"image_features": {3: 5}}, r"image_features\[3\] must be a tensor, got a int"),
            ({"image_features": {3: [[1.0]]}}, r"image_features\[3\] must be a tensor, got a list"),
            (
                {"prompt": "a", "scale": 1},
                r"scale 1 has no decoder here: unet_1 is absent, there are scales \[0, 2, 3, 4\]",
            ),
            ({"prompt": "a", "scale": "best"}, "needs a scorer.*got None"),
            ({"prompt": "a", "scale": "best", "scorer": 3}, "needs a scorer.*got 3"),
            ({"image": PICTURE, "scale": "best", "scorer": len}, "there is no prompt"),
            ({"prompt": "a", "scale": "best", "scorer": len, "output_type": "latent"}, "output_type='latent'"),
            ({"prompt": "a", "height": 15}, "height must be a positive multiple of 2, got 15"),
            ({"prompt": "a", "width": 0}, "width must be a positive multiple of 2, got 0"),
            (
                {"prompt": "a", "num_inference_steps": 0},
                "num_inference_steps must be a whole number of at least 1, got 0",
            ),
            ({"prompt": "a", "num_inference_steps": 2.0}, "a whole number of at least 1, got 2.0"),
            ({"prompt": "a", "num_inference_steps": 1001}, "num_inference_steps.*1001 cannot be larger than.*1000"),
            (
                {"prompt": "a", "num_images_per_prompt": 0},
                "num_images_per_prompt must be a whole number of at least 1, got 0",
            ),
            ({"prompt": "a", "generator": seeds(0, 1)}, "2 generators for 1 images"),
            ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 9)}, r"latents must be of shape \(1, 4, 8, 8\), got"),
            ({"prompt": "a", "latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor, got a ndarray"),
            ({"prompt": "a", "output_type": "jpeg"}, "output_type must be one of.*got 'jpeg'"),
            ({"prompt": "a", "callback_on_step_end": "print"}, "callback_on_step_end must be a function, got 'print'"),
            ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"list of names.*got \['noise'\]"),
            ({"prompt": "a", "callback_on_step_end_tensor_inputs": None}, "must be a list of names.*got None"),
            ({"prompt": "a", "callback_on_step_end_tensor_inputs": "latents"}, "a list of names.*got 'latents'"),
            ({"image": PICTURE, "image_features": features_of(1, 3)}, "take the place of an image"),
            ({"image_features": {}}, "at least one scale"),
            ({"image_features": features_of(1, 1)}, "no features of any of them"),
            ({"image_features": features_of(1, 3, 4), "scale": 2}, r"no features of scale 2, only of scales \[3, 4\]"),
            (
                {"image_features": {3: torch.zeros(1, 5, 32)}},
                r"image_features\[3\] must be of shape \(1, 4, 32\), got",
            ),
            ({"prompt": "a", "negative_image_features": features_of(1, 4)}, "negative_image_features holds scales"),
            ({"prompt": "a", "negative_image_features": torch.zeros(1, 4, 32)}, "must be a dict of scales.*Tensor"),
            (
                {"prompt": ["a"] * 3, "negative_image_features": features_of(2, 3)},
                r"negative_image_features\[3\] must be of shape \(1 or 3, 4, 32\), got \(2, 4, 32\)",
            ),
        ],
    )
    def test_call(self, full_pipeline, arguments, message):
        full_pipeline.unet_1 = None
        used = [count_calls(full_pipeline.mllm.model), count_calls(full_pipeline.mllm.model.vision_tower)]
        with pytest.raises(ValueError, match=message):
            full_pipeline(**arguments)
        assert used == [[], []]

    def test_prompt_without_language_model(self, decoder_pipeline):
        with pytest.raises(ValueError, match="a prompt needs the language model"):
            decoder_pipeline("a cat")

    def test_image_without_encoder(self, decoder_pipeline, pictures):
        decoder_pipeline.image_encoder = None
        with pytest.raises(ValueError, match="an image needs an image encoder"):
            decoder_pipeline(image=pictures[0])

    def test_first_stage_without_its_components(self, decoder_pipeline, pictures):
        with pytest.raises(ValueError, match="a prompt needs the language model"):
            decoder_pipeline.generate_image_features(["a cat"], None, 3)
        decoder_pipeline.image_encoder = None
        with pytest.raises(ValueError, match="an image needs an image encoder"):
            decoder_pipeline.encode_image(pictures)
        with pytest.raises(ValueError, match="an image needs an image encoder"):
            decoder_pipeline.black_image_features()

    def test_no_decoders(self, decoder_pipeline, pictures):
        for scale in range(5):
            setattr(decoder_pipeline, f"unet_{scale}", None)
        with pytest.raises(ValueError, match="has no decoders"):
            decoder_pipeline(image=pictures[0])

    def test_decoder_of_another_scale(self, decoder_pipeline):
        components = {**decoder_pipeline.components, "unet_1": decoder_pipeline.unet_2}
        with pytest.raises(ValueError, match="unet_1 takes 16 tokens of 32 channels, but the encoder has 64 tokens"):
            PumaPipeline(**components)

    def test_two_encoders(self, full_pipeline, decoder_pipeline):
        components = {**full_pipeline.components, "image_encoder": decoder_pipeline.image_encoder}
        with pytest.raises(ValueError, match="mllm or image_encoder, not both"):
            PumaPipeline(**components)

    def test_scheduler_of_flow_matching(self, full_pipeline):
        full_pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
        used = count_calls(full_pipeline.mllm.model)
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not start from scaled noise"):
            full_pipeline("a")
        assert not used

    @pytest.mark.parametrize(
        "scheduler",
        [
            EDMEulerScheduler(),
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        ],
    )
    def test_schedulers_of_another_process(self, full_pipeline, scheduler):
        full_pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"a {type(scheduler).__name__} of flow matching or of EDM's"):
            full_pipeline("a")

    def test_no_vae(self, decoder_pipeline):
        with pytest.raises(ValueError, match="vae is None: a pipeline needs its VAE"):
            PumaPipeline(**{**decoder_pipeline.components, "vae": None})

    def test_more_than_the_language_model_has_positions_for(self, full_pipeline, pictures):
        full_pipeline.mllm.config.text_config.max_position_embeddings = 345
        full_pipeline("ab", scale=4, num_inference_steps=1)
        with pytest.raises(ValueError, match="a prompt of 4 tokens and an image of 341 does not fit the 344 of"):
            full_pipeline.mllm.config.text_config.max_position_embeddings = 344
            full_pipeline("ab", scale=0)
        with pytest.raises(ValueError, match=r"a prompt of \d+ tokens does not fit the 344 of the language model"):
            full_pipeline.ask(pictures[0], "What is this?")

    def test_scorer_that_gives_too_few_scores(self, full_pipeline):
        with pytest.raises(ValueError, match="1 scores of the scorer and 5 images to rank"):
            full_pipeline("a", scale="best", scorer=lambda images, prompt: [1.0])
