"""Text and pictures (and boxes) to the ids and pixels that PUMA reads, and back.

`<image>` and `<box>` are markup in the texts that users write for `PumaProcessor.__call__`, and in the prompts and
completions of training rows. Prompts and questions that come from elsewhere go through `prepare_generation` and
`prepare_question`, where nothing is markup but the `<box>` of a question that comes with boxes; conversations of
training rows are read in the same way (`encode_conversation`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, repeat

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import make_nested_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_puma import PumaImageProcessor
from .pictures import picture_size

IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN = "[IMG]", "[/IMG]", "<image>"
BOX_MARK = "<box>"
# Private-use characters around text that must stay text while a chat template is rendered.
SHIELD = "\ue000\ue001"
SHIELDED = re.compile(f"{SHIELD[0]}(.*?){SHIELD[1]}", re.DOTALL)
MARKUP = re.compile(f"({IMAGE_TOKEN}|{BOX_MARK})")

# The report's system message, in Vicuna's format; `{% generation %}` marks what an assistant message supervises.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{{- raise_exception('unknown type of content ' + part['type'] + ': expected text or image') -}}"
    "{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- render(messages[0]['content']) -}}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user\\'s questions.' -}}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{- ' USER: ' + render(message['content']) -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- raise_exception('unknown role ' + message['role'] + "
    "': expected system (first), user or assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)

Box = Sequence[float]


def location_token(index: int) -> str:
    return f"<loc_{index}>"


def add_puma_tokens(tokenizer: PreTrainedTokenizerBase, num_location_tokens: int = 224) -> int:
    """Adds `[IMG]`, `[/IMG]`, the image placeholder and the location tokens to a language model's tokenizer, in place.

    Left padding, and end-of-sequence as padding where the tokenizer has none, as generation needs them.

    Returns:
        The number of tokens that were new (227 for 224 location tokens).
    """
    tokens = [IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN, *map(location_token, range(num_location_tokens))]
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what `save_pretrained` writes
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_vocab()
    # Those that the tokenizer has already (ends of turns, say) stay special.
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    return sum(token not in known for token in tokens)


class PumaProcessor(ProcessorMixin):
    """Image processor and tokenizer of PUMA.

    Args:
        image_processor: resizes and normalises pictures for the encoder.
        tokenizer: the language model's, after `add_puma_tokens`.
        image_seq_length: placeholders of one image (341).
        num_location_tokens: location tokens, the resolution of a box coordinate.
    """

    def __init__(
        self,
        image_processor: PumaImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int = 341,
        num_location_tokens: int = 224,
        chat_template: str | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.num_location_tokens = num_location_tokens
        self.image_token = IMAGE_TOKEN
        vocabulary = tokenizer.get_vocab()
        last_location = map(location_token, range(num_location_tokens)[-1:])
        for token in (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN, *last_location):
            if token not in vocabulary:
                raise ValueError(f"the tokenizer has no token {token!r}: prepare it with add_puma_tokens")
        self.image_start_token_id = vocabulary[IMAGE_START_TOKEN]
        self.image_end_token_id = vocabulary[IMAGE_END_TOKEN]
        self.image_token_id = vocabulary[IMAGE_TOKEN]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        generation_mode: str = "text",
        boxes: list | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Each `<image>` in a text takes the next image and becomes `[IMG]`, placeholders and `[/IMG]`.

        Args:
            images: a picture (or its path or URL), a list of them, or a list for each text.
            text: one text or a batch.
            generation_mode: `"image"` ends each text with `[IMG]`, so that the model draws next.
            boxes: for each text (for one text: directly) its boxes, (x_min, y_min, x_max, y_max) in pixels of the
                original picture. Each `<box>` takes the next one; it belongs to the nearest image before it, else to
                the text's first.
            kwargs: of the tokenizer and the image processor, as in transformers.

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (n, 3, height, width).

        Raises:
            ValueError: images or boxes that do not match the marks in the text, with both numbers.
        """
        if generation_mode not in ("text", "image"):
            raise ValueError(f"generation_mode={generation_mode!r} must be 'text' or 'image'")
        if images is not None:
            images = self.image_processor.fetch_images(images)
        if text is not None:
            is_batch = not isinstance(text, str)
            texts = list(text) if is_batch else [text]
            if boxes is not None:
                self._check_image_count(texts, images)
                texts = self._write_boxes(texts, boxes if is_batch else [boxes], images)
            else:
                self.locate_boxes(MARKUP.findall(" ".join(texts)), [], [])  # an error if there are marks
            # A rendered chat begins with BOS already; as in `apply_chat_template` of transformers with `tokenize`.
            if self.tokenizer.bos_token and all(sample.startswith(self.tokenizer.bos_token) for sample in texts):
                kwargs.setdefault("add_special_tokens", False)
            text = [sample + IMAGE_START_TOKEN for sample in texts] if generation_mode == "image" else texts
            if images is not None and not any(_nested_images(images)):
                images = None  # a list without pictures, which has no pixels
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text is not None:
            self._check_image_count([text] if isinstance(text, str) else text, images)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_image_count(self, texts: list[str], images):
        marks = [sample.count(IMAGE_TOKEN) for sample in texts]
        given = [] if images is None else _nested_images(images)
        # A list for each text is matched text by text, a flat list over the whole batch.
        is_nested = isinstance(images, (list, tuple)) and len(images) > 0 and isinstance(images[0], (list, tuple))
        per_text = is_nested and len(given) == len(texts)
        counts = [len(group) for group in given]
        if (marks != counts) if per_text else (sum(marks) != sum(counts)):
            found, passed = (marks, counts) if per_text else (sum(marks), sum(counts))
            raise ValueError(f"the text holds {found} {IMAGE_TOKEN} but {passed} images were given")

    def _write_boxes(self, texts: list[str], boxes: list, images) -> list[str]:
        if len(boxes) != len(texts):
            raise ValueError(f"boxes for {len(boxes)} texts were given, but there are {len(texts)} texts")
        groups = [] if images is None else _nested_images(images)
        sizes = iter([picture_size(image) for group in groups for image in group])
        written = []
        for sample, sample_boxes in zip(texts, boxes, strict=True):
            marks = MARKUP.findall(sample)
            sample_sizes = [next(sizes) for _ in range(marks.count(IMAGE_TOKEN))]
            own_boxes = [] if sample_boxes is None else sample_boxes
            locations = iter(self.locate_boxes(marks, own_boxes, sample_sizes))
            pieces = [next(locations) if piece == BOX_MARK else piece for piece in MARKUP.split(sample)]
            written.append("".join(pieces))
        return written

    def locate_boxes(self, marks: list[str], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[str]:
        """Location tokens for each `<box>` of a text.

        A box belongs to the nearest image before it, else to the text's first.

        Args:
            marks: `<image>` and `<box>`, in the order in which they stand in the text.
            boxes: (x_min, y_min, x_max, y_max) in pixels, one for each `<box>`.
            sizes: (width, height) of the picture, one for each `<image>`.

        Raises:
            ValueError: other numbers of boxes or sizes than of marks; boxes without an image.
        """
        if marks.count(BOX_MARK) != len(boxes):
            raise ValueError(f"the text holds {marks.count(BOX_MARK)} {BOX_MARK} but {len(boxes)} boxes were given")
        if not len(boxes):
            return []
        if IMAGE_TOKEN not in marks:
            raise ValueError(f"the text has {len(boxes)} boxes but no {IMAGE_TOKEN} that they belong to")
        if marks.count(IMAGE_TOKEN) != len(sizes):
            raise ValueError(
                f"the text holds {marks.count(IMAGE_TOKEN)} {IMAGE_TOKEN} but {len(sizes)} picture sizes were given"
            )
        images_before = [marks[: i + 1].count(IMAGE_TOKEN) for i, mark in enumerate(marks) if mark == BOX_MARK]
        return [
            self.format_box(box, sizes[max(count - 1, 0)]) for box, count in zip(boxes, images_before, strict=True)
        ]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return IMAGE_START_TOKEN + IMAGE_TOKEN * self.image_seq_length + IMAGE_END_TOKEN

    def format_box(self, box: Box, size: tuple[int, int]) -> str:
        """Four location tokens for (x_min, y_min, x_max, y_max) in pixels of a picture of `size` (width, height).

        Raises:
            ValueError: a box without area, or wholly outside the picture.
        """
        width, height = size
        if len(box) != 4:
            raise ValueError(f"box {tuple(box)} must be four numbers, (x_min, y_min, x_max, y_max) in pixels")
        x_min, y_min, x_max, y_max = box
        if not (max(x_min, 0) < min(x_max, width) and max(y_min, 0) < min(y_max, height)):  # so of NaN too
            raise ValueError(
                f"box {tuple(box)} has no area within a picture of {width} x {height} (expected xyxy pixels)"
            )
        last = self.num_location_tokens - 1
        fractions = (x_min / width, y_min / height, x_max / width, y_max / height)
        return "".join(
            location_token(min(max(int(fraction * self.num_location_tokens // 1), 0), last)) for fraction in fractions
        )

    def parse_boxes(self, text: str, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
        """Boxes in a text, in pixels of a picture of `size` (width, height): the centres of the quantised cells."""
        width, height = size
        four = re.compile(r"\s*".join([r"<loc_(\d+)>"] * 4))
        cells = [[(int(index) + 0.5) / self.num_location_tokens for index in match] for match in four.findall(text)]
        return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in cells]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token, without BOS or EOS."""
        text.encode()  # a ValueError for what is no Unicode, of which tokenizers say only that its type is wrong
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_marked(self, text: str, locations: Iterable[str] = ()) -> list[int]:
        """As `encode_plain`, but `<image>` is a whole image (`[IMG]`, placeholders, `[/IMG]`) and each `<box>` the
        next of `locations`, see `locate_boxes`."""
        locations, ids = iter(locations), []
        for piece in MARKUP.split(text):
            if piece == IMAGE_TOKEN:
                ids += self.image_ids
            elif piece == BOX_MARK:
                ids += self.tokenizer.encode(next(locations), add_special_tokens=False)
            elif piece:
                ids += self.encode_plain(piece)
        return ids

    @property
    def image_ids(self) -> list[int]:
        """Ids of one image: `[IMG]`, placeholders, `[/IMG]`."""
        return [self.image_start_token_id, *[self.image_token_id] * self.image_seq_length, self.image_end_token_id]

    @property
    def bos_ids(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def prepare_generation(self, prompts: list[str], images: list[list[Image.Image]] | None = None) -> BatchFeature:
        """Inputs of `generate_image_features`: BOS, the prompt's images, the prompt as plain text, `[IMG]`;
        left-padded.

        Args:
            prompts: plain texts; nothing in them becomes a special token.
            images: for each prompt the pictures that it is about.

        Raises:
            ValueError: not a list of prompts, or another number of lists of images.
        """
        images = images or [[] for _ in prompts]
        _check_batch(prompts, images, "prompts")
        rows = [
            self.bos_ids + self.image_ids * len(group) + self.encode_plain(prompt) + [self.image_start_token_id]
            for prompt, group in zip(prompts, images, strict=True)
        ]
        return self._pad_left(rows, images)

    def _pad_left(self, rows: list[list[int]], images: list[list[Image.Image]]) -> BatchFeature:
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        flat = [image for group in images for image in group]
        if flat:
            inputs["pixel_values"] = self.image_processor(flat, return_tensors="pt")["pixel_values"]
        return BatchFeature(inputs)

    def prepare_question(
        self,
        questions: list[str],
        images: list[list[Image.Image]],
        boxes: list[list[Box] | None] | None = None,
    ) -> BatchFeature:
        """Inputs of `generate` for plain-text questions, each about its pictures, in the chat format; left-padded.

        Args:
            boxes: for each question the boxes that its `<box>` marks stand for, in pixels of its last picture; a
                question without boxes (None) has no marks.

        Raises:
            ValueError: not a list of questions, or another number of lists of images or of boxes.
        """
        boxes = [None for _ in questions] if boxes is None else boxes
        _check_batch(questions, images, "questions")
        _check_batch(questions, boxes, "questions", "boxes")
        rows = []
        for question, group, question_boxes in zip(questions, images, boxes, strict=True):
            content = [*({"type": "image"} for _ in group), {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            sizes = [picture_size(image) for image in group]
            rows.append(self.encode_conversation(messages, question_boxes, sizes, add_generation_prompt=True)[0])
        return self._pad_left(rows, images)

    def encode_conversation(
        self,
        messages: list[dict],
        boxes: Sequence[Box] | None = None,
        sizes: Sequence[tuple[int, int]] = (),
        num_given: int = 0,
        add_generation_prompt: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation in the chat format, and for each whether it is part of an answer.

        Nothing in the texts becomes a special token.

        Args:
            messages: as `apply_chat_template` takes them; pictures are `{"type": "image"}` parts.
            boxes: what the `<box>` marks in the texts stand for; None: there are no marks. See `locate_boxes`.
            sizes: (width, height) of the pictures.
            num_given: so many messages at the start are given, whoever says them: they hold no answer.

        Raises:
            ValueError: boxes that do not match the marks; a chat template that does not mark answers with
                `{% generation %}`.
        """
        locations = None if boxes is None else iter(self.locate_boxes(_marks(messages), boxes, sizes))
        chat = [{**message, "content": self._shield_content(message["content"], locations)} for message in messages]
        [text], [spans] = render_jinja_template(
            [chat],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        roles = [message["role"] for message in messages]
        if len(spans) != roles.count("assistant"):
            raise ValueError(
                f"the chat template marks {len(spans)} answers with {{% generation %}}, but the conversation holds "
                f"{roles.count('assistant')} assistant messages"
            )
        return self._encode_shielded(text, spans[roles[:num_given].count("assistant") :])

    def _shield_content(self, content: str | list[dict], locations: Iterator[str] | None) -> str | list[dict]:
        """Texts of a message with `_shield`, and the next of `locations`, if any, in place of each `<box>`."""
        if not isinstance(content, str):
            parts = []
            for is_text, group in groupby(content, lambda part: part["type"] == "text"):
                group = list(group)
                if is_text:  # neighbours as one: together they could become what neither is
                    text = self._shield_content("".join(part["text"] for part in group), locations)
                    group = [{"type": "text", "text": text}]
                parts += group
            return parts
        shielded = self._shield(content)
        return shielded if locations is None else re.sub(BOX_MARK, lambda _: next(locations), shielded)

    def _shield(self, text: str) -> str:
        """Wraps what would become a special token, for `_encode_shielded`."""
        text.encode()  # raises what `encode_plain` does
        tokens = [*self._special_tokens().values(), SHIELD[0]]
        special = "|".join(re.escape(token) for token in tokens if token in text)
        return re.sub(special, lambda match: f"{SHIELD[0]}{match[0]}{SHIELD[1]}", text) if special else text

    def _encode_shielded(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids of a rendered chat in which shielded pieces are plain text and `<image>` is a whole image; for each
        whether it begins in one of the `spans` of characters."""
        ids, inside, position = [], [], 0
        for i, piece in enumerate(SHIELDED.split(text)):
            if i % 2:
                tokens, starts = self.encode_plain(piece), repeat(0)
            else:
                encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
                tokens, starts = encoded["input_ids"], (start for start, _ in encoded["offset_mapping"])
            for token, start in zip(tokens, starts, strict=False):
                expanded = self.image_ids if token == self.image_token_id else [token]
                ids += expanded
                inside += [any(first <= position + start < end for first, end in spans)] * len(expanded)
            position += len(piece) + (len(SHIELD) if i % 2 else 0)
        return ids, inside

    def _special_tokens(self) -> dict[int, str]:
        """All special tokens by their ids: also those that only the tokenizer's file marks as such, as Llama 3 has its
        ends of turns, which `all_special_tokens` leaves out."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def decode_answers(self, sequences: torch.LongTensor, prompt_length: int) -> list[str]:
        """Texts that `generate` wrote after prompts of `prompt_length`."""
        return [text.strip() for text in self.post_process_image_text_to_text(sequences[:, prompt_length:])]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """As in transformers, but locations stay, for `parse_boxes`."""
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in generated_outputs]
        is_one = bool(rows) and isinstance(rows[0], int)
        rows = [rows] if is_one else rows
        locations = {self.tokenizer.convert_tokens_to_ids(location_token(i)) for i in range(self.num_location_tokens)}
        dropped = self._special_tokens().keys() - locations if skip_special_tokens else ()
        texts = [self.tokenizer.decode([i for i in row if i not in dropped], **kwargs) for row in rows]
        return texts[0] if is_one else texts


def _marks(messages: list[dict]) -> list[str]:
    """`<image>` and `<box>` marks of a conversation, in their order."""
    marks = []
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            marks += re.findall(BOX_MARK, part["text"]) if part["type"] == "text" else [IMAGE_TOKEN]
    return marks


def _check_batch(texts: list[str], others: Sequence, name: str, other_name: str = "images"):
    if isinstance(texts, str):
        raise ValueError(f"{name} must be a list of strings, got the string {texts!r}")
    if len(texts) != len(others):
        raise ValueError(f"got {len(texts)} {name} but {len(others)} lists of {other_name}: expected one for each")
    if other_name == "images" and not all(isinstance(group, (list, tuple)) for group in others):
        raise ValueError(f"images must hold a list of pictures for each of the {name}, such as [[picture]]")


def _nested_images(images) -> list[list]:
    """Pictures per text; a flat list counts as one picture for each text."""
    if not isinstance(images, (list, tuple)):
        return make_nested_list_of_images(images)
    return [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]
