"""Conversations to ids, so that nothing in their texts becomes a special token: only the chat template writes those.

A template joins its own tokens and the texts to one string. `render_chat` therefore puts what would be a special token
between shields, and `encode_rendered` reads what stands there as plain text.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, repeat

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .boxes_puma import BOX_MARK, IMAGE_TOKEN

# Private-use characters around text that must stay text while a chat template is rendered.
SHIELD = "\ue000\ue001"
SHIELDED = re.compile(f"{SHIELD[0]}(.*?){SHIELD[1]}", re.DOTALL)

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

Span = tuple[int, int]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """All special tokens by their ids: also those that only the tokenizer's file marks as such, as Llama 3 has its
    ends of turns, which `all_special_tokens` leaves out."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which nothing is a special token, without BOS or EOS."""
    text.encode()  # a ValueError for what is no Unicode, of which tokenizers say only that its type is wrong
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def chat_marks(messages: list[dict]) -> list[str]:
    """`<image>` for each picture of a conversation and `<box>` for each mark in its texts, in their order."""
    marks = []
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            marks += re.findall(BOX_MARK, part["text"]) if part["type"] == "text" else [IMAGE_TOKEN]
    return marks


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict],
    locations: Iterator[str] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """A conversation as one shielded string, and the span of characters of each assistant message.

    Args:
        locations: what the next `<box>` of the texts becomes; None: it is no mark.

    Raises:
        ValueError: a chat template that does not mark answers with `{% generation %}`.
    """
    tokens = [*special_tokens(tokenizer).values(), SHIELD[0]]
    chat = [{**message, "content": _shield(message["content"], tokens, locations)} for message in messages]
    [text], [spans] = render_jinja_template(
        [chat],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != num_answers:
        raise ValueError(
            f"the chat template marks {len(spans)} answers with {{% generation %}}, but the conversation holds "
            f"{num_answers} assistant messages"
        )
    return text, spans


def _shield(content: str | list[dict], tokens: list[str], locations: Iterator[str] | None) -> str | list[dict]:
    """A message's content with shields around the `tokens` in its texts and the next of `locations`, if any, in place
    of each `<box>`."""
    if not isinstance(content, str):
        parts = []
        for is_text, group in groupby(content, lambda part: part["type"] == "text"):
            group = list(group)
            if is_text:  # neighbours as one: together they could become what neither is
                text = "".join(part["text"] for part in group)
                group = [{"type": "text", "text": _shield(text, tokens, locations)}]
            parts += group
        return parts
    content.encode()  # raises what `encode_plain` does
    if found := "|".join(re.escape(token) for token in tokens if token in content):
        content = re.sub(found, lambda match: f"{SHIELD[0]}{match[0]}{SHIELD[1]}", content)
    return content if locations is None else re.sub(BOX_MARK, lambda _: next(locations), content)


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], expansions: dict[int, list[int]]
) -> tuple[list[int], list[bool]]:
    """Ids of a string from `render_chat`, and for each whether it begins in one of the `spans`.

    Args:
        expansions: ids that stand for several: the image placeholder for a whole image.
    """
    ids, inside, position = [], [], 0
    for i, piece in enumerate(SHIELDED.split(text)):
        if i % 2:
            tokens, starts = encode_plain(tokenizer, piece), repeat(0)
        else:
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            tokens, starts = encoded["input_ids"], (start for start, _ in encoded["offset_mapping"])
        for token, start in zip(tokens, starts, strict=False):
            expanded = expansions.get(token, [token])
            ids += expanded
            inside += [any(first <= position + start < end for first, end in spans)] * len(expanded)
        position += len(piece) + (len(SHIELD) if i % 2 else 0)
    return ids, inside
