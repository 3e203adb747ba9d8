import numpy as np
import pytest
from PIL import Image

from diffusers_puma.contact_sheet import GAP, contact_sheet


def square(colour: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def where(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """x, y, width and height of the box around all pixels of a colour."""
    rows, columns = np.nonzero((np.array(sheet) == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


RED, BLUE, LIME = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def test_cells_stand_in_rows_and_columns():
    sheet = contact_sheet([("one", [square("red"), square("blue")]), ("two", [square("lime")])], cell=40)
    red, blue, lime = (where(sheet, colour) for colour in (RED, BLUE, LIME))
    assert red[2:] == blue[2:] == lime[2:] == (40, 40)
    assert red[1] == blue[1] and blue[0] == red[0] + 40 + GAP
    assert lime[0] == red[0] and lime[1] == red[1] + 40 + GAP
    assert sheet.size == (blue[0] + 40 + GAP, lime[1] + 40 + GAP)


def test_pictures_keep_their_shape():
    sheet = contact_sheet([("", [square("red", (8, 4)), square("blue", (100, 200))])], cell=40)
    assert where(sheet, RED)[2:] == (40, 20)
    assert where(sheet, BLUE)[2:] == (20, 40)
    assert sheet.size == (2 * 40 + 3 * GAP, 40 + 2 * GAP)


def test_labels_and_titles_stay_outside_of_pictures():
    long = "a label of many words, andonethatislongerthanaline" * 3
    rows = [(long, [square("red", (40, 40))]), ("short", [square("blue", (40, 40))])]
    sheet = contact_sheet(rows, ["a title that is broken into lines"], cell=40)
    red, blue = where(sheet, RED), where(sheet, BLUE)
    # The first row is as high as its label; every picture is whole.
    assert red[2:] == blue[2:] == (40, 40)
    assert blue[1] - red[1] > 150
    ink = np.array(sheet.convert("L")) < 100
    assert ink[: red[1], red[0] :].any() and ink[:, : red[0] - GAP].any()
    assert not ink[:, red[0] - GAP : red[0]].any()
    assert red[0] <= 3 * 40 // 2 + 2 * GAP


def test_one_column_of_other_modes():
    sheet = contact_sheet([("grey", [Image.new("L", (8, 8), 128)]), ("palette", [square("red").convert("P")])])
    assert sheet.mode == "RGB" and where(sheet, (128, 128, 128))[2:] == (128, 128) == where(sheet, RED)[2:]


def test_mistakes():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([("empty", [])])
    with pytest.raises(ValueError, match="got 1 column_titles for 2 columns"):
        contact_sheet([("", [square("red"), square("blue")])], ["one"])
