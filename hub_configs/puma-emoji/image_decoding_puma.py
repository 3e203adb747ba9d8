"""Three ways to write an image, as pure functions of the scales; knows no model.

|                  | fed at a position of a written image          | its feature is read from | passes   |
|------------------|-----------------------------------------------|--------------------------|----------|
| `autoregressive` | the feature itself (report section 3.3)       | the state before it      | S        |
| `next_scale`     | the feature of its parent, and a query        | its own state            | N + 1    |
| `prefilled`      | a query                                       | its own state            | 1        |

The parent of a position is the position of the next coarser scale whose cell covers it. Queries are learned, one for
each position. Where there are queries, an image that is given is fed as its features plus the same queries: so a state
that writes a position finds that of the image it edits. Attention is causal; with `next_scale` the tokens of one scale
of an image also see each other.

Legend: S positions of an image, coarsest scale first, N the coarsest scale, k_i tokens of scale i.
"""

from collections.abc import Sequence

import torch

IMAGE_DECODINGS = ("autoregressive", "next_scale", "prefilled")


def parent_of_position(tokens_per_scale: Sequence[int]) -> torch.Tensor:
    """(S,) long: where the parent of each position stands; -1 at the coarsest scale."""
    parents = [torch.full((tokens_per_scale[-1],), -1)]
    start = 0
    for count in reversed(tokens_per_scale[:-1]):
        side = round(count**0.5)
        row, column = torch.arange(side).repeat_interleave(side) // 2, torch.arange(side).repeat(side) // 2
        parents.append(start + row * (side // 2) + column)
        start += count // 4
    return torch.cat(parents)


def decoding_passes(image_decoding: str, tokens_per_scale: Sequence[int], scale: int) -> list[tuple[slice, slice]]:
    """What each pass of the language model is fed and writes, as positions of the image, down to `scale`.

    The first pass also reads the prompt.
    """
    counts = list(reversed(tokens_per_scale[scale:]))
    total = sum(counts)
    if image_decoding == "prefilled":
        return [(slice(0, total), slice(0, total))]
    if image_decoding == "next_scale":
        stops = torch.tensor(counts).cumsum(0).tolist()
        return [(slice(stop - count, stop),) * 2 for count, stop in zip(counts, stops, strict=True)]
    return [(slice(max(position - 1, 0), position), slice(position, position + 1)) for position in range(total)]
