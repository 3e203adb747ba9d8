import pytest
import torch

from transformers_puma import flatten_scales
from transformers_puma.training import PumaDataCollator

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


def test_long_rows_are_cut_with_their_pictures(processor, model, picture):
    collator = PumaDataCollator(processor, model.config.tokens_per_scale, max_length=12)
    row = {"prompt": "abc", "completion": "<image> and <image>", "images": [picture, make_picture(1)]}
    batch = collator([row])
    assert batch["input_ids"].shape == (1, 12) and batch["pixel_values"].shape[0] == 1
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "<image>", "images": []}, "holds 1 images but 0"),
        ({"text": "a", "images": [0]}, "holds 0 images but 1"),
        ({"caption": "a"}, "needs 'messages'"),
        ({"prompt": "where is <box>?", "completion": "here"}, "<box> is not supported"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "must be texts, got a list"),
    ],
)
def test_bad_rows(collator, row, message):
    with pytest.raises(ValueError, match=message):
        collator([row])


def test_none_is_an_absent_column(collator, picture):
    row = {"prompt": "a cat", "completion": "<image>", "images": [picture]}
    absent = {"messages": None, "text": None, "image_features": None, "finest_scale": None}
    expected, batch = collator([row]), collator([{**row, **absent}])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_features_of_a_row_may_be_one_tensor(collator):
    features = torch.rand(2, IMAGE_LENGTH, 32)
    batch = collator([{"prompt": "<image>red", "completion": "<image>", "image_features": features}])
    assert torch.equal(batch["image_features"], features)
