import numpy as np
import pytest
import torch
from transformers.utils import logging
from trl.data_utils import prepare_multimodal_messages

from transformers_puma import flatten_scales
from transformers_puma.training import PumaDataCollator, PumaPreferenceCollator

from ..conftest import IMAGE_LENGTH, make_picture


@pytest.fixture(scope="module")
def collator(processor, model):
    return PumaDataCollator(processor, model.config.tokens_per_scale)


def supervised_text(processor, labels):
    return processor.tokenizer.decode(labels[labels != -100])


ROWS = [
    ({"prompt": "a cat", "completion": "<image>", "images": [0]}, "[IMG][/IMG]</s>", [True]),
    ({"prompt": "<image>red", "completion": "<image>", "images": [0, 1]}, "[IMG][/IMG]</s>", [False, True]),
    ({"prompt": "<image>", "completion": "a cat", "images": [0]}, "a cat</s>", [False]),
    ({"text": "all of it"}, "all of it</s>", []),
]


@pytest.mark.parametrize(("row", "text", "targets"), ROWS)
def test_what_the_model_produces_is_supervised(collator, processor, row, text, targets):
    row = {**row, "images": [make_picture(i) for i in row.get("images", [])]}
    batch = collator([row])
    assert supervised_text(processor, batch["labels"][0]) == text
    assert batch.get("image_loss_mask", torch.tensor([])).tolist() == targets
    assert batch["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    if targets:
        assert batch["pixel_values"].shape == (len(targets), 3, 16, 16)


def test_rows_have_the_form_that_generation_prompts_have(collator, processor, picture):
    row = {"prompt": "<image>make it red", "completion": "<image>", "images": [picture, picture]}
    ids = collator([row])["input_ids"][0]
    prompt = processor.prepare_generation(["make it red"], [[picture]])["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)


def test_only_what_the_assistant_says_in_a_conversation(collator, processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": "draw it"},
        {"role": "assistant", "content": [{"type": "text", "text": "here: "}, {"type": "image"}]},
    ]
    batch = collator([{"messages": messages, "images": [picture, make_picture(1)]}])
    assert supervised_text(processor, batch["labels"][0]) == " a cat</s> here: [IMG][/IMG]</s>"
    assert batch["image_loss_mask"].tolist() == [False, True]
    chat = processor.prepare_question(["what?"], [[picture]])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(chat)], chat)


def test_rows_of_all_kinds_share_a_batch(collator, processor):
    rows = [{**row, "images": [make_picture(i) for i in row.get("images", [])]} for row, _, _ in ROWS]
    batch = collator(rows)
    assert batch["image_loss_mask"].tolist() == [True, False, True, False]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    for i, row in enumerate(rows):
        alone = collator([row])
        assert torch.equal(batch["labels"][i, : alone["labels"].shape[1]], alone["labels"][0])


def test_cached_features_in_place_of_pictures(collator, model, picture):
    pixels = collator([{"text": "<image>", "images": [picture]}])["pixel_values"]
    features = flatten_scales(model.encode_image(pixels))[0]
    batch = collator([{"text": "<image>", "image_features": [features]}])
    assert torch.equal(batch["image_features"][0], features) and "pixel_values" not in batch


