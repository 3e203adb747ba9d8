"""Scenes and tasks of the small model on drawn pictures: what is said of a picture is what it shows."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import build_scenes  # noqa: E402
import emoji_evaluation  # noqa: E402
import emoji_pictures as pictures  # noqa: E402
import emoji_words as words  # noqa: E402
from build_dataset import FEATURES, load_emoji, to_uint8  # noqa: E402
from build_scenes import is_heldout, load_scenes  # noqa: E402
from emoji_questions import CHECKED, EMOJI_TYPES, SCENE_TYPES  # noqa: E402
from emoji_tasks import EmojiRows, EmojiSplit, TaskMix, all_texts, alone, conversation  # noqa: E402
from emoji_training import EmojiPictures  # noqa: E402

from transformers_puma.evaluation.question_table import QuestionTable  # noqa: E402

RGB = {"red": "#d02020", "green": "#20b040", "blue": "#2060e0", "yellow": "#f0d020", "purple": "#9030d0"}
SHAPES = {"ball": "ellipse", "box": "rectangle", "jar": "rounded_rectangle", "kite": "regular_polygon"}
STYLES = ("round", "thin")
MAN, WOMAN, ZWJ, RED_HAIR = "1f468", "1f469", "200d", "1f9b0"


def drawn(shape: str, colour: str, style: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if shape == "regular_polygon":
        draw.regular_polygon((32, 32, 22), 4, rotation=45, fill=colour)
    else:
        getattr(draw, shape)((12, 16, 52, 48) if style == "round" else (20, 8, 44, 56), fill=colour)
    return image


def row(name: str, style: str, shape: str, colour: str, **more) -> dict:
    return {
        "image": drawn(shape, colour, style), "style": style, "tags": [name], "name": name, "codepoints": name,
        "base": name, "group": "objects", "subgroup": "", "tone": "none", "gender": "none", **more,
    }  # fmt: skip


def person(name: str, codepoints: str, colour: str, **more) -> dict:
    more = {"base": codepoints, "group": "people-body", "codepoints": codepoints} | more
    return row(name, "round", "ellipse", colour, **more)


def things(colours: list[str], styles=STYLES) -> list[dict]:
    return [
        row(f"{shape} {i}", style, SHAPES[shape], RGB[colour])
        for i, colour in enumerate(colours)
        for shape in SHAPES
        for style in styles
    ]


PEOPLE = [
    person("man", MAN, "#e0b080", gender="male"),
    person("woman", WOMAN, "#e0b081", gender="female"),
    person("woman: red hair", f"{WOMAN}-{ZWJ}-{RED_HAIR}", "#d0a070", gender="female"),
    person("man: dark skin tone", f"{MAN}-1f3ff", "#604020", base=MAN, gender="male", tone="dark"),
    person("man: light skin tone", f"{MAN}-1f3fb", "#f0d0b0", base=MAN, gender="male", tone="light"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Names such as 'ball 3' hold a digit, which objects' names may not: letters stand for the numbers."""
    rows = things(list(RGB)) + PEOPLE
    for entry in rows:
        for number, letter in enumerate("abcde"):
            entry["name"] = entry["name"].replace(f" {number}", f" {letter}")
    split = {
        "train": rows,
        "heldout_concept": [
            row(f"{shape} unseen", style, SHAPES[shape], RGB["blue"]) for shape in SHAPES for style in STYLES
        ],
        "heldout_pair": [row("ball a", "wide", "ellipse", RGB["red"]), row("box a", "wide", "rectangle", RGB["red"])],
    }
    path = tmp_path_factory.mktemp("tasks") / "emoji"
    DatasetDict({k: Dataset.from_list(v, features=FEATURES) for k, v in split.items()}).save_to_disk(str(path))
    (path / "LICENSES.md").write_text("Drawn by this test.")
    return path


@pytest.fixture(scope="module")
def scenes(data) -> DatasetDict:
    build_scenes.main(["--data", str(data), "--out", f"{data}-scenes", "--share", "0.01"])
    return load_scenes(f"{data}-scenes")


