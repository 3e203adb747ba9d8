"""Rows of text and pictures to a batch, with what is supervised: what the model is to produce, and nothing else."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import UndefinedError
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..boxes_puma import IMAGE_TOKEN, MARKUP
from ..pictures import picture_size
from ..processing_puma import PumaProcessor

Row = dict[str, Any]

logger = logging.get_logger(__name__)


@dataclass
class PumaDataCollator:
    """Batches rows of these forms, each with its pictures in `images`, in the order of their marks in the text:

    - `{"prompt", "completion"}`: texts in which `<image>` stands for a picture; the completion is supervised;
    - the same as lists of messages; what the assistant says in the completion is supervised;
    - `{"messages"}`: a conversation with `{"type": "image"}` parts, or of plain texts alone, where the pictures come
      before the first of the user's, as in TRL; what the assistant says is supervised;
    - `{"text"}`: all of it is supervised.

    Other than these marks, nothing in a text becomes a special token. `boxes`, each (x_min, y_min, x_max, y_max) in
    pixels of its picture, stand for `<box>` marks in any of the texts, see `PumaProcessor.locate_boxes`.

    `image_features`, for each picture (S, C) encoder features coarsest first, may stand in place of `images`; with
    boxes, the row then needs `image_sizes`, the (width, height) of each. A row that finishes with a picture ends after
    its scale `finest_scale`, if given: attention is causal, so the coarser scales train as in the whole row. Pictures
    that are not supervised end after the scale `finest_given_scale`, if given: a model then sees many of them for the
    cost of a whole one. A column that is None counts as absent. `image`, one picture, is short for `images` of
    one, as in TRL and in the image folders of datasets.

    Args:
        processor: the model's.
        tokens_per_scale: the model's, `config.tokens_per_scale`; only rows with one of the finest scales need it.
        max_length: longer rows are cut; None keeps them whole.
        packing: the rows of a batch form one sequence without padding. Position ids start anew with each row; this is
            what tells transformers, in the absence of an attention mask and of a cache (`use_cache=False`, as the
            trainers have it), that no row sees another.
        assistant_only_loss: False supervises everything in a conversation `messages`.

    A call returns `input_ids` and `labels` (B, T), and `attention_mask` (B, T), padded on the right, or with packing
    `position_ids`, B being 1; with pictures also `image_loss_mask` (n,) and either `pixel_values`
    (n, 3, height, width) or `image_features` (n, S, C).
    """

    processor: PumaProcessor
    tokens_per_scale: list[int] | None = None
    max_length: int | None = None
    packing: bool = False
    assistant_only_loss: bool = True

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1, or None for no limit")
        if self.tokens_per_scale is not None and sum(self.tokens_per_scale) != self.processor.image_seq_length:
            raise ValueError(
                f"the processor has {self.processor.image_seq_length} tokens for a picture, the model "
                f"{sum(self.tokens_per_scale)}, tokens_per_scale={self.tokens_per_scale}: give the model's processor"
            )

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        rows = [tidy_row(row) for row in rows]
        encoded = [self._encode(row) for row in rows]
        sequences = [(ids, self._labels(ids, supervised)) for ids, supervised, _ in encoded]
        batch = self._pack(sequences) if self.packing else self._pad(sequences)
        targets = [target for _, _, row_targets in encoded for target in row_targets]
        if targets:
            batch["image_loss_mask"] = torch.tensor(targets)
            batch |= self._images(rows, [len(row_targets) for _, _, row_targets in encoded])
        return batch

    def _labels(self, ids: list[int], supervised: list[bool]) -> list[int]:
        """Supervised text; the first token of a row has nothing before it that could predict it."""
        image_token_id = self.processor.image_token_id
        return [
            token if flag and i and token != image_token_id else -100
            for i, (token, flag) in enumerate(zip(ids, supervised, strict=True))
        ]

    def _pack(self, sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[token for ids, _ in sequences for token in ids]]),
            "labels": torch.tensor([[label for _, labels in sequences for label in labels]]),
            "position_ids": torch.tensor([[position for ids, _ in sequences for position in range(len(ids))]]),
        }

    def _pad(self, sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        padded = self.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in sequences]}, padding_side="right", return_tensors="pt"
        )
        # A row may be empty, which has no type of its own.
        labels = [torch.tensor(row_labels, dtype=torch.long) for _, row_labels in sequences]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "labels": labels}

    def _images(self, rows: list[Row], counts: list[int]) -> dict[str, torch.Tensor]:
        """The pictures of the batch; `counts` says how many of each row are left after cutting."""
        name = "image_features" if any("image_features" in row for row in rows) else "images"
        other = {"image_features": "images", "images": "image_features"}[name]
        if any(row.get(other) for row in rows):
            raise ValueError("a batch cannot hold rows with images and rows with image_features")
        pictures = [picture for row, count in zip(rows, counts, strict=True) for picture in row.get(name, [])[:count]]
        if name == "image_features":
            return {"image_features": torch.stack([torch.as_tensor(features) for features in pictures])}
        return {"pixel_values": self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]}

    def _encode(self, row: Row) -> tuple[list[int], list[bool], list[bool]]:
        """Ids, which of them are supervised, and for each picture whether it is a target."""
        _check_pictures(row)
        try:
            ids, supervised = self._encode_texts(row)
        except (AttributeError, KeyError, TypeError, UndefinedError) as error:
            raise ValueError(
                f"a row cannot be read ({type(error).__name__}: {error}); a message needs a 'role' and a 'content', "
                f"which is a text or a list of parts such as {{'type': 'text', 'text': ..}}: {_excerpt(row)}"
            ) from error
        self._shorten_given(ids, supervised, row.get("finest_given_scale"))
        starts = self._image_starts(ids)
        given = len(row.get("image_features", row.get("images", [])))
        if given != len(starts):
            raise ValueError(
                f"the row's text holds {len(starts)} images but {given} were given in 'images'; a picture's place is "
                f"<image> in a text, {{'type': 'image'}} in the parts of a message: {_excerpt(row)}"
            )

        if not any(supervised):
            logger.warning_once(f"nothing is learnt of rows without answer or completion, such as {_excerpt(row)}")
        length = min(self.max_length or len(ids), self._end_at_scale(row, ids, starts) or len(ids))
        if any(supervised) and not any(supervised[:length]):
            logger.warning_once(
                f"max_length={self.max_length} cuts rows before the first token that is learnt, so nothing is learnt "
                f"of them; a picture alone takes {self.processor.image_seq_length} tokens"
            )
        targets = [supervised[start] for start in starts if start < length]
        return ids[:length], supervised[:length], targets

    def _picture_sizes(self, row: Row) -> list[tuple[int, int]]:
        """(width, height) of each picture of a row, as far as boxes need them."""
        if not row.get("boxes"):
            return []
        if "image_features" not in row:
            pictures = self.processor.image_processor.fetch_images(list(row.get("images", [])))
            return [picture_size(picture) for picture in pictures]
        if "image_sizes" not in row:
            raise ValueError(
                "boxes in a row with image_features need image_sizes, the (width, height) of each picture"
            )
        return row["image_sizes"]

    def _image_starts(self, ids: list[int]) -> list[int]:
        is_image = [token == self.processor.image_token_id for token in ids]
        return [i for i, here in enumerate(is_image) if here and not (i and is_image[i - 1])]

    def _shorten_given(self, ids: list[int], supervised: list[bool], finest: int | None) -> None:
        """Takes the scales finer than `finest` out of the pictures that are not supervised, in place."""
        if not finest:
            return
        num_tokens = self._num_tokens(finest)
        for start in reversed(self._image_starts(ids)):
            if not supervised[start]:
                left_out = slice(start + num_tokens, start + self.processor.image_seq_length)
                del ids[left_out], supervised[left_out]

    def _end_at_scale(self, row: Row, ids: list[int], starts: list[int]) -> int | None:
        """Where the row ends if it is to stop after a scale of its last picture, else None."""
        finest = row.get("finest_scale")
        if finest is None or finest == 0 or not starts:
            return None
        after = [token for token in ids[starts[-1] :] if token != self.processor.image_token_id]
        if text := self.processor.tokenizer.decode(after, skip_special_tokens=True).strip():
            raise ValueError(f"finest_scale={finest} ends a row at its last picture, but {text!r} follows it")
        return starts[-1] + self._num_tokens(finest)

    def _num_tokens(self, finest: int) -> int:
        """Of a picture down to scale `finest`."""
        if self.tokens_per_scale is None or not 0 <= finest < len(self.tokens_per_scale):
            raise ValueError(f"finest scale {finest} is no scale of tokens_per_scale={self.tokens_per_scale}")
        return sum(self.tokens_per_scale[finest:])

    def _encode_texts(self, row: Row) -> tuple[list[int], list[bool]]:
        """Ids of the row's texts, and which of them are supervised."""
        boxes, sizes = row.get("boxes"), self._picture_sizes(row)
        if "messages" in row:
            ids, answers = self.processor.encode_conversation(_place_pictures(row["messages"], row), boxes, sizes)
            return ids, answers if self.assistant_only_loss else [True] * len(ids)
        if "text" in row and "completion" in row:
            raise ValueError(f"a row is a 'text' or a 'prompt' and a 'completion', but this has both: {_excerpt(row)}")
        if "text" in row:
            return self._encode_pair("", row["text"], boxes or [], sizes)
        if not ("prompt" in row and "completion" in row):
            hint = "" if row else "; a stock Trainer drops these columns without remove_unused_columns=False"
            raise ValueError(f"a row needs 'messages', 'prompt' and 'completion', or 'text'; got {sorted(row)}{hint}")

        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._encode_pair(prompt, completion, boxes or [], sizes)
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = _place_pictures([*prompt, *completion], row)
            return self.processor.encode_conversation(messages, boxes, sizes, num_given=len(prompt))
        kinds = f"a {type(prompt).__name__} and a {type(completion).__name__}"
        raise ValueError(f"prompt and completion must both be texts or both be lists of messages, got {kinds}")

    def _encode_pair(self, prompt: str, completion: str, boxes: list, sizes: list) -> tuple[list[int], list[bool]]:
        marks = MARKUP.findall(prompt) + MARKUP.findall(completion)
        locations = iter(self.processor.locate_boxes(marks, boxes, sizes))
        given = self.processor.bos_ids + self.processor.encode_marked(prompt, locations)
        written = self.processor.encode_marked(completion, locations) + [self.processor.tokenizer.eos_token_id]
        return given + written, [False] * len(given) + [True] * len(written)


