"""PUMA as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval, tried with 0.7.3), for its hundreds of tasks:

    lmms-eval --model puma --model_args pretrained=hub_configs/puma-emoji --tasks mme --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` of this project, see `lmms_eval_manifest`. Several processes:
`accelerate launch`, or `torchrun` with `--distributed_executor_backend torchrun`.
"""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor, BatchFeature

from ..pictures import as_rgb
from ..processing_puma import PumaProcessor
from .understanding import MAX_NEW_TOKENS

# What a task's `generation_kwargs` may hold besides `until`; a task's own others are not for a model to read.
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")


class PumaLmms(lmms):
    """A PUMA checkpoint. Its pictures stand before the text of a request, in the processor's chat format.

    Args:
        pretrained: model folder or name on the Hub.
        device: `cpu` or `cuda`; each process of a machine takes its own GPU. Default: a GPU if there is one.
        batch_size: requests at once.
        dtype: number format of the weights; default fp16 on a GPU, as the report trained, else fp32.
    """

    is_simple = True  # requests bring text and pictures apart

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, dtype: str | None = None
    ) -> None:
        super().__init__()
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        dtype = dtype or ("float32" if kind == "cpu" else "float16")
        model = AutoModelForMultimodalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.processor: PumaProcessor = AutoProcessor.from_pretrained(pretrained)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, each up to the first of its request's `until`; greedy unless the task asks for a temperature."""
        answers: list[str | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), desc="puma", disable=self.rank > 0)
        for indices, options in self._batches(requests):
            inputs = self._prepare([requests[index].args for index in indices])
            with torch.no_grad():
                sequences = self.model.generate(**inputs, **generation_options(options))
            texts = self.processor.decode_answers(sequences, inputs["input_ids"].shape[1])
            for index, text in zip(indices, texts, strict=True):
                answers[index] = cut_at(text, options.get("until"))
                self.cache_hook.add_partial("generate_until", (requests[index].args[0], options), answers[index])
            bar.update(len(indices))
        bar.close()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of each continuation, and whether greedy decoding writes it.

        lmms-eval takes the smallest value of a question's options (`process_results` of its tasks), not the largest as
        the name says. Its version 0.7.3 turns these pairs into texts before a task reads them
        (`unwrap_generation_output`), so that tasks of its type `multiple_choice` fail with any model.
        """
        return [self._continuation_loss(request.args) for request in tqdm(requests, disable=self.rank > 0)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("PUMA's adapter for lmms-eval answers tasks of one round")

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Indices of requests with the same options, and these."""

        def key(index: int) -> str:
            return json.dumps(requests[index].args[1], sort_keys=True)

        for _, group in itertools.groupby(sorted(range(len(requests)), key=key), key):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size], requests[group[0]].args[1]

    def _prepare(self, requests: list[tuple]) -> BatchFeature:
        """Inputs of the model for the arguments of requests: text, .., how to find pictures, document, task, split."""
        texts = [text for text, *_ in requests]
        pictures = [
            [check_picture(visual, task) for visual in find(self.task_dict[task][split][document])]
            for _, _, find, document, task, split in requests
        ]
        return self.processor.prepare_question(texts, pictures).to(self.device)

    def _continuation_loss(self, request: tuple) -> tuple[float, bool]:
        _, target, _, document, task, split = request
        # A string comes with the delimiter before it, a function's answer without.
        text = target if isinstance(target, str) else f" {target(self.task_dict[task][split][document])}"
        inputs = self._prepare([request])
        added = torch.tensor([self.processor.encode_plain(text)], device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -added.shape[1] - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, added[0])
        return loss.item(), bool((logits.argmax(dim=-1) == added[0]).all())


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `generate` for a task's `generation_kwargs`."""
    chosen = {name: options[name] for name in GENERATION if options.get(name) is not None}
    sampled = bool(chosen.get("temperature")) and chosen.get("do_sample", True)
    if not sampled:
        chosen = {name: value for name, value in chosen.items() if name not in ("temperature", "top_p")}
    return {"max_new_tokens": MAX_NEW_TOKENS, **chosen, "do_sample": sampled}


def cut_at(text: str, until: str | list[str] | None) -> str:
    """The text before the first of some marks."""
    for mark in [until] if isinstance(until, str) else until or []:
        text = text.split(mark)[0] if mark else text
    return text.strip()


def check_picture(visual: Any, task: str) -> Image.Image:
    """Raises `ValueError` for what is no picture, such as the file of a video."""
    if not isinstance(visual, Image.Image):
        raise ValueError(f"task {task} brings a {type(visual).__name__}, and PUMA reads pictures")
    return as_rgb(visual)