@pytest.fixture(scope="module")
def split(data, scenes) -> EmojiSplit:
    """Features hold the row's number: emoji from 0, scenes from 1000."""
    emoji, composed = load_emoji(data)["train"], scenes["train"].remove_columns("image").to_list()
    numbers = [torch.arange(n).float()[:, None, None].expand(-1, 256, 2) for n in (len(emoji), len(composed))]
    return EmojiSplit(EmojiPictures(emoji).described(), composed, numbers[0], 1000 + numbers[1])


def rows_of(split: EmojiSplit, length: int = 64, kinds=(0.3, 0.1, 0.2, 0.1, 0.1, *(0.05,) * 4), **mix) -> EmojiRows:
    return EmojiRows(split, num_scales=5, batch_size=8, length=length, seed=0, mix=TaskMix(kinds, **mix))


def pictures_of(example: dict) -> list[tuple[str, int]]:
    numbers = [int(features[0, 0]) for features in example["image_features"]]
    return [("scenes", number - 1000) if number >= 1000 else ("emoji", number) for number in numbers]


# Pictures


@pytest.mark.parametrize("colour", RGB)
def test_named_colours_and_recolouring_agree(colour):
    picture = np.asarray(drawn("ellipse", RGB[colour], "round"))
    assert pictures.colour_of(picture) == colour
    assert pictures.recolour(picture, colour) is None
    for other in {"red", "green", "blue"} - {colour}:
        turned = pictures.recolour(picture, other)
        assert pictures.colour_of(turned) == other
        np.testing.assert_array_equal(turned[0], picture[0])  # white stays white


def test_a_colour_is_said_only_where_it_is_most_of_the_object():
    picture = np.full((64, 64, 3), 255, np.uint8)
    assert pictures.colour_of(picture) == "" and pictures.bounding_box(picture) is None
    picture[10:30, 10:50], picture[30:50, 10:50] = (220, 20, 20), (20, 60, 220)
    assert pictures.colour_of(picture) == "" and pictures.recolour(picture, "green") is None
    assert pictures.bounding_box(picture) == (10, 10, 50, 50)


def test_white_inside_an_outline_belongs_to_the_object():
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), outline="black", width=2)
    assert pictures.colour_of(np.asarray(image)) == "white"
    assert not pictures.silhouette(np.asarray(image))[0, 0] and pictures.silhouette(np.asarray(image))[32, 32]


def test_conditions_keep_what_they_say():
    picture = np.asarray(drawn("rectangle", RGB["blue"], "round"))
    edges = pictures.canny(picture)
    assert set(np.unique(edges)) == {0, 255} and (edges[20:44, 20:44] == 255).all() and (edges == 0).any()
    grey = pictures.greyscale(picture)
    assert (grey == grey[..., :1]).all() and (grey[0, 0] == 255).all()
    masked = pictures.masked(picture, 20, 24, 16)
    assert (masked[24:40, 20:36] == pictures.MASK_GREY).all()
    assert (masked != picture).any(axis=2).sum() == 16 * 16


# Scenes


def test_scenes_are_a_function_of_seed_and_data(data, scenes, tmp_path):
    """Also with more of them, which come last."""
    more = ["--centred", str(2 * build_scenes.CENTRED_SCENES)]
    build_scenes.main(["--data", str(data), "--out", str(tmp_path / "again"), "--share", "0.01", *more])
    again = load_scenes(tmp_path / "again")
    for name in scenes:
        there = again[name].select(range(len(scenes[name])))
        assert there.remove_columns("image").to_list() == scenes[name].remove_columns("image").to_list()
        np.testing.assert_array_equal(to_uint8(there), to_uint8(scenes[name]))
    assert len(again["train"]) == len(scenes["train"]) + sum(scenes["train"]["centred"])
    assert (tmp_path / "again" / "LICENSES.md").exists()


