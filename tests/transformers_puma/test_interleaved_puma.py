import copy

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .conftest import IMAGE_LENGTH, make_model


@pytest.fixture(scope="module")
def drawing_model(processor):
    """A model that prefers to draw as soon as it may, and to stop writing some time after."""
    model = make_model(processor)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        model.lm_head.weight[processor.image_start_token_id] *= 2
    return model


def interleave(model, processor, texts, **kwargs):
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    return model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=60, **kwargs)


def images_of(segments):
    return [segment for segment in segments if isinstance(segment, dict)]


@torch.no_grad()
def test_interleaved_images_are_those_that_feature_generation_would_write(drawing_model, processor):
    model = drawing_model
    output = interleave(model, processor, ["hello", "a red car"])
    assert any(images_of(row) for row in output.segments)
    for row, segments in zip(output.sequences, output.segments, strict=True):
        if not images_of(segments):
            continue
        start = (row == processor.image_token_id).nonzero()[0].item()
        prompt = row[:start][None]
        mask = torch.ones_like(prompt)
        mask[:, : (prompt == processor.tokenizer.pad_token_id).sum()] = 0
        expected = model.generate_image_features(prompt, mask)
        for scale, feature in images_of(segments)[0].items():
            assert (feature - expected[scale][0]).abs().max() < 1e-4


def test_a_drawn_image_is_start_placeholders_and_end(drawing_model, processor):
    for row in interleave(drawing_model, processor, ["hello", "a red car"]).sequences.tolist():
        while processor.image_start_token_id in row:
            start = row.index(processor.image_start_token_id)
            whole = row[start : start + len(processor.image_ids)]
            assert whole == processor.image_ids[: len(whole)]
            row = row[start + len(whole) :]
        assert not set(row) & set(processor.image_ids)


def test_interleaved_rows_do_not_depend_on_their_batch_nor_on_the_cache(drawing_model, processor):
    texts = ["hello", "a red car", "b"]
    together = interleave(drawing_model, processor, texts)
    uncached = interleave(drawing_model, processor, texts, use_cache=False)
    assert torch.equal(together.sequences, uncached.sequences)
    for i, text in enumerate(texts):
        alone = interleave(drawing_model, processor, [text]).segments[0]
        for ours, theirs, third in zip(together.segments[i], alone, uncached.segments[i], strict=False):
            if isinstance(theirs, dict):
                for scale in theirs:
                    assert (ours[scale] - theirs[scale]).abs().max() < 1e-4
                    assert (ours[scale] - third[scale]).abs().max() < 1e-4
            elif theirs is not alone[-1]:
                assert torch.equal(ours, theirs)


def test_an_image_that_the_limit_cuts_keeps_its_complete_scales(drawing_model, processor):
    inputs = processor(text="hello", generation_mode="image", return_tensors="pt")
    output = drawing_model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=7)
    assert sorted(images_of(output.segments[0])[0]) == [1, 2]


def test_pictures_in_the_prompt_of_interleaved_generation(drawing_model, processor, picture):
    inputs = processor(text="<image>again", images=picture, generation_mode="image", return_tensors="pt")
    segments = drawing_model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=IMAGE_LENGTH).segments[0]
    expected = drawing_model.generate_image_features(**inputs)
    for scale, feature in segments[0].items():
        assert (feature - expected[scale][0]).abs().max() < 1e-4


def test_the_length_of_interleaved_generation_may_come_in_a_generation_config(model, processor):
    inputs = processor(text="a", return_tensors="pt")
    expected = model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=3).sequences
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    assert torch.equal(model.generate_interleaved(**inputs, generation_config=config).sequences, expected)


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences", "max_length", "streamer"])
def test_modes_that_do_not_work_by_turns_are_refused(model, processor, option):
    with pytest.raises(ValueError, match=f"{option}=2"):
        interleave(model, processor, ["a"], **{option: 2})


def test_interleaved_generation_searches_greedily_whatever_the_models_settings(drawing_model, processor):
    expected = interleave(drawing_model, processor, ["a"]).sequences
    drawing_model.generation_config.num_beams = 2
    try:
        assert torch.equal(interleave(drawing_model, processor, ["a"]).sequences, expected)
    finally:
        drawing_model.generation_config.num_beams = None


class AfterTokens(StoppingCriteria):
    """Ends a row after so many tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


@torch.no_grad()
def test_a_stopping_criterion_ends_a_row_of_interleaved_generation(processor):
    model = make_model(processor)
    model.lm_head.weight[[processor.image_start_token_id, model.config.text_config.eos_token_id]] = 0
    inputs = processor(text=["ab", "cd"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([AfterTokens([length + 2, length + 5])])
    expected = model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=5)
    output = model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=9, stopping_criteria=criteria)
    assert [[len(text) for text in row] for row in output.segments] == [[2], [5]]
    for ours, theirs in zip(output.segments, expected.segments, strict=True):
        assert torch.equal(ours[0], theirs[0][: len(ours[0])])


@torch.no_grad()
def test_interleaved_generation_takes_ends_and_forbidden_tokens(model, processor):
    inputs = processor(text="ab", return_tensors="pt")
    [[text]] = model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=3).segments
    forbidden = text[0].item()
    [[other]] = model.generate_interleaved(
        **inputs, do_sample=False, max_new_tokens=3, suppress_tokens=[forbidden]
    ).segments
    assert forbidden not in other.tolist()
    [[ended]] = model.generate_interleaved(
        **inputs, do_sample=False, max_new_tokens=3, eos_token_id=forbidden
    ).segments
    assert ended.tolist() == [forbidden]
    for given, expected in (({"suppress_tokens": [forbidden]}, other), ({"eos_token_id": forbidden}, ended)):
        config = GenerationConfig(**given, do_sample=False)
        [[found]] = model.generate_interleaved(**inputs, max_new_tokens=3, generation_config=config).segments
        assert torch.equal(found, expected)


@torch.no_grad()
def test_interleaved_generation_draws_with_the_models_own_config(model, processor):
    """Which keeps stock generation from opening an image."""
    inputs = processor(text="ab", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate_interleaved(**inputs, **options)
    config = copy.deepcopy(model.generation_config)
    config.update(**options)
    assert processor.image_start_token_id in config.suppress_tokens and len(expected.segments[0]) > 1
    found = model.generate_interleaved(**inputs, generation_config=config)
    assert torch.equal(found.sequences, expected.sequences)

    forbidden = expected.segments[0][0][0].item()
    model = copy.deepcopy(model)
    model.generation_config.suppress_tokens.append(forbidden)
    assert forbidden not in model.generate_interleaved(**inputs, **options).sequences.tolist()[0]
