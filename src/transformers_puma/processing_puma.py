"""Text and pictures (and boxes) to the ids and pixels that PUMA reads, and back.

What becomes a special token, and what stays the text that it is, depends on the entry:

| entry of `PumaProcessor` | markup in its texts                     | who calls it                                   |
|--------------------------|-----------------------------------------|------------------------------------------------|
| `__call__`               | `<image>`, `<box>`, every special token | users; texts of `apply_chat_template`          |
| `encode_marked`          | `<image>`, `<box>`                      | training: prompts and completions, plain texts |
| `encode_conversation`    | `<box>` if boxes are given              | training: messages; `puma serve`               |
| `prepare_question`       | `<box>` if boxes are given              | `PumaPipeline.ask`, `puma eval`, lmms-eval     |
| `prepare_generation`     | nothing                                 | `PumaPipeline`, `puma eval`                    |
| `encode_plain`           | nothing                                 | `encode_marked`, `prepare_generation`; scorers |

Boxes are written and read by `boxes_puma.py`, conversations rendered and encoded by `chat_puma.py`.
"""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import make_nested_list_of_images
from transformers.processing_utils import ProcessorMixin

from .boxes_puma import BOX_MARK, IMAGE_TOKEN, MARKUP, Box, format_box, locate_boxes, location_token, parse_boxes
from .chat_puma import CHAT_TEMPLATE, chat_marks, encode_plain, encode_rendered, render_chat, special_tokens
from .image_processing_puma import PumaImageProcessor
from .pictures import picture_size

IMAGE_START_TOKEN, IMAGE_END_TOKEN = "[IMG]", "[/IMG]"


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

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return IMAGE_START_TOKEN + IMAGE_TOKEN * self.image_seq_length + IMAGE_END_TOKEN

    def format_box(self, box: Box, size: tuple[int, int]) -> str:
        """See `boxes_puma.format_box`."""
        return format_box(box, size, self.num_location_tokens)

    def parse_boxes(self, text: str, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
        """Boxes in a text, in pixels of a picture of `size` (width, height): the centres of the quantised cells."""
        return parse_boxes(text, size, self.num_location_tokens)

    def locate_boxes(self, marks: list[str], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[str]:
        """See `boxes_puma.locate_boxes`."""
        return locate_boxes(marks, boxes, sizes, self.num_location_tokens)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token, without BOS or EOS."""
        return encode_plain(self.tokenizer, text)

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
        locations = None if boxes is None else iter(self.locate_boxes(chat_marks(messages), boxes, sizes))
        text, answers = render_chat(self.tokenizer, self.chat_template, messages, locations, add_generation_prompt)
        num_shown = sum(message["role"] == "assistant" for message in messages[:num_given])
        return encode_rendered(self.tokenizer, text, answers[num_shown:], {self.image_token_id: self.image_ids})

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

    def decode_answers(self, sequences: torch.LongTensor, prompt_length: int) -> list[str]:
        """Texts that `generate` wrote after prompts of `prompt_length`."""
        return [text.strip() for text in self.post_process_image_text_to_text(sequences[:, prompt_length:])]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """As in transformers, but locations stay, for `parse_boxes`."""
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in generated_outputs]
        is_one = bool(rows) and isinstance(rows[0], int)
        rows = [rows] if is_one else rows
        locations = {self.tokenizer.convert_tokens_to_ids(location_token(i)) for i in range(self.num_location_tokens)}
        dropped = special_tokens(self.tokenizer).keys() - locations if skip_special_tokens else ()
        texts = [self.tokenizer.decode([i for i in row if i not in dropped], **kwargs) for row in rows]
        return texts[0] if is_one else texts


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