def test_boxes_hold_the_objects_and_nothing_else_is_drawn(scenes):
    for name, part in scenes.items():
        for pixels, scene in zip(to_uint8(part), part.remove_columns("image"), strict=True):
            if scene["role"] not in ("scene", "removed") and scene["origin_set"] != "scenes":
                continue
            if scene["role"] in ("canny", "masked", "grey"):
                continue
            rest = pixels.copy()
            for thing in scene["objects"]:
                x0, y0, x1, y1 = thing["box"]
                left, top, width, height = build_scenes.PLACES[thing["place"]]
                assert left <= x0 < x1 <= left + width and top <= y0 < y1 <= top + height
                assert 24 <= max(x1 - x0, y1 - y0) <= 31
                if thing["colour"]:
                    assert pictures.colour_of(pixels[y0:y1, x0:x1]) == thing["colour"]
                rest[y0:y1, x0:x1] = 255
            assert (rest == 255).all(), name


def test_a_caption_says_all_of_a_centred_scene(scenes):
    """Objects by the order in which they come, as their names don't matter here: same words, same places."""
    assert not any(scene["centred"] for scene in scenes["heldout_concept"])
    shown = {}
    for name in ("train", "heldout_pair"):
        centred = [scene for scene in scenes[name].remove_columns("image") if scene["centred"]]
        assert centred and all(scene["role"] == "scene" for scene in centred)
        for scene in centred:
            sizes = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (thing["box"] for thing in scene["objects"])]
            assert set(sizes) == {28}
            names = list(dict.fromkeys(thing["base"] for thing in scene["objects"]))
            objects = [
                thing | {"name": "abcd"[names.index(thing["base"])], "adjective": thing["adjective"] and "blue"}
                for thing in scene["objects"]
            ]
            for number in range(8):
                caption = words.scene_words(objects, random.Random(number))
                places = [(thing["name"], thing["adjective"], thing["place"]) for thing in objects]
                assert shown.setdefault(caption, places) == places
    assert len(shown) > 20


def test_training_scenes_hold_no_composition_that_is_held_out(scenes):
    def compositions(name):
        return [[thing["base"] for thing in scene["objects"]] for scene in scenes[name] if scene["role"] == "scene"]

    assert not any(map(is_heldout, compositions("train")))
    assert all(map(is_heldout, compositions("heldout_pair")))
    unseen = {base for bases in compositions("heldout_concept") for base in bases}
    assert unseen and all("unseen" in base for base in unseen)


def test_edited_scenes_differ_in_the_object_that_is_said(scenes):
    train = scenes["train"].remove_columns("image").to_list()
    roles = {scene["role"] for scene in train}
    assert roles == {"scene", "removed", "recoloured", "canny", "masked", "grey"}
    for scene in train:
        if scene["origin_set"] != "scenes" or scene["role"] not in ("removed", "recoloured"):
            continue
        before, number = train[scene["origin"]]["objects"], scene["changed"]
        if scene["role"] == "removed":
            assert scene["objects"] == before[:number] + before[number + 1 :]
        else:
            after = scene["objects"][number]
            assert after["colour"] == after["adjective"] != before[number]["colour"]
            assert [t for t in scene["objects"] if t != after] == [t for t in before if t != before[number]]


def test_too_little_to_compose_and_a_bad_share_are_errors(data, capsys):
    emoji = load_emoji(data)["heldout_pair"]
    library = build_scenes.Library(to_uint8(emoji), emoji.remove_columns("image").to_list()[:1])
    with pytest.raises(ValueError, match="no scene with heldout=.*1 pictures are too few"):
        build_scenes.draw_scene(library, not is_heldout(["ball 0", "ball 0"]), random.Random(0))
    with pytest.raises(SystemExit):
        build_scenes.main(["--share", "0"])
    assert "--share is 0.0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="build_scenes.py"):
        load_scenes("no/such/folder")


def test_scenes_and_features_of_an_earlier_version_are_errors(scenes, tmp_path):
    DatasetDict({name: part.remove_columns("centred") for name, part in scenes.items()}).save_to_disk(tmp_path / "old")
    with pytest.raises(ValueError, match="other columns in train .*build_scenes.py"):
        load_scenes(tmp_path / "old")
    composed = scenes["train"].remove_columns("image").to_list()
    with pytest.raises(ValueError, match=f"features of 3 pictures, but {len(composed)} pictures"):
        EmojiSplit([], composed, scene_features=torch.zeros(3, 256, 2))


