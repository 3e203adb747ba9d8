"""What `PumaPipeline` draws, against loops written out here."""

import contextlib
import inspect
import io

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from diffusers_puma import PumaPipeline, PumaPipelineOutput
from transformers_puma import PumaImageProcessor, multigranular_features

from .conftest import TOKENS, count_calls, draw, make_language_model, seeds


@torch.no_grad()
def plain_reconstruction(pipe: PumaPipeline, picture: Image.Image, scale: int, seed: int, guidance: float):
    """Report section 3.2 without any of the pipeline's code: encode, pool, 3 DDPM steps with guidance, VAE."""
    preprocess = PumaImageProcessor(size={"height": 32, "width": 32})
    pixels = preprocess([picture, Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
    features = multigranular_features(pipe.image_encoder(pixels).last_hidden_state[:, 1:], 5)[scale]
    unet, generator = getattr(pipe, f"unet_{scale}"), torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        condition = {"conditional": torch.tensor([True, False])}
        cond, uncond = unet(latents.repeat(2, 1, 1, 1), t, features, added_cond_kwargs=condition).sample.chunk(2)
        noise = uncond + guidance * (cond - uncond)
        latents = pipe.scheduler.step(noise, t, latents, generator=generator).prev_sample
    return (pipe.vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)


class TestDecoding:
    @pytest.mark.parametrize("scale", range(5))
    def test_equals_a_plain_loop(self, decoder_pipeline, pictures, scale):
        expected = plain_reconstruction(decoder_pipeline, pictures[0], scale, seed=3, guidance=2.0)
        result = draw(decoder_pipeline, image=pictures[0], scale=scale, seed=3)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    def test_item_of_a_batch_equals_the_item_alone(self, decoder_pipeline, pictures):
        batch = draw(decoder_pipeline, image=pictures, scale=0, seed=[5, 6, 7])
        for item, picture in enumerate(pictures):
            alone = draw(decoder_pipeline, image=[picture], scale=0, seed=[5 + item])
            torch.testing.assert_close(batch[item : item + 1], alone, atol=1e-5, rtol=0)

    def test_scale_of_all_equals_the_scale_alone(self, decoder_pipeline, pictures):
        images = draw(decoder_pipeline, image=pictures[:2], scale="all", seed=[1, 2])
        assert list(images) == [0, 1, 2, 3, 4]
        for scale in (1, 4):
            alone = draw(decoder_pipeline, image=pictures[:2], scale=scale, seed=[1, 2])
            torch.testing.assert_close(images[scale], alone, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("scale", [np.int64(3), [np.int64(3)]])
    def test_a_scale_of_numpy_is_that_scale(self, decoder_pipeline, pictures, scale):
        images = draw(decoder_pipeline, image=pictures[:1], scale=scale)
        plain = draw(decoder_pipeline, image=pictures[:1], scale=3)
        assert torch.equal(images[3] if isinstance(scale, list) else images, plain)

    def test_whole_numbers_of_numpy_are_whole_numbers(self, decoder_pipeline, pictures):
        sizes = dict(height=np.int64(16), width=np.int64(24), num_inference_steps=np.int64(2))
        images = draw(decoder_pipeline, image=pictures[0], num_images_per_prompt=np.int64(2), **sizes)
        assert images.shape == (2, 3, 16, 24)

    def test_list_of_scales_gives_a_dict_in_its_order(self, decoder_pipeline, pictures):
        output = decoder_pipeline(image=pictures[:2], scale=[3, 1])
        assert list(output.images) == [3, 1]
        assert [len(images) for images in output.images.values()] == [2, 2]
        assert list(decoder_pipeline(image=pictures[0], scale=[2]).images) == [2]

    def test_without_guidance_there_is_no_unconditional_branch(self, decoder_pipeline, pictures):
        samples, encoded = count_calls(decoder_pipeline.unet_2), count_calls(decoder_pipeline.image_encoder)
        draw(decoder_pipeline, image=pictures[0], scale=2, guidance_scale=1.0)
        assert samples == [(1, 4, 8, 8)] * 3
        assert encoded == [(1, 3, 32, 32)]
        draw(decoder_pipeline, image=pictures[0], scale=2)
        assert samples[3:] == [(2, 4, 8, 8)] * 3

    def test_encodes_and_projects_once(self, decoder_pipeline, pictures):
        encoded = count_calls(decoder_pipeline.image_encoder)
        projected = {s: count_calls(getattr(decoder_pipeline, f"unet_{s}").encoder_hid_proj) for s in range(5)}
        draw(decoder_pipeline, image=pictures[:2], scale="all", num_images_per_prompt=3)
        assert encoded == [(2, 3, 32, 32), (1, 3, 32, 32)]
        # Two pictures and the black one, whatever the number of steps and seeds.
        assert projected == {scale: [(3, tokens, 32)] for scale, tokens in enumerate(TOKENS)}
        draw(decoder_pipeline, image=pictures[0], scale=4)
        assert encoded[2:] == [(1, 3, 32, 32)], "the black picture is encoded once per pipeline"

    def test_arrays_and_tensors_are_pictures_too(self, decoder_pipeline, pictures):
        """What `output_type` "np" and "pt" give can be given again; bytes are read too."""
        pictures = [picture.resize((32, 32)) for picture in pictures]
        array = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures[:2]])
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
        expected = draw(decoder_pipeline, image=pictures[:2], seed=[0, 1], scale=2)
        as_bytes = (array * 255).round().astype(np.uint8)
        for image in (array, tensor, list(array), [[picture] for picture in tensor], as_bytes):
            assert torch.equal(draw(decoder_pipeline, image=image, seed=[0, 1], scale=2), expected)
        one = draw(decoder_pipeline, image=tensor[0], scale=2)
        torch.testing.assert_close(one, expected[:1], atol=1e-5, rtol=0)

    def test_features_hold_no_graph(self, decoder_pipeline, pictures):
        features = [decoder_pipeline.encode_image(pictures), decoder_pipeline.black_image_features()]
        assert not any(feature.requires_grad for scales in features for feature in scales.values())

    def test_another_encoder_encodes_the_black_picture_anew(self, decoder_pipeline):
        before = decoder_pipeline.black_image_features()
        torch.manual_seed(2)
        decoder_pipeline.image_encoder = type(decoder_pipeline.image_encoder)(decoder_pipeline.image_encoder.config)
        assert not torch.allclose(before[0], decoder_pipeline.black_image_features()[0])

    def test_position_table_only_on_the_conditional_branch(self, decoder_pipeline, pictures):
        features = decoder_pipeline.encode_image([pictures[0]])
        unet = decoder_pipeline.unet_0
        states = decoder_pipeline._cross_attention_states(0, features[0], features[0], 1)
        torch.testing.assert_close(states[0] - states[1], unet.position_table[0], atol=1e-5, rtol=0)

    def test_several_pictures_per_prompt(self, decoder_pipeline, pictures):
        images = draw(decoder_pipeline, image=pictures[:2], scale=1, seed=[0, 1, 2, 3], num_images_per_prompt=2)
        assert images.shape == (4, 3, 16, 16)
        for item in range(4):
            alone = draw(decoder_pipeline, image=[pictures[item // 2]], scale=1, seed=[item])
            torch.testing.assert_close(images[item : item + 1], alone, atol=1e-5, rtol=0)

    def test_features_out_are_features_in(self, decoder_pipeline, pictures):
        first = decoder_pipeline(image=pictures[:2], scale=2, generator=seeds(0, 1), output_type="pt")
        shapes = {scale: tuple(features.shape) for scale, features in first.image_features.items()}
        assert shapes == {scale: (2, tokens, 32) for scale, tokens in enumerate(TOKENS)}
        encoded = count_calls(decoder_pipeline.image_encoder)
        given = {2: first.image_features[2]}
        second = decoder_pipeline(image_features=given, generator=seeds(0, 1), output_type="pt")
        assert not encoded
        torch.testing.assert_close(second.images, first.images, atol=0, rtol=0)
        assert second.image_features is given

    def test_features_without_encoder(self, decoder_pipeline, pictures):
        expected = draw(decoder_pipeline, image=pictures[0], scale=3)
        features, black = decoder_pipeline.encode_image(pictures[:1]), decoder_pipeline.black_image_features()
        decoder_pipeline.image_encoder = None
        with pytest.raises(ValueError, match="guidance_scale=2.0 needs the features of a black image.*no encoder"):
            decoder_pipeline(image_features=features, scale=3)
        result = draw(decoder_pipeline, image_features=features, negative_image_features=black, scale=3)
        torch.testing.assert_close(result, expected, atol=0, rtol=0)
        assert draw(decoder_pipeline, image_features=features, scale=3, guidance_scale=1).shape == (1, 3, 16, 16)

    def test_latents_are_where_every_scale_starts(self, decoder_pipeline, pictures):
        latents = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
        decoder_pipeline.scheduler = DDIMScheduler()
        images = decoder_pipeline(image=pictures[0], scale=[0, 2], latents=latents, output_type="pt").images
        again = decoder_pipeline(image=pictures[0], scale=2, latents=latents, output_type="pt").images
        torch.testing.assert_close(images[2], again, atol=0, rtol=0)
        torch.testing.assert_close(draw(decoder_pipeline, image=pictures[0], scale=2, seed=0), again, atol=0, rtol=0)

    def test_generator_ends_where_one_scale_leaves_it(self, decoder_pipeline, pictures):
        (one,), (several,) = seeds(0), seeds(0)
        decoder_pipeline(image=pictures[0], scale=3, generator=one)
        decoder_pipeline(image=pictures[0], scale=[2, 3], generator=several)
        assert torch.equal(one.get_state(), several.get_state())

    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler,
            DPMSolverMultistepScheduler,
            EulerAncestralDiscreteScheduler,
            EulerDiscreteScheduler,
            HeunDiscreteScheduler,
            LCMScheduler,
            UniPCMultistepScheduler,
        ],
    )
    def test_schedulers(self, decoder_pipeline, pictures, scheduler):
        decoder_pipeline.scheduler = scheduler.from_config(decoder_pipeline.scheduler.config)
        batch = draw(decoder_pipeline, image=pictures[:2], scale=[0, 3], seed=[0, 1])
        assert batch[3].isfinite().all()
        alone = draw(decoder_pipeline, image=pictures[1], scale=3, seed=[1])
        torch.testing.assert_close(batch[3][1:], alone, atol=1e-5, rtol=0)

    def test_size(self, decoder_pipeline, pictures):
        assert decoder_pipeline(image=pictures[0]).images[0].size == (16, 16)
        assert decoder_pipeline(image=pictures[0], height=8, width=24).images[0].size == (24, 8)

    def test_output_types(self, decoder_pipeline, pictures):
        output = decoder_pipeline(image=pictures[0], scale=4, generator=seeds(0)[0])
        assert isinstance(output, PumaPipelineOutput) and isinstance(output.images[0], Image.Image)
        pt = draw(decoder_pipeline, image=pictures[0], scale=4)
        array = decoder_pipeline(image=pictures[0], scale=4, generator=seeds(0)[0], output_type="np").images
        np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
        np.testing.assert_array_equal(np.asarray(output.images[0]), (array[0] * 255).round().astype("uint8"))
        images, features = decoder_pipeline(
            image=pictures[0], scale=4, generator=seeds(0)[0], output_type="latent", return_dict=False
        )
        decoded = decoder_pipeline.image_processor.postprocess(decoder_pipeline.decode_latents(images), "pt")
        torch.testing.assert_close(decoded, pt, atol=0, rtol=0)
        assert set(features) == {0, 1, 2, 3, 4}
        with torch.enable_grad():
            assert not decoder_pipeline.decode_latents(images).requires_grad

    def test_number_of_steps(self, decoder_pipeline, pictures):
        calls = count_calls(decoder_pipeline.unet_4)
        decoder_pipeline(image=pictures[0], scale=4)
        assert len(calls) == 3
        decoder_pipeline(image=pictures[0], scale=4, num_inference_steps=5)
        assert len(calls) == 8

    def test_vae_that_overflows_never_decodes_in_half_precision(self, decoder_pipeline):
        types = []
        decoder_pipeline.vae.half()
        decoder_pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: types.append(args[0].dtype))
        latents = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
        assert decoder_pipeline.decode_latents(latents.half()).dtype == torch.float32
        assert types == [torch.float32]
        assert decoder_pipeline.vae.dtype == torch.float16

    def test_bfloat16_decoders(self, decoder_pipeline, pictures):
        decoder_pipeline.unet_1.to(torch.bfloat16)
        assert draw(decoder_pipeline, image=pictures[0], scale=1).isfinite().all()

    def test_vae_tiling(self, decoder_pipeline, pictures):
        decoder_pipeline.vae.enable_tiling()
        assert decoder_pipeline(image=pictures[0], height=64, width=64).images[0].size == (64, 64)

    def test_best_takes_the_first_rank_over_scales_and_seeds(self, full_pipeline):
        asked = []

        def brightness(images: list[Image.Image], prompt: str) -> list[float]:
            asked.append((len(images), prompt))
            return [float(np.asarray(image).mean()) for image in images]

        full_pipeline.unet_0 = full_pipeline.unet_1 = None
        prompts = ["a", "b"]
        every = full_pipeline(prompts, scale="all", generator=seeds(0, 1, 2, 3), num_images_per_prompt=2)
        best = full_pipeline(
            prompts,
            scale="best",
            image_features=every.image_features,
            scorer=brightness,
            generator=seeds(0, 1, 2, 3),
            num_images_per_prompt=2,
        )
        assert asked == [(6, "a"), (6, "b")]
        assert len(best.images) == 2
        for row, image in enumerate(best.images):
            candidates = [images[2 * row + seed] for images in every.images.values() for seed in range(2)]
            assert np.asarray(image).mean() == max(np.asarray(candidate).mean() for candidate in candidates)


class TestCallbacks:
    def test_sees_and_changes_tensors(self, decoder_pipeline, pictures):
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((pipe.current_scale, step, int(timestep), tuple(tensors)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        latents = decoder_pipeline(
            image=pictures[0],
            scale=[1, 3],
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "encoder_hidden_states"],
        ).images
        times = [int(t) for t in decoder_pipeline.scheduler.timesteps]
        names = ("latents", "encoder_hidden_states")
        assert seen == [(scale, step, t, names) for scale in (1, 3) for step, t in enumerate(times)]
        assert all(not value.any() for value in latents.values())
        assert decoder_pipeline.current_scale is None

    def test_may_change_nothing(self, decoder_pipeline, pictures):
        def decode(callback=None):
            generator = torch.Generator().manual_seed(0)
            options = {"scale": 4, "output_type": "pt", "callback_on_step_end": callback}
            return decoder_pipeline(image=pictures[0], generator=generator, **options).images

        assert torch.equal(decode(lambda *_: None), decode())

    def test_a_callback_of_diffusers_says_what_it_takes(self, decoder_pipeline, pictures):
        seen = []

        class Watch(PipelineCallback):
            tensor_inputs = ["encoder_hidden_states"]

            def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
                seen.append(list(callback_kwargs))
                return callback_kwargs

        for callback in (Watch(), MultiPipelineCallbacks([Watch()])):
            decoder_pipeline(image=pictures[0], scale=4, callback_on_step_end=callback)
        assert seen == [["encoder_hidden_states"]] * 6

    @pytest.mark.parametrize("halves", [False, True])
    def test_guidance_may_end_before_the_denoising(self, decoder_pipeline, pictures, halves):
        """As in diffusers, where callbacks set `_guidance_scale`; then it is as in a call without guidance."""
        reached, seen = [], []

        def end_guidance(pipe, step, timestep, tensors):
            seen.append((step, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps))
            if step > 0:
                return {}
            reached.append(tensors["latents"])
            pipe._guidance_scale = 0.0
            return {"encoder_hidden_states": tensors["encoder_hidden_states"].chunk(2)[0]} if halves else {}

        def go_on(pipe, step, timestep, tensors):
            return {"latents": reached[pipe.current_scale == 3]} if step == 0 else {}

        options = {"image": pictures[0], "scale": [1, 3], "output_type": "pt", "num_inference_steps": 3}
        names = ["latents", "encoder_hidden_states"]
        found, expected = (
            decoder_pipeline(
                **options,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=names,
            ).images
            for guidance, callback in ((4.0, end_guidance), (1.0, go_on))
        )
        for scale in (1, 3):
            torch.testing.assert_close(found[scale], expected[scale])
        assert seen == [(0, 4.0, True, 3), (1, 0.0, False, 3), (2, 0.0, False, 3)] * 2

    def test_a_callback_that_fails_leaves_no_scale_behind(self, decoder_pipeline, pictures):
        def fail(*args):
            raise KeyError("enough")

        with pytest.raises(KeyError):
            decoder_pipeline(image=pictures[0], scale=2, callback_on_step_end=fail)
        assert decoder_pipeline.current_scale is None

    def test_interrupt_ends_the_call(self, decoder_pipeline, pictures):
        calls = count_calls(decoder_pipeline.unet_0)

        def callback(pipe, step, timestep, tensors):
            pipe._interrupt = step == 1
            return tensors

        images = decoder_pipeline(image=pictures[0], scale="all", callback_on_step_end=callback).images
        assert len(calls) == 2 and list(images) == [0]

    def test_progress_of_both_stages(self, full_pipeline):
        full_pipeline.set_progress_bar_config(disable=False, desc="drawing", ascii=True)
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            full_pipeline("a", scale=[2, 3])
        assert "drawing: 100%" in stream.getvalue()
        for text in ("21/21", "features", "3/3", "scale 2", "scale 3"):
            assert text in stream.getvalue()
        full_pipeline.set_progress_bar_config(disable=True)
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            full_pipeline("a")
        assert not stream.getvalue()


class TestLanguageModel:
    @pytest.mark.parametrize("seed", [0, [0]], ids=["one generator", "a list"])
    def test_a_scale_of_sampled_features_does_not_depend_on_the_others(self, full_pipeline, seed):
        flow = {"image_head": "flow", "flow_width": 8, "flow_num_layers": 1, "flow_num_steps": 2}
        full_pipeline.mllm = make_language_model(full_pipeline.processor, image_decoding="next_scale", **flow)
        torch.nn.init.normal_(full_pipeline.mllm.image_head.out_proj.weight)
        several = draw(full_pipeline, "a", scale=[3, 1], seed=seed)
        torch.testing.assert_close(draw(full_pipeline, "a", scale=3, seed=seed), several[3], atol=1e-5, rtol=0)

    def test_one_pass_for_all_scales_and_seeds(self, full_pipeline):
        encoder, passes = count_calls(full_pipeline.mllm.model.vision_tower), count_calls(full_pipeline.mllm.model)
        output = full_pipeline(["a cat", "a dog"], scale="all", num_images_per_prompt=2)
        assert len(passes) == 341
        assert encoder == [(1, 3, 32, 32)], "only the black picture"
        assert [len(images) for images in output.images.values()] == [4] * 5
        assert {scale: tuple(f.shape) for scale, f in output.image_features.items()} == {
            scale: (2, tokens, 32) for scale, tokens in enumerate(TOKENS)
        }

    @pytest.mark.parametrize(("scale", "steps"), [(4, 1), (3, 5), (2, 21), (1, 85), (None, 5)])
    def test_stops_at_the_scale(self, full_pipeline, scale, steps):
        passes = count_calls(full_pipeline.mllm.model)
        output = full_pipeline("a cat", scale=scale)
        assert len(passes) == steps
        assert sum(features.shape[1] for features in output.image_features.values()) == steps

    def test_features_are_the_models(self, full_pipeline, pictures):
        images = [[pictures[0], pictures[1]], [pictures[2]]]
        prompts = ["mix these, please", "redder"]
        inputs = full_pipeline.processor.prepare_generation(prompts, images)
        expected = full_pipeline.mllm.generate_image_features(**inputs, scale=2)
        output = full_pipeline(prompts, images, scale=2)
        for scale in (2, 3, 4):
            torch.testing.assert_close(output.image_features[scale], expected[scale])

    def test_item_of_a_batch_equals_the_item_alone(self, full_pipeline, pictures):
        prompts = ["a", "a much longer prompt", "b"]
        batch = draw(full_pipeline, prompts, pictures, scale=2, seed=[5, 6, 7])
        for item in range(3):
            alone = draw(full_pipeline, prompts[item], pictures[item], scale=2, seed=[5 + item])
            torch.testing.assert_close(batch[item : item + 1], alone, atol=1e-5, rtol=0)

    def test_default_scale(self, full_pipeline, pictures):
        features = full_pipeline("a", pictures[0], num_inference_steps=1).image_features
        assert set(features) == {0, 1, 2, 3, 4}
        full_pipeline.unet_3 = full_pipeline.unet_4 = None
        assert min(full_pipeline("a").image_features) == 2

    def test_reconstruction_leaves_the_language_model_alone(self, full_pipeline, pictures):
        passes = count_calls(full_pipeline.mllm.model)
        output = full_pipeline(image=pictures[:2], scale=1)
        assert not passes and len(output.images) == 2
        expected = full_pipeline.mllm.encode_image(
            full_pipeline.processor.image_processor(pictures[:2], return_tensors="pt")["pixel_values"]
        )
        torch.testing.assert_close(output.image_features[0], expected[0])

    def test_ask(self, full_pipeline, pictures):
        answer = full_pipeline.ask(pictures[0], "What is it?", max_new_tokens=4)
        assert isinstance(answer, str)
        questions = ["What is it?", "How many pictures?"]
        answers = full_pipeline.ask([pictures[0], [pictures[1], pictures[2]]], questions, max_new_tokens=4)
        assert len(answers) == 2 and answers[0] == answer
        with pytest.raises(ValueError, match="1 questions and 2 images"):
            full_pipeline.ask(pictures[:2], "What is it?")
        passes = count_calls(full_pipeline.mllm.model)
        with pytest.raises(ValueError, match="return_dict_in_generate=True is for mllm.generate"):
            full_pipeline.ask(pictures[0], "What is it?", return_dict_in_generate=True)
        assert not passes
        full_pipeline.mllm = None
        with pytest.raises(ValueError, match="a question needs the language model"):
            full_pipeline.ask(pictures[0], "What is it?")

    def test_several_answers_to_each_question(self, full_pipeline, pictures):
        questions = ["What is it?", "How many?"]
        options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
        alone = [full_pipeline.ask(*pair, **options) for pair in zip(pictures[:2], questions, strict=True)]
        assert [len(answers) for answers in alone] == [3, 3] and alone[0] != alone[1]
        assert full_pipeline.ask(pictures[:2], questions, **options) == alone


def test_grid_of_8_has_four_scales(decoder_pipeline, pictures):
    config = decoder_pipeline.image_encoder.config.to_dict() | {"image_size": 32, "patch_size": 4}
    components = {"vae": decoder_pipeline.vae, "scheduler": decoder_pipeline.scheduler}
    # The decoder of 64 tokens is scale 1 of a 16 x 16 grid and scale 0 of an 8 x 8 one.
    shifted = {f"unet_{scale - 1}": getattr(decoder_pipeline, f"unet_{scale}") for scale in range(1, 5)}
    pipe = PumaPipeline(**components, **shifted, image_encoder=CLIPVisionModel(CLIPVisionConfig(**config)))
    pipe.set_progress_bar_config(disable=True)
    features = pipe(image=pictures[0], scale="all", num_inference_steps=1).image_features
    assert [tuple(features[scale].shape[1:]) for scale in range(4)] == [(64, 32), (16, 32), (4, 32), (1, 32)]


def test_signature():
    parameters = list(inspect.signature(PumaPipeline.__call__).parameters.values())
    assert [parameter.name for parameter in parameters[:4]] == ["self", "prompt", "image", "scale"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[4:])
