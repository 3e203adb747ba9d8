"""The three ways to write an image, with either head: each against a whole sequence in one forward without a cache."""

import copy
import itertools

import pytest
import torch

from transformers_puma import flatten_scales, multigranular_features
from transformers_puma.configuration_puma import IMAGE_HEADS
from transformers_puma.granularity import scale_of_position
from transformers_puma.image_decoding_puma import IMAGE_DECODINGS, decoding_passes, parent_of_position
from transformers_puma.image_positions_puma import blockwise_causal_mask

from .conftest import IMAGE_LENGTH, make_model, make_picture

COUNTS = [16, 4, 1]
PROMPTS = ["a red car", "b", "what"], [[], [make_picture(1)], [make_picture(2), make_picture(3)]]


def test_the_parent_of_a_position_is_the_cell_that_covers_it():
    image = torch.arange(16.0).reshape(1, 4, 4, 1)
    sequence = flatten_scales(multigranular_features(image, 3))[0, :, 0]
    parents = parent_of_position(COUNTS)
    assert parents[0] == -1 and parents[1:5].tolist() == [0] * 4
    for parent in range(5):
        children = sequence[parents == parent]
        assert len(children) == 4 and children.mean() == sequence[parent]


@pytest.mark.parametrize(
    ("decoding", "fed", "written"),
    [
        ("autoregressive", [[], [0], [1], [2], [3]], [[0], [1], [2], [3], [4]]),
        ("next_scale", [[0], [1, 2, 3, 4]], [[0], [1, 2, 3, 4]]),
        ("prefilled", [[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]]),
    ],
)
def test_passes_of_each_decoding(decoding, fed, written):
    places = list(range(21))
    passes = decoding_passes(decoding, [16, 4, 1], scale=1)
    assert [places[read] for read, _ in passes] == fed
    assert [places[write] for _, write in passes] == written


def make_decoding_model(processor, image_decoding, image_head="regression"):
    model = make_model(processor, image_decoding=image_decoding, image_head=image_head, flow_num_steps=4)
    if image_decoding != "autoregressive":
        torch.nn.init.normal_(model.model.image_queries.weight, std=0.5)
    if image_head == "flow":
        torch.nn.init.normal_(model.image_head.out_proj.weight, std=0.5)
    return model


@pytest.fixture(scope="module", params=IMAGE_DECODINGS)
def decoding_model(request, processor):
    return make_decoding_model(processor, request.param)


@pytest.fixture(scope="module", params=itertools.product(IMAGE_DECODINGS, IMAGE_HEADS), ids="-".join)
def any_model(request, processor):
    return make_decoding_model(processor, *request.param)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def predict(model, states, generator):
    """Features (S, C) of a whole image from the states (S, H) that they are read from."""
    scales = scale_of_position(COUNTS)
    own = torch.Generator().manual_seed(torch.randint(2**63 - 1, (), generator=generator).item())
    noise = torch.cat([torch.randn(1, count, 32, generator=own) for count in reversed(COUNTS)], dim=1)
    return model.predict_features(states[None], scales, noise)[0]


def plain_sequence(model, row, written):
    """States (T, H) of one prompt and an image (S, C) behind it, by the stock language model on embeddings and a mask
    that are put together here token by token."""
    ids, pixels = row["input_ids"][0], row.get("pixel_values")
    embeds = list(model.get_input_embeddings()(ids))
    scales = scale_of_position(COUNTS)
    places = [None] * len(ids)
    if pixels is not None:
        states = model.model.projector(flatten_scales(model.encode_image(pixels)))
        if model.config.image_decoding != "autoregressive":
            states = states + model.model.image_queries.weight
        runs = (ids == model.config.image_token_id).nonzero().flatten().split(IMAGE_LENGTH)
        for image, run in enumerate(runs):
            for offset, t in enumerate(run.tolist()):
                embeds[t], places[t] = states[image, offset], (image, scales[offset].item())
    parents = parent_of_position(COUNTS)
    for offset in range(IMAGE_LENGTH):
        if model.config.image_decoding == "autoregressive":
            state = model.model.projector(written[offset])
        else:
            state = model.model.image_queries.weight[offset]
            if model.config.image_decoding == "next_scale" and offset:
                state = state + model.model.projector(written[parents[offset]])
        embeds.append(state)
        places.append(("written", scales[offset].item()))
    length = len(embeds)
    mask = torch.ones(length, length).tril().bool()
    if model.config.image_decoding == "next_scale":
        for q in range(length):
            for k in range(length):
                mask[q, k] |= places[q] is not None and places[q] == places[k]
    return model.model.language_model(
        inputs_embeds=torch.stack(embeds)[None], attention_mask=mask[None, None], use_cache=False
    ).last_hidden_state[0]