# Rows


def test_rows_depend_on_seed_and_number_alone(split):
    first, second = rows_of(split), rows_of(split)
    for i in (63, 0, 17):
        ours, theirs = first[i], second[i]
        assert all(map(torch.equal, ours.pop("image_features"), theirs.pop("image_features")))
        assert ours == theirs


def test_rows_of_a_batch_are_of_one_kind_and_end_at_one_scale(split):
    scales = (0.2, 0.4, 0.4, 0, 0)
    rows = rows_of(split, length=480, kinds=(1,) * 9, finest_scale=scales, finest_scale_edits=(0, 0.5, 0.5, 0, 0))
    kinds = set()
    for start in range(0, 480, 8):
        batch = [rows[i] for i in range(start, start + 8)]
        form = {
            ("messages" in r, r.get("finest_scale"), r.get("prompt") == "<image>", len(r["image_features"]))
            for r in batch
        }
        assert len(form) == 1
        kinds |= form
    # Three scales of drawing, describing, asking, two scales from pictures; naming and checking look alike, finding.
    assert len(kinds) == 3 + 1 + 1 + 2 + 1 + 1


def test_edits_lead_from_the_source_to_the_target(split):
    seen = set()
    assert set(split.edits.types) == {"style", "tone", "gender", "hair", "remove", "add", "colour"}
    for type in split.edits.types:
        for i in range(10):
            edit = split.edits.draw(random.Random(i), type)
            instruction = edit.instruct(random.Random(i))
            seen.add(type)
            if type in ("style", "tone", "gender", "hair"):
                source, target = (split.texts[row] for _, row in (edit.source, edit.target))
                assert (source["style"] == target["style"]) == (type != "style")
                expected = {"style": target["style"], "tone": target["tone"], "hair": "red hair",
                            "gender": {"male": "man", "female": "woman"}.get(target["gender"])}[type]  # fmt: skip
                assert expected in instruction
            elif type != "colour" or edit.source[0] == "scenes":
                fewer, more = (split.scenes[row]["objects"] for _, row in (edit.source, edit.target))
                if type == "colour":
                    assert len(fewer) == len(more) and any(t["adjective"] in instruction for t in more)
                else:
                    assert len(more) - len(fewer) == {"add": 1, "remove": -1}[type]
    rows = rows_of(split, kinds=alone("edit"))
    for i in range(16):
        assert rows[i]["prompt"].startswith("<image>") and rows[i]["completion"] == "<image>"


def test_a_condition_leads_to_the_picture_that_it_was_made_from(split):
    rows = rows_of(split, kinds=alone("condition"))
    prompts = []
    for i in range(32):
        source, target = pictures_of(rows[i])
        assert source[0] == "scenes" and split.scenes[source[1]]["role"] in words.CONDITIONS
        assert split.origin(source[1]) == target
        prompts.append(rows[i]["prompt"])
    assert 4 < sum(":" in prompt for prompt in prompts) < 28  # with and without the task's instruction


def test_an_album_is_to_be_named(split):
    rows = rows_of(split, kinds=alone("name"))
    for i in range(8):
        pictures, turns = pictures_of(rows[i]), rows[i]["messages"]
        assert rows[i]["finest_given_scale"] == 2 and len(pictures) == 12 == len(turns) / 2
        for (which, number), question, answer in zip(pictures, turns[::2], turns[1::2], strict=True):
            assert [part["type"] for part in question["content"]] == ["image", "text"] and which == "emoji"
            assert question["content"][1]["text"] == "What is this?"
            assert answer["content"][0]["text"] == split.texts[number]["name"]