@dataclass
class PumaPreferenceCollator(PumaDataCollator):
    """Batches `{"prompt", "chosen", "rejected", "images"}` for `PumaDPOTrainer`, texts or lists of messages.

    Without a prompt it is what both answers begin with, as in TRL. The pictures are those of the prompt. A call
    returns `input_ids`, `attention_mask` and `completion_mask` (2B, T), all chosen answers before all rejected ones,
    and with pictures `pixel_values` or `image_features`, in that order.
    """

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        for row in rows:
            if not {"chosen", "rejected"} <= row.keys():
                raise ValueError(f"a preference needs 'prompt', 'chosen' and 'rejected'; got {sorted(row)}")
        if not all("prompt" in row for row in rows):
            from trl.data_utils import extract_prompt  # an extra, which preferences are trained with

            rows = [row if "prompt" in row else {**row, **extract_prompt(row)} for row in rows]
        answers = [{**row, "completion": row[answer]} for answer in ("chosen", "rejected") for row in rows]
        batch = super().__call__(answers)
        if batch.pop("image_loss_mask", torch.tensor(False)).any():
            raise ValueError("preferences are over answers in text, but one of them holds a picture")
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return batch


def tidy_row(row: Row) -> Row:
    """What a row holds, its pictures in `images`."""
    # A data set of several kinds of rows has the columns of all, None where a row has nothing.
    row = {key: value for key, value in row.items() if value is not None}
    if "image" in row:
        if "images" in row or "image_features" in row:
            raise ValueError(f"a row has its pictures in one column, got 'image' among {sorted(row)}")
        row["images"] = [row.pop("image")]
    return row


