"""Answers in a conversation about pictures, whole or piece by piece. Imports the libraries."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_puma import PumaForConditionalGeneration, PumaProcessor

from .errors import UserError, shown
from .options import MAX_NEW_TOKENS
from .pictures import decode_picture

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """`messages` as `apply_chat_template` takes them, and the pictures of their `{"type": "image"}` parts."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]


@dataclass(frozen=True)
class AnswerOptions:
    """Of `generate`; None is the model's own."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Answer:
    """`finish_reason` is `"stop"`, or `"length"` if `max_new_tokens` cut the answer."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    finish_reason: str


def read_messages(messages: list[dict[str, Any]]) -> Conversation:
    """A conversation in OpenAI's format, whose pictures are `image_url` parts with `data:` URLs.

    Raises:
        UserError: a message that is not of that format, or the last is not the user's.
    """
    conversation = Conversation([], [])
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.keys() != {"role", "content"} or message["role"] not in ROLES:
            raise UserError(
                f"{where} must have content and a role of {', '.join(ROLES)}, and no more: got {shown(message)}"
            )
        content = message["content"]
        if not isinstance(content, (str, list)):
            raise UserError(f"{where}.content must be a text or a list of parts, got {shown(content)}")
        if isinstance(content, list):
            content = [
                _read_part(part, f"{where}.content[{j}]", conversation.images) for j, part in enumerate(content)
            ]
        conversation.messages.append({"role": message["role"], "content": content})
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last of messages must be the user's")
    return conversation


def _read_part(part: Any, where: str, images: list[Image.Image]) -> dict[str, Any]:
    """A part as the chat template takes it; its picture, if it is one, is added to `images`."""
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url), **options}, **rest} if (
            not rest and options.keys() <= {"detail"}
        ):
            if options.get("detail", "auto") != "auto":
                detail = shown(options["detail"])
                raise UserError(f"{where}: detail must be auto, as pictures are read in one size, got {detail}")
            images.append(_read_data_url(url, where))
            return {"type": "image"}
    raise UserError(f"{where} must be a text or an image_url part, got {shown(part)}")


def _read_data_url(url: str, where: str) -> Image.Image:
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise UserError(
            f"{where}: a picture must be a data:image/...;base64,... URL, nothing is fetched: {shown(url)}"
        )
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise UserError(f"{where}: the data of the picture is not base64: {error}") from error
    return decode_picture(io.BytesIO(content), where)


class _Pieces(BaseStreamer):
    """Hands what `generate` writes after the prompt to `write`, as pieces of text."""

    def __init__(self, processor: PumaProcessor, write: Callable[[str], object]):
        self._processor, self._write = processor, write
        self._ids: list[int] | None = None
        self._written = ""

    def put(self, value: torch.LongTensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._processor.decode_answers(torch.tensor([self._ids]), 0)[0]
        if not text.endswith("\ufffd"):  # a character of which tokens are still to come
            self.write_up_to(text)

    def write_up_to(self, text: str) -> None:
        if text != self._written:
            self._write(text[len(self._written) :])
            self._written = text

    def end(self) -> None:
        pass


def prepare(processor: PumaProcessor, conversation: Conversation) -> BatchFeature:
    """Inputs of `answer`.

    Raises:
        UserError: messages that the model's chat template refuses, such as a system message that is not the first.
    """
    try:
        ids, _ = processor.encode_conversation(conversation.messages, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {error.message}") from error
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if conversation.images:
        inputs |= processor.image_processor(conversation.images, return_tensors="pt")
    return BatchFeature(inputs)


def answer(
    mllm: PumaForConditionalGeneration,
    processor: PumaProcessor,
    inputs: BatchFeature,
    options: AnswerOptions,
    **hooks: Any,
) -> Answer:
    """The model's answer to the last message of a conversation; `hooks` are `generate`'s, such as `streamer`."""
    limit = options.max_new_tokens or mllm.generation_config.max_new_tokens or MAX_NEW_TOKENS
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if options.temperature == 0:
        sampling = {"do_sample": False}
    elif sampling:
        sampling["do_sample"] = True
    sequences = mllm.generate(**inputs.to(mllm.device), max_new_tokens=limit, **sampling, **hooks)
    prompt_tokens = inputs["input_ids"].shape[1]
    written = sequences[0, prompt_tokens:].tolist()
    ended = len(written) < limit or written[-1] in _end_ids(mllm)
    text = processor.decode_answers(sequences, prompt_tokens)[0]
    return Answer(text, prompt_tokens, len(written), "stop" if ended else "length")


def stream_answer(
    mllm: PumaForConditionalGeneration,
    processor: PumaProcessor,
    inputs: BatchFeature,
    options: AnswerOptions,
    write: Callable[[str], object],
    stop: Event,
) -> Answer:
    """As `answer`, which hands each piece to `write` as soon as it is there, and ends early once `stop` is set."""

    def is_stopped(input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    pieces, criteria = _Pieces(processor, write), StoppingCriteriaList([is_stopped])
    result = answer(mllm, processor, inputs, options, streamer=pieces, stopping_criteria=criteria)
    pieces.write_up_to(result.text)
    return result


def _end_ids(mllm: PumaForConditionalGeneration) -> list[int]:
    ids = mllm.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]