def test_all_objects_of_scenes_are_to_be_named_by_place_or_by_box(split):
    rows = rows_of(split, kinds=alone("find"))
    seen = set()
    for i in range(8):
        pictures, turns = pictures_of(rows[i]), iter(rows[i]["messages"])
        boxes = iter(rows[i].get("boxes", []))
        assert rows[i]["finest_given_scale"] == 2 and len(pictures) == 6
        for which, number in pictures:
            objects, named = split.scenes[number]["objects"], []
            for k in range(1 + len(objects)):
                question, answer = next(turns)["content"], next(turns)["content"][0]["text"]
                assert which == "scenes" and [part["type"] for part in question] == ["image", "text"][k > 0 :]
                text = question[-1]["text"]
                if k == 0:
                    assert answer in ("yes", "no") and text.startswith(("Is ", "Are "))
                    continue
                seen.add(text)
                box = next(boxes) if text == "What is in <box>?" else None
                asked_for = [
                    thing
                    for thing in objects
                    if (tuple(thing["box"]) == box if box else text.endswith(f" the {thing['place']}?"))
                ]
                assert [thing["name"] for thing in asked_for] == [answer]
                named.append(objects.index(asked_for[0]))
            assert sorted(named) == list(range(len(objects)))
        assert not list(turns) and not list(boxes)
    assert {"What is in <box>?", "What is on the left?", "What is at the top left?"} <= seen


def is_true(split: EmojiSplit, picture: tuple[str, int], question: str) -> bool:
    """Whether what a question of yes or no asks about holds, told from its words."""
    which, number = picture
    if which == "emoji":
        return question in {form.format(split.texts[number][key]) for key, form in CHECKED.items()}
    objects = split.scenes[number]["objects"]
    if "there" in question:
        return any(words.with_article(thing["name"], thing["name"]) in question for thing in objects)
    [first] = [t for t in objects if question.split(" the ", 1)[1].startswith(f"{words.noun(t)} ")]
    [second] = [t for t in objects if question.endswith(f" the {words.noun(t)}?")]
    return f" {words.relation(first['place'], second['place'])} " in question


def test_several_things_are_to_be_checked_about_each_picture(split):
    rows = rows_of(split, kinds=alone("check"))
    said, openings = Counter(), Counter()
    for i in range(64):
        pictures, turns = iter(pictures_of(rows[i])), rows[i]["messages"]
        assert rows[i]["finest_given_scale"] == 2 and len(rows[i]["image_features"]) == 12
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if question["content"][0]["type"] == "image":
                picture = next(pictures)
            text, answer = question["content"][-1]["text"], answer["content"][0]["text"]
            assert answer == ("yes" if is_true(split, picture, text) else "no")
            said[answer] += 1
            openings[picture[0], " ".join(text.split()[:2])] += 1
        assert not list(pictures)
    assert {("emoji", "Is this"), ("emoji", "Is it"), ("scenes", "Is there"), ("scenes", "Is the")} <= set(openings)
    assert 0.4 < said["yes"] / said.total() < 0.7