@torch.no_grad()
def test_cached_left_padded_batches_equal_whole_sequences_without_a_cache(any_model, processor):
    """What was generated, put behind its prompt, is what the whole sequence predicts at each position."""
    model = any_model
    inputs = processor.prepare_generation(*PROMPTS)
    together = flatten_scales(model.generate_image_features(**inputs, generator=seeds(0, 1, 2)))
    shift = model.config.image_decoding == "autoregressive"
    for i, (prompt, images) in enumerate(zip(*PROMPTS, strict=True)):
        row = processor.prepare_generation([prompt], [images])
        length = row["input_ids"].shape[1]
        states = plain_sequence(model, row, together[i])
        predicted = predict(model, states[length - shift : length - shift + IMAGE_LENGTH], *seeds(i))
        assert (predicted - together[i]).abs().max() < 1e-4


@torch.no_grad()
def test_interleaved_text_and_images_are_what_one_forward_predicts(any_model, processor):
    """Of left-padded rows with their own seeds, one with a given picture; each whole row anew in one forward."""
    model = copy.deepcopy(any_model)  # one that prefers to draw as soon as it may
    model.lm_head.weight.mul_(3)
    model.lm_head.weight[processor.image_start_token_id] *= 2
    texts, pictures = ["hello", "<image>red"], [[], [make_picture(0)]]
    inputs = processor(text=texts, images=pictures, generation_mode="image", padding=True, return_tensors="pt")
    output = model.generate_interleaved(**inputs, do_sample=False, max_new_tokens=70, generator=seeds(0, 1))
    for row, (segments, generator) in enumerate(zip(output.segments, seeds(0, 1), strict=True)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        prompt_length, starts, images = len(ids), [], []
        given = [flatten_scales(model.encode_image(inputs["pixel_values"]))[0]] * len(pictures[row])
        for segment in segments:
            if not isinstance(segment, dict):
                ids += segment.tolist()
            elif len(segment) == 3:  # an image that the limit cuts ends its row
                images.append(flatten_scales({s: feature[None] for s, feature in segment.items()})[0])
                is_open = ids[-1] == processor.image_start_token_id
                ids += processor.image_ids[1:] if is_open else processor.image_ids
                starts.append(len(ids) - IMAGE_LENGTH - 1)
        assert images and len(ids) > prompt_length + IMAGE_LENGTH + 1
        states = model.model(
            input_ids=torch.tensor([ids]),
            image_features=torch.stack(given + images),
            image_loss_mask=torch.tensor([False] * len(given) + [True] * len(images)),
        ).last_hidden_state[0]
        logits = model.lm_head(states)
        logits[:, [processor.image_token_id, processor.image_end_token_id]] = -torch.inf
        for t in range(prompt_length, len(ids)):
            if ids[t] not in (processor.image_token_id, processor.image_end_token_id):
                assert logits[t - 1].argmax() == ids[t]
        shift = model.config.image_decoding == "autoregressive"
        for start, image in zip(starts, images, strict=True):
            predicted = predict(model, states[start - shift : start - shift + IMAGE_LENGTH], generator)
            assert (predicted - image).abs().max() < 1e-4


def test_an_image_is_learned(any_model, processor):
    model = copy.deepcopy(any_model).train()
    ids = torch.tensor([[*processor.bos_ids, *processor.image_ids]])
    batch = {
        "input_ids": ids,
        "image_features": torch.randn(1, IMAGE_LENGTH, 32),
        "labels": ids.new_full(ids.shape, -100),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(0)
    for _ in range(100):
        loss = model(**batch, image_loss_mask=torch.tensor([True])).image_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The velocity of a flow is learned at all times and from all noise, which takes longer.
    assert sum(losses[-10:]) < {"regression": 0.1, "flow": 0.75}[model.config.image_head] * sum(losses[:10])


@torch.no_grad()
def test_training_sees_what_generation_does(decoding_model, processor):
    """In one forward with a written image, the squared error of generated features is zero at every scale."""
    model = decoding_model
    prompt = processor.prepare_generation(["a red car"], [[make_picture(1)]])
    features = flatten_scales(model.generate_image_features(**prompt))
    given = flatten_scales(model.encode_image(prompt["pixel_values"]))
    ids = torch.cat([prompt["input_ids"], torch.tensor([processor.image_ids[1:]])], dim=1)
    outputs = model(
        input_ids=ids,
        image_features=torch.cat([given, features]),
        image_loss_mask=torch.tensor([False, True]),
        labels=torch.full_like(ids, -100),
    )
    assert outputs.scale_losses.max() < 1e-8


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_a_scale_costs_its_passes_and_does_not_depend_on_finer_ones(decoding_model, processor, scale):
    model = decoding_model
    inputs = processor.prepare_generation(*PROMPTS)
    passes, told = [], []
    handle = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    features = model.generate_image_features(**inputs, scale=scale, callback=lambda *step: told.append(step))
    handle.remove()
    costs = {"autoregressive": sum(COUNTS[scale:]), "next_scale": 3 - scale, "prefilled": 1}
    expected = costs[model.config.image_decoding]
    assert len(passes) == expected and told == [(i + 1, expected) for i in range(expected)]
    finest = model.generate_image_features(**inputs)
    for coarse, feature in features.items():
        torch.testing.assert_close(feature, finest[coarse], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@torch.no_grad()
def test_other_attention_agrees(decoding_model, processor, attention):
    inputs = processor.prepare_generation(*PROMPTS)
    expected = flatten_scales(decoding_model.generate_image_features(**inputs, scale=1))
    language_model = decoding_model.model.language_model
    language_model.set_attn_implementation(attention)
    try:
        with torch.compiler.set_stance("force_eager"):  # flex attention as it is, without a compiler for the device
            features = flatten_scales(decoding_model.generate_image_features(**inputs, scale=1))
    finally:
        language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_flash_attention_has_no_room_for_next_scale(processor):
    model = make_model(processor, image_decoding="next_scale")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        model.generate_image_features(**processor.prepare_generation(["a"]))


def test_only_what_a_decoding_feeds_gets_a_gradient(decoding_model, processor):
    """All parts of a written image train; the last scale is fed by the report's decoding alone."""
    model = decoding_model
    ids = torch.tensor([[*processor.bos_ids, *processor.image_ids]])
    features = torch.randn(1, IMAGE_LENGTH, 32).requires_grad_()
    outputs = model(
        input_ids=ids,
        image_features=features,
        image_loss_mask=torch.tensor([True]),
        labels=torch.where(ids == processor.image_end_token_id, ids, -100),
    )
    (text_gradient,) = torch.autograd.grad(outputs.text_loss, features, allow_unused=True, retain_graph=True)
    fed = torch.zeros(IMAGE_LENGTH) if text_gradient is None else text_gradient[0].abs().sum(-1)
    last_fed = {"autoregressive": IMAGE_LENGTH, "next_scale": 5, "prefilled": 0}[model.config.image_decoding]
    assert (fed[:last_fed] > 0).all() and (fed[last_fed:] == 0).all()
    outputs.loss.backward()
    if model.config.image_decoding != "autoregressive":
        assert (model.model.image_queries.weight.grad.abs().sum(-1) > 0).all()
    model.zero_grad()


def test_a_batch_of_text_alone_trains_through_the_image_modules_with_zero_gradient(decoding_model, processor):
    model = decoding_model.train()
    batch = processor(text=["a red car"], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    image_modules = [model.model.projector, model.image_head]
    if model.config.image_decoding != "autoregressive":
        image_modules.append(model.model.image_queries)
    for module in image_modules:
        for parameter in module.parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() == 0
    model.zero_grad()


def test_the_flex_attention_mask_is_the_dense_one(processor):
    """As a function of positions."""
    config = make_model(processor).config.text_config
    blocks = torch.tensor([[-1, 0, 1, 1, 1, 1, -1, 2], [-1, -1, -1, 0, 1, 1, 1, 1]])
    attention_mask = torch.tensor([[1] * 8, [0] * 2 + [1] * 6])
    embeds = torch.zeros(2, 8, 32)
    masks = {}
    for implementation in ("sdpa", "flex_attention"):
        config._attn_implementation = implementation
        with torch.compiler.set_stance("force_eager"):
            masks[implementation] = blockwise_causal_mask(config, embeds, attention_mask, None, None, blocks)
    index = torch.arange(8)
    mask_mod = masks["flex_attention"].mask_mod
    for row in range(2):
        for query in range(int(2 * row), 8):  # rows of padding see nothing or anything
            dense = torch.stack([mask_mod(torch.tensor(row), torch.tensor(0), index[query], key) for key in index])
            assert torch.equal(dense, masks["sdpa"][row, 0, query])