def _place_pictures(messages: list[dict], row: Row) -> list[dict]:
    """As TRL has it: where all messages are plain texts, the row's pictures come before the first of the user's."""
    count = len(row.get("image_features", row.get("images", [])))
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    texts = [message["content"] for message in messages]
    if not count or first is None or any(not isinstance(text, str) or IMAGE_TOKEN in text for text in texts):
        return messages
    content = [{"type": "image"}] * count + [{"type": "text", "text": texts[first]}]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _check_pictures(row: Row) -> None:
    pictures = row.get("images", [])
    if isinstance(pictures, (str, bytes, dict)) or not hasattr(pictures, "__len__"):
        raise ValueError(f"'images' must be a list of pictures, got a {type(pictures).__name__}: {_excerpt(row)}")
    if any(picture is None for picture in pictures):
        raise ValueError(f"'images' holds None in place of a picture: {_excerpt(row)}")
    if any(isinstance(picture, dict) for picture in pictures):
        raise ValueError(
            "'images' holds a dict, which a column of datasets gives that does not decode: expected pictures, as of "
            f"cast_column('images', datasets.List(datasets.Image())): {_excerpt(row)}"
        )


def _excerpt(row: Row) -> str:
    text = {key: row[key] for key in ("messages", "prompt", "completion", "text") if key in row}
    return repr(text)[:200]
