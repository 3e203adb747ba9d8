"""Rows of text and pictures to a batch, with what is supervised: what the model is to produce, and nothing else."""

from dataclasses import dataclass
from typing import Any

import torch

from ..processing_puma import BOX_MARK, IMAGE_TOKEN, PumaProcessor

Row = dict[str, Any]


@dataclass
class PumaDataCollator:
    """Batches rows of these forms, each with its pictures in `images`, in the order of their marks in the text:

    - `{"prompt", "completion"}`: texts in which `<image>` stands for a picture; the completion is supervised;
    - `{"messages"}`: a conversation with `{"type": "image"}` parts; what the assistant says is supervised;
    - `{"text"}`: all of it is supervised.

    `image_features`, for each picture (S, C) encoder features coarsest first, may stand in place of `images`. A row
    that finishes with a picture ends after its scale `finest_scale`, if given: attention is causal, so the coarser
    scales train as in the whole row. A column that is None counts as absent.

    Args:
        processor: the model's.
        tokens_per_scale: the model's, `config.tokens_per_scale`; only rows with `finest_scale` need it.
        max_length: longer rows are cut; None keeps them whole.

    A call returns `input_ids`, `attention_mask` and `labels` (B, T), padded on the right; with pictures also
    `image_loss_mask` (n,) and either `pixel_values` (n, 3, height, width) or `image_features` (n, S, C).
    """

    processor: PumaProcessor
    tokens_per_scale: list[int] | None = None
    max_length: int | None = None

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        # A data set of several kinds of rows has the columns of all, None where a row has nothing.
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        encoded = [self._encode(row) for row in rows]
        padded = self.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _, _ in encoded]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(padded["input_ids"], -100)
        for i, (ids, supervised, _) in enumerate(encoded):
            is_label = torch.tensor(supervised) & (torch.tensor(ids) != self.processor.image_token_id)
            labels[i, : len(ids)] = torch.where(is_label, padded["input_ids"][i, : len(ids)], -100)

        batch = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "labels": labels}
        targets = [target for _, _, row_targets in encoded for target in row_targets]
        if targets:
            batch["image_loss_mask"] = torch.tensor(targets)
            batch |= self._images(rows, [len(row_targets) for _, _, row_targets in encoded])
        return batch

    def _images(self, rows: list[Row], counts: list[int]) -> dict[str, torch.Tensor]:
        """The pictures of the batch; `counts` says how many of each row are left after cutting."""
        if any("image_features" in row for row in rows):
            features = [
                f for row, count in zip(rows, counts, strict=True) for f in row.get("image_features", [])[:count]
            ]
            return {"image_features": torch.stack([torch.as_tensor(feature) for feature in features])}
        images = [image for row, count in zip(rows, counts, strict=True) for image in row.get("images", [])[:count]]
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}

    def _encode(self, row: Row) -> tuple[list[int], list[bool], list[bool]]:
        """Ids, which of them are supervised, and for each picture whether it is a target."""
        if "messages" in row:
            ids, supervised = self._encode_messages(row["messages"])
        elif "prompt" in row and "completion" in row:
            ids, supervised = self._encode_pair(row["prompt"], row["completion"])
        elif "text" in row:
            ids, supervised = self._encode_pair("", row["text"])
        else:
            raise ValueError(f"a row needs 'messages', 'prompt' and 'completion', or 'text'; got {sorted(row)}")

        starts = [
            i for i, (token, before) in enumerate(zip(ids, [None, *ids], strict=False)) if self._starts(token, before)
        ]
        given = len(row.get("image_features", row.get("images", [])))
        if given != len(starts):
            raise ValueError(f"the row's text holds {len(starts)} images but {given} were given: {_excerpt(row)}")

        length = min(self.max_length or len(ids), self._end_at_scale(row, starts) or len(ids))
        targets = [supervised[start] for start in starts if start < length]
        return ids[:length], supervised[:length], targets

    def _starts(self, token: int, before: int | None) -> bool:
        return token == self.processor.image_token_id and before != token

    def _end_at_scale(self, row: Row, starts: list[int]) -> int | None:
        """Where the row ends if it is to stop after a scale of its last picture, else None."""
        finest = row.get("finest_scale")
        if finest is None or finest == 0 or not starts:
            return None
        if self.tokens_per_scale is None or not 0 <= finest < len(self.tokens_per_scale):
            raise ValueError(f"finest_scale={finest} is no scale of tokens_per_scale={self.tokens_per_scale}")
        return starts[-1] + sum(self.tokens_per_scale[finest:])

    def _encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        for text in (prompt, completion):
            if not isinstance(text, str):
                raise ValueError(f"prompt and completion must be texts, got a {type(text).__name__}: use 'messages'")
            if BOX_MARK in text:
                raise ValueError(f"{BOX_MARK} is not supported in training rows: {text!r}")
        given = self.processor.bos_ids + self.processor.encode_marked(prompt)
        written = self.processor.encode_marked(completion) + [self.processor.tokenizer.eos_token_id]
        return given + written, [False] * len(given) + [True] * len(written)

    def _encode_messages(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        chat = self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template.replace(
                f"'{IMAGE_TOKEN}'", f"'{self.processor.replace_image_token({}, 0)}'"
            ),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(chat["input_ids"]), [bool(flag) for flag in chat["assistant_masks"]]


def _excerpt(row: Row) -> str:
    text = {key: row[key] for key in ("messages", "prompt", "completion", "text") if key in row}
    return repr(text)[:200]
