import pytest

from transformers_puma.boxes_puma import format_box, locate_boxes, parse_boxes

SIZE = (40, 30)


def test_a_coordinate_is_rounded_down():
    """40 x 30 pixels: 17.36, 58.99, 100.24 and 166.51 of 224 cells."""
    written = format_box((3.1, 7.9, 17.9, 22.3), SIZE, 224)
    assert written == "<loc_17><loc_58><loc_100><loc_166>"
    found = parse_boxes(f"at {written}.", SIZE, 224)
    assert found == [pytest.approx((17.5 / 224 * 40, 58.5 / 224 * 30, 100.5 / 224 * 40, 166.5 / 224 * 30))]


def test_what_is_no_location_token_of_the_model_is_no_box():
    assert parse_boxes("<loc_0><loc_1><loc_224><loc_5> <loc_0><loc_1><loc_2>", SIZE, 224) == []


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 0, 5, 9), (50, 0, 60, 9), (0, 0, float("nan"), 9)])
def test_a_box_without_area_in_the_picture(box):
    with pytest.raises(ValueError, match="no area"):
        format_box(box, SIZE, 224)
    with pytest.raises(ValueError, match="must be four numbers"):
        format_box(box[:3], SIZE, 224)


def test_a_box_before_all_images_belongs_to_the_first():
    boxes, sizes = [(0, 0, 5, 5)] * 2, [(10, 10), (100, 100)]
    written = locate_boxes(["<box>", "<image>", "<image>", "<box>"], boxes, sizes, 224)
    assert written == ["<loc_0><loc_0><loc_112><loc_112>", "<loc_0><loc_0><loc_11><loc_11>"]


@pytest.mark.parametrize(
    ("marks", "sizes", "message"),
    [
        (["<image>"], [SIZE], "0 <box> but 1 boxes"),
        (["<box>"], [], "1 boxes but no <image>"),
        (["<image>", "<box>"], [SIZE, SIZE], "1 <image> but 2 picture sizes"),
    ],
)
def test_marks_without_their_match(marks, sizes, message):
    with pytest.raises(ValueError, match=message):
        locate_boxes(marks, [(0, 0, 5, 5)], sizes, 224)