def test_a_patchwork_is_to_be_copied(split):
    """Its cells are of up to four pictures, whose numbers the features hold."""
    rows = rows_of(split, kinds=alone("copy"))
    sizes = set()
    for i in range(32):
        source, target = rows[i]["image_features"]
        assert torch.equal(source, target)
        finest = target[-256:, 0].view(16, 16)
        assert 1 <= len(finest.unique()) <= 4
        # The finest grid in which every cell is of one picture.
        for cells in (1, 2, 4, 8):
            grid = finest.view(cells, 16 // cells, cells, 16 // cells)
            if (grid == grid[:, :1, :, :1]).all():
                sizes.add(cells)
                break
        else:
            pytest.fail("a cell of the finest grid shows more than one picture")
        assert rows[i]["prompt"].removeprefix("<image>") in words.COPIES and rows[i]["completion"] == "<image>"
    assert sizes == {1, 2, 4, 8}


def test_answers_are_true(split):
    rng = random.Random(0)
    composed = split.compositions
    for type in SCENE_TYPES:
        for number in composed:
            scene = split.scenes[number]
            objects = scene["objects"]
            asked = split.question(("scenes", number), rng, type)
            if asked is None:
                continue
            by_box = [t for t in objects if tuple(t["box"]) == asked.box]
            if type == "grounding":
                assert asked.answer == "<box>" and words.noun(by_box[0]) in asked.question
            elif type == "region":
                assert [t["name"] for t in by_box] == [asked.answer]
            elif type == "counting" and "objects" in asked.question:
                assert asked.answer == words.NUMBERS[len(objects)]
            elif type == "counting":
                assert asked.answer == words.NUMBERS[sum(words.plural(t["name"]) in asked.question for t in objects)]
            elif type == "colour":
                assert asked.answer in {t["colour"] for t in objects if t["name"] in asked.question}
            elif type == "yes/no" and "there" in asked.question:
                assert asked.answer == ("yes" if any(t["name"] in asked.question for t in objects) else "no")
    for type in EMOJI_TYPES:
        asked = split.question(("emoji", 0), rng, type)
        if type == "colour":
            assert asked.answer == "red"
        if type == "yes/no" and "style" not in asked.question:
            assert (asked.answer == "yes") == any(split.texts[0][k] in asked.question for k in ("name", "colour"))


def test_questions_with_a_box_carry_it_and_the_picture_size(split):
    number = split.shown[0]
    asked = [split.question(("scenes", number), random.Random(0), type) for type in ("style", "grounding", "region")]
    row = conversation([asked])
    assert row["boxes"] == [asked[1].box, asked[2].box] and row["image_sizes"] == [(64, 64)]
    assert row["messages"][3]["content"][0]["text"] == "<box>"
    assert [len(message["content"]) for message in row["messages"]] == [2, 1, 1, 1, 1, 1]
    assert "boxes" not in conversation([asked[:1]])


def test_questions_about_one_picture_are_of_different_types(split):
    for picture in (("emoji", 0), ("scenes", next(n for n in split.shown if split.is_scene(("scenes", n))))):
        asked = split.questions(picture, random.Random(1), 3)
        assert len({question.type for question in asked}) == 3
        assert asked != split.questions(picture, random.Random(2), 3)


def test_a_mix_that_the_split_cannot_serve_is_an_error(split):
    bare = EmojiSplit(split.texts[:1], [], split.features[:1])
    recoloured = EmojiSplit(split.texts, [scene for scene in split.scenes if scene["origin_set"] == "emoji"])
    with pytest.raises(ValueError, match="share of 0.5 for scenes"):
        rows_of(bare, kinds=alone("draw"), scenes=0.5)
    with pytest.raises(ValueError, match="share of 1.0 for condition"):
        rows_of(bare, kinds=alone("condition"), scenes=0)
    with pytest.raises(ValueError, match="share of 1.0 for find"):
        rows_of(bare, kinds=alone("find"), scenes=0)
    with pytest.raises(ValueError, match="share of 0.5 for check"):
        rows_of(recoloured, kinds=alone("check"), scenes=0.5)
    with pytest.raises(ValueError, match="must hold a share for each of"):
        rows_of(split, kinds=(1, 0, 0, 0))


def test_the_tokenizer_sees_every_form(split):
    lines = "\n".join(all_texts(split.texts))
    for part in ("What is in ", "make the person bald", "fill in the grey square", "medium-dark", "A chat between"):
        assert part in lines
    assert "<box>" not in lines


def test_evaluation_sets_can_be_asked_by_the_question_table(data, scenes, tmp_path):
    emoji_evaluation.main(
        ["--data", str(data), "--scenes", f"{data}-scenes", "--out", str(tmp_path / "e"), "--per-type", "3"]
    )
    table = QuestionTable(tmp_path / "e", "questions")
    assert {"name", "scene: counting", "scene: position"} <= {question.category for question in table.questions}
    assert all(table.judge(question, question.answers[0])["score"] == 1 for question in table.questions)
    loaded = load_from_disk(str(tmp_path / "e"))
    assert all(len(row["box"]) == 4 and "<box>" in row["question"] + row["answer"] for row in loaded["boxes"])
    assert set(loaded["conditions"]["type"]) == set(words.CONDITIONS)
    assert {"remove", "add", "style"} <= set(loaded["edits"]["type"])
    assert set(loaded["prompts"]["type"]) == {"emoji", "scene"} and set(loaded["prompts"]["split"]) == {"heldout_pair"}
