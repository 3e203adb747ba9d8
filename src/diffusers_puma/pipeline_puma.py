"""Text and pictures to pictures: language model -> features -> decoders, or encoder -> features -> decoders.

The stages are cut at the features `{scale: (B, k, C)}`. The first (`feature_stage.py`) runs once per call, for all
scales and all seeds; the second (`decoder_stage.py`) decodes each scale with its own UNet and knows no text. This file
checks what is asked for and joins the two.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from huggingface_hub import CommitInfo, upload_folder
from PIL import Image
from transformers import CLIPVisionModel

from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.granularity import MAX_SCALES

from .decoder_stage import DecoderStageMixin, Generators, StepCallback
from .feature_stage import Features, FeatureStageMixin
from .loading import bring_in, restore_generation_config, superseded_weights, write_language_model_root
from .lora_puma import PumaLoraLoaderMixin, has_lora_layers
from .pipeline_inputs import (
    Schedule,
    as_image_groups,
    as_prompts,
    as_scales,
    as_schedules,
    check_at_least_one,
    check_callback,
    check_counts,
    check_features,
    check_noise,
    check_number,
    check_output_type,
    is_scale,
    is_schedule,
)
from .pipeline_output import PumaPipelineOutput
from .unet_puma import PumaUNet2DConditionModel

TEXT_SCALE, IMAGE_SCALE = 3, 0  # what scale=None means for text alone and with an image

Prompts = list[str] | None
ImageGroups = list[list[Image.Image]] | None
Scorer = Callable[[list[Image.Image], str], Sequence[float]]


class PumaPipeline(DiffusionPipeline, FeatureStageMixin, DecoderStageMixin, PumaLoraLoaderMixin):
    """PUMA in one: text to image, editing, conditional generation, reconstruction, and questions about pictures.

    Args:
        vae: its latents are what the decoders denoise.
        scheduler: one of diffusion, not of flow matching or EDM; the report samples with `DDPMScheduler`.
        mllm: the language model. Its vision tower is then the image encoder.
        processor: of the language model.
        image_encoder: the encoder of a pipeline without language model.
        unet_0, ..., unet_4: the decoder of each scale, finest first; any subset.
        default_num_inference_steps: denoising steps where a call names none; saved with the pipeline.

    Raises:
        ValueError: two encoders, no VAE, or a decoder that takes other features than its scale of the encoder gives.
    """

    model_cpu_offload_seq = "mllm->image_encoder->unet_4->unet_3->unet_2->unet_1->unet_0->vae"
    _optional_components = ["mllm", "processor", "image_encoder", *(f"unet_{scale}" for scale in range(MAX_SCALES))]

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        mllm: PumaForConditionalGeneration | None = None,
        processor: PumaProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
        unet_0: PumaUNet2DConditionModel | None = None,
        unet_1: PumaUNet2DConditionModel | None = None,
        unet_2: PumaUNet2DConditionModel | None = None,
        unet_3: PumaUNet2DConditionModel | None = None,
        unet_4: PumaUNet2DConditionModel | None = None,
        default_num_inference_steps: int = 50,
    ) -> None:
        super().__init__()
        if vae is None:
            raise ValueError("vae is None: a pipeline needs its VAE, also for output_type='latent'")
        if mllm is not None and image_encoder is not None:
            raise ValueError("the language model holds the image encoder: pass mllm or image_encoder, not both")
        self.register_modules(
            vae=vae,
            scheduler=scheduler,
            mllm=mllm,
            processor=processor,
            image_encoder=image_encoder,
            unet_0=unet_0,
            unet_1=unet_1,
            unet_2=unet_2,
            unet_3=unet_3,
            unet_4=unet_4,
        )
        self.register_to_config(default_num_inference_steps=default_num_inference_steps)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if mllm is not None:
            restore_generation_config(mllm)
        if self._encoder is not None:
            self._check_decoders_fit_encoder()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, scales: list[int] | None = None, **kwargs
    ) -> "PumaPipeline":
        """As `DiffusionPipeline.from_pretrained`; reads (and downloads) only some of the decoders if told which.

        Without `dtype` all is in float32, the language model too. (`DiffusionPipeline.from_pretrained` leaves that in
        the precision of its files, as transformers does.)

        Args:
            scales: the decoders to read; None reads all that are there.

        Raises:
            ValueError: a scale whose decoder the folder does not have.
        """
        if scales is not None:
            index = cls.load_config(pretrained_model_name_or_path, **kwargs)
            present = [s for s in range(MAX_SCALES) if f"unet_{s}" in kwargs or index.get(f"unet_{s}", [None])[0]]
            wanted = as_scales(scales, present, present, IMAGE_SCALE) if scales != [] else []
            kwargs = {f"unet_{s}": None for s in range(MAX_SCALES) if s not in wanted} | kwargs
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: a decoder with LoRA layers, whose weights would be saved under names that nothing reads, or a
                language model with such, which diffusers would leave out.
        """
        if self.mllm is not None and has_lora_layers(self.mllm):
            raise ValueError(
                "the language model holds LoRA layers: save those by its own save_pretrained, and the pipeline with "
                "mllm=peft_model.merge_and_unload() in it"
            )
        adapted = [scale for scale in self.scales if has_lora_layers(self._unet(scale))]
        if adapted:
            raise ValueError(
                f"the decoders of scales {adapted} hold LoRA layers: save those by save_lora_weights, and the "
                "pipeline after unload_lora_weights(), or after fuse_lora() and unload_lora_weights() with them in it"
            )
        # diffusers writes no part that was put into a place which was empty at loading, unless it is registered.
        self.register_modules(**self.components)
        super().save_pretrained(save_directory, **kwargs)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`.

        `save_pretrained` calls this last and before any upload. If it has written the language model, this also makes
        the folder's root one that `AutoModel` and `AutoProcessor` load.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.mllm is not None and (Path(save_directory) / "mllm").is_dir():
            write_language_model_root(Path(save_directory))

    def _upload_folder(
        self,
        working_dir: str,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """As in diffusers, but a language model that was at the root before gives way to the one in `mllm/`."""
        return upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=superseded_weights(Path(working_dir)),
        )

    @property
    def scales(self) -> list[int]:
        """Scales whose decoder is there, finest first."""
        return [scale for scale in range(MAX_SCALES) if self._unet(scale) is not None]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | list | None = None,
        scale: int | list[int] | str | list[tuple[float, int]] | None = None,
        *,
        image_features: Features | None = None,
        negative_image_features: Features | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        scorer: Scorer | None = None,
    ) -> PumaPipelineOutput | tuple:
        """Draws pictures. B prompts (or pictures to reconstruct) give N = B times `num_images_per_prompt` of a scale.

        Args:
            prompt: one or a batch; plain text, nothing in it is markup. Needs the language model.
            image: alone, pictures to reconstruct, without the language model; with a prompt, what the prompt is
                about. `[a, b]` is a batch, `[[a, b]]` two pictures for one prompt; see `as_image_groups`.
            scale: 0 (finest, 256 tokens) .. 4 (1 token); a list of them, or `"all"`, for a dict of pictures; `"best"`
                for the one picture of each prompt that `scorer` ranks first over all scales and seeds. None is 3 for
                text alone and 0 with an image, or the nearest that there is; with `image_features`, their finest.
                A schedule `[(until, scale), ...]` hands the denoising from decoder to decoder: `[(0.4, 3), (1.0, 0)]`
                lays out the first 40 % of the steps with scale 3 and finishes with scale 0.
            image_features: `{scale: (B, k, C)}`, in place of the first stage. A prompt then only serves the scorer.
            negative_image_features: `{scale: (1 or B, k, C)}`, unconditional input of guidance; by default the
                features of a black image.
            num_inference_steps: default `config.default_num_inference_steps`.
            guidance_scale: g in eps = eps_uncond + g (eps_cond - eps_uncond); at 1 or below there is no
                unconditional branch.
            height, width: pixels; default what the finest of the decoders used was made for.
            num_images_per_prompt: pictures with different noise for each prompt.
            generator: one for all noise, or a list with one per picture, which makes each picture the same in any
                batch. Every scale starts from the state in which the generators came.
            latents: (N, latent channels, h, w) unit noise to start from, the same for every scale.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False returns the fields of the output as a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors)` after each denoising step returns a dict
                of tensors to go on with, as in diffusers; `pipe.current_scale` tells the scale. Of
                `encoder_hidden_states` the conditional rows come first.
            callback_on_step_end_tensor_inputs: which of `latents` and `encoder_hidden_states` it gets; a
                `PipelineCallback` says so itself (those that diffusers ships ask for tensors that are not here).
            scorer: `scorer(images, prompt)` -> one number per image, the higher the better.

        Raises:
            ValueError: what cannot be drawn with these arguments or components; checked before anything runs.
        """
        check_number(guidance_scale, "guidance_scale")
        prompts = None if prompt is None else as_prompts(prompt)
        images = None if image is None else as_image_groups(image)
        self._check_source(prompts, images, image_features)
        schedules = self._resolve_scales(scale, images, image_features)
        scales = sorted({number for schedule in schedules for _, number in schedule})
        batch_size = len(next(iter(image_features.values())) if image_features is not None else prompts or images)
        negative = negative_image_features if guidance_scale > 1 else None
        self._check_given_features(scales, batch_size, image_features, negative, guidance_scale)
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        check_at_least_one(num_inference_steps, "num_inference_steps")
        check_at_least_one(num_images_per_prompt, "num_images_per_prompt")
        shape = self._latents_shape(min(scales), batch_size * num_images_per_prompt, height, width)
        check_noise(generator, latents, shape)
        self._check_scheduler(num_inference_steps)
        check_output_type(output_type)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if scale == "best":
            self._check_ranking(prompts, batch_size, output_type, scorer)

        if image_features is None:
            image_features = self._compute_features(prompts, images, min(scales), num_images_per_prompt, generator)
            # Features that are samples are another for each picture.
            num_images_per_prompt = batch_size * num_images_per_prompt // len(image_features[min(scales)])
        if guidance_scale > 1 and negative is None:
            negative = self.black_image_features()

        results = {}
        for schedule in self._each_from_the_same_noise(schedules, generator):
            states = {
                number: self._cross_attention_states(
                    number, image_features[number], negative and negative[number], num_images_per_prompt
                )
                for _, number in schedule
            }
            first = schedule[0][1]
            start = self._start_latents(first, shape, num_inference_steps, generator, latents)
            self._guidance_scale = guidance_scale  # a callback may have changed it
            result = self._denoise(
                start, schedule, states, generator, callback_on_step_end, callback_on_step_end_tensor_inputs
            )
            results[first] = result if output_type == "latent" else self.decode_latents(result)
        self.maybe_free_model_hooks()

        if scale == "best":
            best = self._rank_first(list(results.values()), prompts, scorer)
            pictures = self.image_processor.postprocess(best, output_type)
        else:
            pictures = {
                number: self.image_processor.postprocess(result, output_type) for number, result in results.items()
            }
            if scale is None or is_scale(scale) or is_schedule(scale):
                pictures = pictures[schedules[0][0][1]]
        if not return_dict:
            return pictures, image_features
        return PumaPipelineOutput(images=pictures, image_features=image_features)

    @torch.no_grad()
    def ask(
        self, image: PipelineImageInput | list, question: str | list[str], **generate_kwargs
    ) -> str | list[str] | list[list[str]]:
        """Answers questions about pictures.

        Args:
            image: as in a call: `a`, a batch `[a, b]`, or `[[a, b]]` for one question about two pictures.
            question: plain text, or a batch of them.
            generate_kwargs: of transformers' `generate`.

        Returns:
            The answer, or a list of answers for a list of questions. With `num_return_sequences` above 1 each answer
            is a list of that many.

        Raises:
            ValueError: no language model, a different number of questions and pictures, or
                `return_dict_in_generate`.
        """
        self._check_language_model("a question")
        if generate_kwargs.get("return_dict_in_generate"):
            raise ValueError("return_dict_in_generate=True is for mllm.generate: ask returns answers as text")
        questions, images = as_prompts(question), as_image_groups(image)
        check_counts(questions, images, "questions", "images")
        inputs = self.processor.prepare_question(questions, images).to(bring_in(self, self.mllm))
        sequences = self.mllm.generate(**inputs, **generate_kwargs)
        self.maybe_free_model_hooks()
        answers = self.processor.decode_answers(sequences, inputs["input_ids"].shape[1])
        count = len(answers) // len(questions)
        if count > 1:
            answers = [answers[row : row + count] for row in range(0, len(answers), count)]
        return answers[0] if isinstance(question, str) else answers

    def _compute_features(
        self,
        prompts: Prompts,
        images: ImageGroups,
        finest: int,
        num_images_per_prompt: int,
        generator: Generators,
    ) -> Features:
        """Features `{scale: (B, k, C)}`, or (N, k, C) where the language model samples them."""
        if prompts is None:
            return self.encode_image([image for group in images for image in group])
        if self.mllm.config.image_head == "regression":
            return self.generate_image_features(prompts, images, finest)
        copies = [row for row in range(len(prompts)) for _ in range(num_images_per_prompt)]
        groups = images and [images[row] for row in copies]
        return self.generate_image_features([prompts[row] for row in copies], groups, finest, generator)

    def _each_from_the_same_noise(self, schedules: list[Schedule], generator: Generators) -> Iterator[Schedule]:
        """The schedules in turn, each with the generators as they came, so that none depends on the others asked for.

        Stops when a callback interrupts.
        """
        generators = [] if generator is None else generator if isinstance(generator, list) else [generator]
        states = [item.get_state() for item in generators]
        self._interrupt = False
        for schedule in schedules:
            for item, state in zip(generators, states, strict=True):
                item.set_state(state)
            yield schedule
            if self.interrupt:
                break

    def _rank_first(self, batches: list[torch.Tensor], prompts: list[str], scorer: Scorer) -> torch.Tensor:
        """Each scale's pictures (N, 3, height, width) -> for each prompt the one that ranks first (B, 3, ...)."""
        best = []
        for row, prompt in enumerate(prompts):
            candidates = torch.cat([batch.unflatten(0, (len(prompts), -1))[row] for batch in batches])
            scores = scorer(self.image_processor.postprocess(candidates, "pil"), prompt)
            check_counts(scores, candidates, "scores of the scorer", "images to rank")
            best.append(candidates[max(range(len(scores)), key=scores.__getitem__)])
        return torch.stack(best)

    def _check_source(self, prompts: Prompts, images: ImageGroups, image_features: Features | None) -> None:
        """Raises `ValueError` if there is nothing to draw from, or no component that could read it."""
        if image_features is not None:
            if images is not None or not isinstance(image_features, dict) or not image_features:
                raise ValueError("image_features must be a dict of at least one scale, and take the place of an image")
            for scale, features in image_features.items():
                if not isinstance(features, torch.Tensor):
                    raise ValueError(f"image_features[{scale}] must be a tensor, got a {type(features).__name__}")
            return
        if prompts is None and images is None:
            raise ValueError("nothing to draw: pass a prompt, an image or image_features")
        if prompts is not None:
            self._check_language_model("a prompt")
        self._check_encoder()
        if prompts is not None and images is not None:
            check_counts(prompts, images, "prompts", "images")
        if prompts is None and any(len(group) > 1 for group in images):
            raise ValueError(f"a reconstruction is of one image, got {max(map(len, images))} for one item")

    def _resolve_scales(self, scale: Any, images: ImageGroups, image_features: Features | None) -> list[Schedule]:
        if image_features is not None:
            available = [number for number in self.scales if number in image_features]
            return as_schedules(scale, self.scales, available, default=min(image_features))
        available = [number for number in self.scales if number < len(self._tokens_per_scale)]
        return as_schedules(scale, self.scales, available, TEXT_SCALE if images is None else IMAGE_SCALE)

    def _check_given_features(
        self,
        scales: list[int],
        batch_size: int,
        image_features: Features | None,
        negative: Features | None,
        guidance_scale: float,
    ) -> None:
        configs = {scale: self._unet(scale).config for scale in scales}
        shapes = {scale: (config.num_tokens, config.encoder_hid_dim) for scale, config in configs.items()}
        if image_features is not None:
            check_features(image_features, "image_features", shapes, {batch_size})
        if negative is not None:
            check_features(negative, "negative_image_features", shapes, {1, batch_size})
        elif guidance_scale > 1 and self._encoder is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs the features of a black image, and this pipeline has no "
                "encoder: pass negative_image_features, or guidance_scale=1"
            )

    def _check_ranking(self, prompts: Prompts, batch_size: int, output_type: str, scorer: Scorer | None) -> None:
        if not callable(scorer):
            raise ValueError(f"scale='best' needs a scorer(images, prompt) that ranks the pictures, got {scorer!r}")
        if prompts is None:
            raise ValueError("scale='best' ranks pictures by their prompt, and there is no prompt")
        check_counts(prompts, range(batch_size), "prompts", "rows of image_features")
        if output_type == "latent":
            raise ValueError("scale='best' ranks pictures, and output_type='latent' makes none")

    def _check_decoders_fit_encoder(self) -> None:
        tokens, channels = dict(enumerate(self._tokens_per_scale)), self._vision_config.hidden_size
        for scale in self.scales:
            config = self._unet(scale).config
            if (config.num_tokens, config.encoder_hid_dim) != (tokens.get(scale), channels):
                raise ValueError(
                    f"unet_{scale} takes {config.num_tokens} tokens of {config.encoder_hid_dim} channels, but the "
                    f"encoder has {tokens.get(scale, 'no')} tokens of {channels} channels at scale {scale}"
                )
