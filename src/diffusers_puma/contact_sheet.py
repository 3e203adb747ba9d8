"""Many pictures as one, in labelled rows and columns. Knows PIL only."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between cells
FONT_SIZE = 14
INK, PAPER = "black", "white"


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], column_titles: Sequence[str] | None = None, cell: int = 128
) -> Image.Image:
    """A sheet of pictures, row by row, each row after its label.

    Args:
        rows: (label, pictures) each; rows may differ in length. Labels are broken into lines to fit.
        column_titles: one for each column, above it.
        cell: side in pixels of the square that a picture is fitted into, whatever its size, keeping its shape.

    Raises:
        ValueError: no pictures, or not as many titles as the longest row has pictures.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one picture")
    if column_titles is not None and len(column_titles) != columns:
        raise ValueError(f"got {len(column_titles)} column_titles for {columns} columns")

    font = ImageFont.load_default(FONT_SIZE)
    label_width = min(max(_text_size(label, font)[0] for label, _ in rows), 3 * cell // 2)
    labels = [_wrap(label, font, label_width) for label, _ in rows]
    titles = [_wrap(title, font, cell) for title in column_titles or []]
    left = label_width + 2 * GAP if label_width else GAP
    top = max((_text_size(title, font)[1] for title in titles), default=0) + GAP if titles else 0
    heights = [max(cell, _text_size(label, font)[1]) for label in labels]
    size = left + columns * (cell + GAP), top + GAP + sum(height + GAP for height in heights)

    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.multiline_text((left + column * (cell + GAP), GAP), title, INK, font)
    y = top + GAP
    for label, (_, pictures), height in zip(labels, rows, heights, strict=True):
        draw.multiline_text((GAP, y), label, INK, font)
        for column, picture in enumerate(pictures):
            fitted = _fit(picture, cell)
            x = left + column * (cell + GAP)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (height - fitted.height) // 2))
        y += height + GAP
    return sheet


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """`picture` in RGB as large as fits; a small one is enlarged without smoothing, so that its pixels can be seen."""
    factor = cell / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in lines of at most `width` pixels, broken between words, or within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """(width, height) in pixels; height is that of whole lines, so that rows of text stand alike."""
    lines = text.split("\n")
    ascent, descent = font.getmetrics()
    # Pillow's `multiline_text` puts 4 pixels between lines.
    return round(max(font.getlength(line) for line in lines) + 0.5), len(lines) * (ascent + descent + 4)