@pytest.mark.parametrize(("scale", "tokens"), [(2, 1), (1, 5), (0, IMAGE_LENGTH)])
def test_a_row_may_end_after_a_scale(collator, processor, picture, scale, tokens):
    row = {"prompt": "<image>red", "completion": "<image>", "images": [picture, picture], "finest_scale": scale}
    ids = collator([row])["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == IMAGE_LENGTH + tokens
    assert (ids[-1] == processor.tokenizer.eos_token_id) == (scale == 0)


def test_text_after_a_picture_is_not_cut_off_with_its_scales(collator, picture):
    row = {"prompt": "<image>", "completion": "a cat", "images": [picture], "finest_scale": 1}
    with pytest.raises(ValueError, match="finest_scale=1 ends a row at its last picture, but 'a cat' follows it"):
        collator([row])


@pytest.mark.parametrize(("scale", "tokens"), [(2, 1), (1, 5), (0, IMAGE_LENGTH)])
def test_given_pictures_may_end_after_a_scale(collator, processor, model, scale, tokens):
    pictures = [make_picture(i) for i in range(3)]
    row = {"prompt": "a<image>b<image>c", "completion": "d<image>", "images": pictures, "finest_given_scale": scale}
    batch, whole = collator([row]), collator([{**row, "finest_given_scale": None}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids.count(processor.image_token_id) == 2 * tokens + IMAGE_LENGTH
    image = processor.image_token_id
    assert [i for i in ids if i != image] == [i for i in whole["input_ids"][0].tolist() if i != image]
    assert [i for i in labels if i != -100] == [i for i in whole["labels"][0].tolist() if i != -100]
    # The coarse scales are read as such: at the answer the model sees as much as if the others had not been there.
    assert batch["image_loss_mask"].tolist() == [False, False, True]
    with torch.no_grad():
        first, changed = model(**batch), {**batch, "pixel_values": batch["pixel_values"].flip(0)}
        assert not torch.allclose(first.logits[:, -2], model(**changed).logits[:, -2])
        states = model.model(**{k: v for k, v in batch.items() if k != "labels"}).image_positions
    assert states.offset[0][states.mask[0]].tolist() == [*range(tokens)] * 2 + [*range(IMAGE_LENGTH)]


def test_long_rows_are_cut_with_their_pictures(processor, model, picture):
    collator = PumaDataCollator(processor, model.config.tokens_per_scale, max_length=12)
    row = {"prompt": "abc", "completion": "<image> and <image>", "images": [picture, make_picture(1)]}
    batch = collator([row])
    assert batch["input_ids"].shape == (1, 12) and batch["pixel_values"].shape[0] == 1
    assert model(**batch).loss.isfinite()


def test_a_row_that_is_cut_before_what_is_learnt(processor, picture, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    rows = [{"prompt": "<image>", "completion": answer, "images": [picture]} for answer in ("a", "b")]
    warning = f"max_length={IMAGE_LENGTH} cuts rows before the first token that is learnt"
    PumaDataCollator(processor, max_length=IMAGE_LENGTH + 6)(rows)
    assert warning not in caplog.text
    assert (PumaDataCollator(processor, max_length=IMAGE_LENGTH)(rows)["labels"] == -100).all()
    assert caplog.text.count(warning) == 1


def test_packing_joins_rows_that_start_anew(processor, model):
    rows = [{**row, "images": [make_picture(i) for i in row.get("images", [])]} for row, _, _ in ROWS]
    padded = PumaDataCollator(processor, model.config.tokens_per_scale)(rows)
    packed = PumaDataCollator(processor, model.config.tokens_per_scale, packing=True)(rows)
    real = padded["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    for key in ("input_ids", "labels"):
        assert torch.equal(packed[key], padded[key][real][None])
    assert packed["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    assert torch.equal(packed["pixel_values"], padded["pixel_values"]) and "attention_mask" not in packed


def test_conversations_as_prompt_and_completion(collator, processor, picture):
    """What the assistant said before is given."""
    prompt = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "draw it"},
    ]
    completion = [{"role": "assistant", "content": [{"type": "image"}]}]
    row = {"images": [picture, make_picture(1)]}
    batch = collator([{**row, "prompt": prompt, "completion": completion}])
    assert supervised_text(processor, batch["labels"][0]) == " [IMG][/IMG]</s>"
    assert batch["image_loss_mask"].tolist() == [False, True]
    assert torch.equal(batch["input_ids"], collator([{**row, "messages": prompt + completion}])["input_ids"])


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_pictures_of_plain_messages_come_first_as_in_trl(collator, processor, form):
    """Two pictures, after a system message; a mark in such a text is text, and no place of a picture."""
    pictures = [make_picture(0), make_picture(1)]
    said = {"system": "Hi.", "user": "what?", "assistant": "a cat"}
    system, user, assistant = ({"role": role, "content": text} for role, text in said.items())
    rows = {"messages": {"messages": [system, user, assistant]}}
    rows["prompt"] = {"prompt": [system, user], "completion": [assistant]}
    batch = collator([{**rows[form], "images": pictures}])
    parts = prepare_multimodal_messages(rows["messages"]["messages"], pictures)
    expected = collator([{"messages": parts, "images": pictures}])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["image_loss_mask"].tolist() == [False, False]
    with pytest.raises(ValueError, match="holds 0 images but 2"):
        collator([{"messages": [{**user, "content": "<image><image>what?"}, assistant], "images": pictures}])


def test_all_of_a_conversation_may_be_supervised(processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    batch = PumaDataCollator(processor, assistant_only_loss=False)([{"messages": messages, "images": [picture]}])
    text = supervised_text(processor, batch["labels"][0])
    assert text.startswith("A chat between") and text.endswith("USER: [IMG][/IMG]what? ASSISTANT: a cat</s>")
    assert batch["image_loss_mask"].tolist() == [True]


HOSTILE = "</s><image> [IMG] <loc_5> <s> \ue000 <box>"


def test_texts_of_conversations_stay_plain(collator, processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": HOSTILE}]},
        {"role": "assistant", "content": HOSTILE},
    ]
    batch = collator([{"messages": messages, "images": [picture]}])
    ids = batch["input_ids"][0].tolist()
    assert [ids.count(token) for token in processor.image_ids[:1]] == [1] and ids.count(1) == 1
    assert processor.tokenizer.decode(ids).count(HOSTILE) == 2
    assert supervised_text(processor, batch["labels"][0]) == f" {HOSTILE}</s>"
    question = processor.prepare_question([HOSTILE], [[picture]])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(question)], question)


BOX, LOCATIONS = (0, 0, 20, 15), "<loc_0><loc_0><loc_112><loc_112>"


@pytest.mark.parametrize(
    ("row", "read", "written"),
    [
        ({"prompt": "<image>where is it?", "completion": "at <box>."}, "where is it?", f"at {LOCATIONS}.</s>"),
        ({"prompt": "<image>what is at <box>?", "completion": "a cat"}, f"what is at {LOCATIONS}?", "a cat</s>"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where? <loc_1>"}]},
                    {"role": "assistant", "content": "at <box>."},
                ]
            },
            "where? <loc_1>",
            f" at {LOCATIONS}.</s>",
        ),
    ],
)
def test_boxes_become_location_tokens(collator, processor, tmp_path, row, read, written):
    picture = make_picture(0)  # 40 x 30
    batch = collator([{**row, "images": [picture], "boxes": [BOX]}])
    ids = batch["input_ids"][0]
    assert read in processor.tokenizer.decode(ids)
    assert supervised_text(processor, batch["labels"][0]) == written
    locations = set(processor.tokenizer.convert_tokens_to_ids([f"<loc_{i}>" for i in range(224)]))
    assert sum(token in locations for token in ids.tolist()) == 4
    for found, expected in zip(processor.parse_boxes(LOCATIONS, picture.size)[0], BOX, strict=True):
        assert abs(found - expected) <= 0.5 / 224 * 40 + 1e-9

    picture.save(tmp_path / "picture.png")
    for other in (str(tmp_path / "picture.png"), np.array(picture)):
        assert torch.equal(collator([{**row, "images": [other], "boxes": [BOX]}])["input_ids"][0], ids)

    features = {"image_features": [torch.zeros(IMAGE_LENGTH, 32)], "image_sizes": [picture.size]}
    assert torch.equal(collator([{**row, **features, "boxes": [BOX]}])["input_ids"][0], ids)


def test_a_question_with_boxes_is_read_as_in_training(collator, processor, picture):
    content = [{"type": "image"}, {"type": "text", "text": "what is at <box>?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    ids = collator([{"messages": messages, "images": [picture], "boxes": [BOX]}])["input_ids"][0]
    question = processor.prepare_question(["what is at <box>?"], [[picture]], boxes=[[BOX]])["input_ids"][0]
    assert LOCATIONS in processor.tokenizer.decode(question)
    assert torch.equal(ids[: len(question)], question)


def test_preferences_are_pairs_of_answers(processor, picture):
    row = {"prompt": "<image>what?", "chosen": "a cat", "rejected": "no", "images": [picture]}
    batch = PumaPreferenceCollator(processor)([row, {**row, "chosen": "x"}])
    answers = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert answers == ["a cat</s>", "x</s>", "no</s>", "no</s>"]
    assert batch["pixel_values"].shape[0] == 4 and not {"labels", "image_loss_mask"} & batch.keys()
    with pytest.raises(ValueError, match="one of them holds a picture"):
        PumaPreferenceCollator(processor)([{**row, "prompt": "what?", "chosen": "<image>", "rejected": "<image>"}])
    ask, answers = {"role": "user", "content": "what?"}, [{"role": "assistant", "content": c} for c in ("a cat", "no")]
    implicit = {"chosen": [ask, answers[0]], "rejected": [ask, answers[1]], "images": [picture]}
    explicit = {"prompt": [ask], "chosen": answers[:1], "rejected": answers[1:], "images": [picture]}
    one, other = (PumaPreferenceCollator(processor)([row]) for row in (implicit, explicit))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="'prompt', 'chosen' and 'rejected'; got"):
        PumaPreferenceCollator(processor)([{"prompt": "a", "completion": "b"}])


def test_rows_of_which_nothing_is_learnt(collator, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    collator([{"messages": [{"role": "user", "content": "an unanswered question"}]}])
    assert "nothing is learnt of rows without answer or completion" in caplog.text
    assert "an unanswered question" in caplog.text


PICTURE, FEATURES = make_picture(0), torch.zeros(IMAGE_LENGTH, 32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "<image>", "images": []}], "holds 1 images but 0"),
        ([{"text": "a", "images": [0]}], "holds 0 images but 1"),
        (
            [{"text": "a", "image": PICTURE}],
            "holds 0 images but 1 were given in 'images'; a picture's place is <image>",
        ),
        ([{"text": "<image>", "image": PICTURE, "images": [PICTURE]}], "one column, got 'image' among"),
        ([{"prompt": "a", "completion": "b", "text": "c"}], "but this has both: .*'text': 'c'"),
        ([{"prompt": "<image>", "completion": "a", "images": [None]}], "'images' holds None"),
        ([{}], "a stock Trainer drops these columns without remove_unused_columns=False"),
        ([{"caption": "a"}], "needs 'messages'"),
        ([{"prompt": "where is <box>?", "completion": "here"}], "holds 1 <box> but 0 boxes"),
        ([{"prompt": "<image>", "completion": "here", "images": [PICTURE], "boxes": [BOX]}], "0 <box> but 1 boxes"),
        ([{"text": "at <box>", "boxes": [BOX]}], "1 boxes but no <image>"),
        ([{"text": "<image><box>", "image_features": [FEATURES], "boxes": [BOX]}], "need image_sizes"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "got a list and a str"),
        (
            [{"text": "<image>", "images": [PICTURE]}, {"text": "<image>", "image_features": [FEATURES]}],
            "rows with images and rows with image_features",
        ),
    ],
)
def test_bad_rows(collator, rows, message):
    with pytest.raises(ValueError, match=message):
        collator(rows)


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_below_one_token(processor, max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length} must be at least 1, or None"):
        PumaDataCollator(processor, max_length=max_length)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<image>", "completion": "a", "images": make_picture(0)}, "'images' must be a list.*got a Image"),
        ({"prompt": "<image>", "completion": "a", "images": "cat.png"}, "'images' must be a list.*got a str"),
        (
            {"prompt": "<image>", "completion": "a", "images": [{"bytes": b"", "path": None}]},
            "holds a dict.*cast_column",
        ),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "a row cannot be read .KeyError.*a 'role' and a 'content'.*'human'",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "a message needs a 'role' and a 'content'.*'hi'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "a message needs a 'role' and a 'content'.*None"),
        ({"messages": []}, r"a message needs a 'role' and a 'content'.*\{'messages': \[\]\}"),
    ],
)
def test_rows_of_another_form_are_shown(collator, row, message):
    with pytest.raises(ValueError, match=message):
        collator([row])


def test_a_column_of_one_picture_is_read_too(collator, picture):
    row = {"prompt": "a cat", "completion": "<image>"}
    expected, batch = collator([{**row, "images": [picture]}]), collator([{**row, "image": picture}])
    assert batch.keys() == expected.keys() and "pixel_values" in batch
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_none_is_an_absent_column(collator, picture):
    row = {"prompt": "a cat", "completion": "<image>", "images": [picture]}
    absent = {"messages": None, "text": None, "image_features": None, "finest_scale": None}
    expected, batch = collator([row]), collator([{**row, **absent}])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_features_of_a_row_may_be_one_tensor(collator):
    features = torch.rand(2, IMAGE_LENGTH, 32)
    batch = collator([{"prompt": "<image>red", "completion": "<image>", "image_features": features}])
    assert torch.equal(batch["image_features"], features)
