"""Ranks pictures of one caption by the language model itself, for `--scale best`."""

from collections.abc import Callable

import torch
from PIL import Image

from transformers_puma import PumaForConditionalGeneration, PumaProcessor


def caption_scorer(
    mllm: PumaForConditionalGeneration, processor: PumaProcessor
) -> Callable[[list[Image.Image], str], list[float]]:
    """A scorer for `PumaPipeline`: how well the model, shown the picture, would have written the caption.

    The score is the mean log-likelihood of the caption's tokens in the image-to-text sequence
    `<s>[IMG]image[/IMG]caption` of the report's pretraining. The model judges its own pictures, so this compares
    pictures of one caption and measures nothing.
    """

    @torch.no_grad()
    def score(images: list[Image.Image], prompt: str) -> list[float]:
        caption = processor.encode_plain(prompt)
        ids = torch.tensor([processor.bos_ids + processor.image_ids + caption], device=mllm.device)
        target = ids[0, -len(caption) :, None]
        scores = []
        for image in images:
            pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"].to(mllm.device)
            logits = mllm(input_ids=ids, pixel_values=pixel_values, logits_to_keep=len(caption) + 1).logits
            log_likelihood = logits[0, :-1].float().log_softmax(dim=-1)
            scores.append(log_likelihood.gather(1, target).mean().item())
        return scores

    return score
