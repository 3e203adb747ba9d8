import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CLIPVisionModel

from transformers_puma import PumaForConditionalGeneration, flatten_scales, multigranular_features
from transformers_puma.granularity import scale_of_position
from transformers_puma.image_positions_puma import with_noise
from transformers_puma.loss_puma import text_loss
from transformers_puma.modeling_puma import ImagePositions

from .conftest import IMAGE_LENGTH, LAYERS, NUM_SCALES, make_model, make_picture

BACKBONES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **LAYERS},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, **LAYERS},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8, **LAYERS},
}


@pytest.fixture
def batch(processor):
    """Row 0: two pictures; row 1: one picture; right-padded."""
    return processor(
        text=["<image>make it red<image>", "a <image> b"],
        images=[[make_picture(0), make_picture(1)], [make_picture(2)]],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


def text_labels(processor, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == processor.image_token_id, -100)


def test_features_are_clips_before_the_last_layernorm(model, batch):
    clip = CLIPVisionModel(model.config.vision_config).eval()
    clip.load_state_dict(model.model.vision_tower.state_dict())
    with torch.no_grad():
        expected = clip(batch["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
    features = model.encode_image(batch["pixel_values"])
    torch.testing.assert_close(features[0], expected)
    for scale, pooled in enumerate(multigranular_features(expected, NUM_SCALES)):
        torch.testing.assert_close(features[scale], pooled)


def test_pixels_of_no_picture(model):
    with pytest.raises(ValueError, match="pixel_values holds no pictures"):
        model(input_ids=torch.tensor([[0, 5]]), pixel_values=torch.zeros(0, 3, 16, 16))


def test_the_sequence_is_the_projected_features_among_the_embeddings(model, batch):
    """The model's states equal those of the stock language model on embeddings put together by hand."""
    ids = batch["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        projected = model.model.projector(flatten_scales(model.encode_image(batch["pixel_values"])))
        image = 0
        for row in range(2):
            places = (ids[row] == model.config.image_token_id).nonzero().flatten()
            for run in places.split(IMAGE_LENGTH):
                embeds[row, run] = projected[image]
                image += 1
        expected = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        output = model.model(**batch)
    assert image == 3
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_one_compiled_graph_reads_images_and_refuses_what_does_not_fit(model, batch):
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
    is_second_row = torch.tensor([[False], [True]])
    too_few = batch["input_ids"].masked_fill(is_second_row & (batch["input_ids"] == model.config.image_token_id), 5)
    with pytest.raises(RuntimeError, match="as their placeholders"):
        compiled(**{**batch, "input_ids": too_few})


@torch.no_grad()
@pytest.mark.parametrize("image_decoding", ["prefilled", "next_scale"])
def test_one_compiled_graph_reads_written_images(processor, batch, image_decoding):
    model = make_model(processor, image_decoding=image_decoding)
    written = torch.tensor([True, False, True])
    compiled = torch.compile(model, fullgraph=True)(**batch, image_loss_mask=written)
    torch.testing.assert_close(compiled.logits, model(**batch, image_loss_mask=written).logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_decoder_reads_text_as_the_stock_model_does(processor, backbone):
    model = make_model(processor, text_config=BACKBONES[backbone])
    stock = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.weight = model.lm_head.weight
    text = processor(text=["a red car", "pizza"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**text).logits, stock(**text).logits)
    ours = model.generate(**text, max_new_tokens=5, do_sample=False)
    theirs = stock.generate(
        **text,
        max_new_tokens=5,
        do_sample=False,
        suppress_tokens=model.generation_config.suppress_tokens,
        pad_token_id=2,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_decoder_writes_features(processor, backbone):
    model = make_model(processor, text_config=BACKBONES[backbone])
    features = model.generate_image_features(**processor.prepare_generation(["a red car"]), scale=1)
    assert {scale: tuple(f.shape) for scale, f in features.items()} == {2: (1, 1, 32), 1: (1, 4, 32)}
    assert all(f.isfinite().all() for f in features.values())


def plain_loss(model, batch, labels, targets):
    """The loss of SPEC section 4 (report equation 2), token by token."""
    with torch.no_grad():
        output = model(**batch)
        states = model.model(**batch).last_hidden_state
        features = flatten_scales(model.encode_image(batch["pixel_values"]))
    text, image = [], []
    index = -1
    for row in range(len(labels)):
        offset = -1
        for t in range(1, labels.shape[1]):
            token, before = batch["input_ids"][row, t].item(), batch["input_ids"][row, t - 1].item()
            if labels[row, t] != -100:
                text.append(-F.log_softmax(output.logits[row, t - 1], -1)[labels[row, t]])
            if token != model.config.image_token_id:
                continue
            offset = 0 if before != token else offset + 1
            index += offset == 0
            if targets[index]:
                alpha = 64 if offset == 0 else 8 if offset < 5 else 1
                error = (model.image_head(states[row, t - 1]) - features[index, offset]) ** 2
                image.append(alpha * error.mean())
    return torch.stack(text).mean(), torch.stack(image).mean()


def test_skipping_logits_changes_no_loss_and_no_gradient(processor, batch):
    model = make_model(processor)
    labels, targets = text_labels(processor, batch), torch.tensor([False, True, True])
    gradients = []
    for skip_logits in (False, True):
        model.zero_grad()
        output = model(**batch, labels=labels, image_loss_mask=targets, skip_logits=skip_logits)
        assert (output.logits is None) == skip_logits
        output.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, skipped in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, skipped)


def test_loss_equals_the_plain_formula(model, processor, batch):
    labels, targets = text_labels(processor, batch), torch.tensor([False, True, True])
    with torch.no_grad():
        output = model(**batch, labels=labels, image_loss_mask=targets)
        text, image = plain_loss(model, batch, labels, targets)
    torch.testing.assert_close(output.text_loss, text)
    torch.testing.assert_close(output.image_loss, image)
    torch.testing.assert_close(output.loss, 0.02 * text + 1.0 * image)


def test_a_label_of_an_image_is_none(model, processor, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        given = model(**batch, labels=labels).loss
        torch.testing.assert_close(given, model(**batch, labels=text_labels(processor, batch)).loss)


def test_a_tuple_starts_with_the_loss(model, processor, batch):
    labels = text_labels(processor, batch)
    with torch.no_grad():
        named, plain = (model(**batch, labels=labels, return_dict=value) for value in (True, False))
    assert torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)


def test_counts_are_global_denominators(model, processor, batch):
    labels, targets = text_labels(processor, batch), torch.tensor([False, True, True])
    own = model(**batch, labels=labels, image_loss_mask=targets)
    number = (labels[:, 1:] != -100).sum()
    shared = model(
        **batch,
        labels=labels,
        image_loss_mask=targets,
        num_text_items=number * 4,
        num_image_items=2 * IMAGE_LENGTH * 5,
    )
    torch.testing.assert_close(shared.text_loss * 4, own.text_loss)
    torch.testing.assert_close(shared.image_loss * 5, own.image_loss)


def test_nothing_is_supervised_without_labels_or_mask(model, processor, batch):
    assert model(**batch).loss is None
    only_text = model(**batch, labels=text_labels(processor, batch))
    assert only_text.image_loss == 0 and only_text.scale_losses.isnan().all()
    only_image = model(**batch, labels=torch.full_like(batch["input_ids"], -100), image_loss_mask=torch.ones(3).bool())
    assert only_image.text_loss == 0 and only_image.image_loss > 0
    only_image.loss.backward()
    model.zero_grad()


def test_the_encoder_gets_no_gradient(processor, batch):
    model = make_model(processor)
    model(**batch, labels=text_labels(processor, batch), image_loss_mask=torch.ones(3).bool()).loss.backward()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    for trained in (model.model.projector, model.image_head, model.lm_head, model.model.language_model):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


def test_a_row_may_end_inside_its_last_picture(model, processor, batch):
    """Causality: the coarse scales of a picture cut short are predicted as in the whole one."""
    start = (batch["input_ids"][1] == model.config.image_token_id).nonzero()[0].item()
    whole = model.model(**batch).last_hidden_state[1, : start + 5]
    cut = model.model(input_ids=batch["input_ids"][1:, : start + 5], pixel_values=batch["pixel_values"][2:])
    torch.testing.assert_close(cut.last_hidden_state[0], whole)


def test_given_features_stand_for_pixels(model, batch):
    features = flatten_scales(model.encode_image(batch["pixel_values"]))
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**text, image_features=features).logits, model(**batch).logits)
    encoded = model.get_image_features(batch["pixel_values"])
    assert encoded.pooler_output.shape == (3, IMAGE_LENGTH, 32)
    torch.testing.assert_close(model(**text, mm_encoder_outputs={"image": encoded}).logits, model(**batch).logits)


def test_input_scales_hide_given_pictures_but_not_written_ones(processor, batch):
    model = make_model(processor, input_scales=[2])
    features = flatten_scales(model.encode_image(batch["pixel_values"]))
    finer = features.clone()
    finer[:, 1:] += 1
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(
        model(**text, image_features=finer).logits, model(**text, image_features=features).logits
    )
    coarser = features + torch.cat([torch.ones(3, 1, 1), torch.zeros(3, IMAGE_LENGTH - 1, 1)], 1)
    assert not torch.allclose(
        model(**text, image_features=coarser).logits, model(**text, image_features=features).logits
    )
    targets = torch.tensor([False, True, False])
    written = [model(**text, image_features=f, image_loss_mask=targets).logits for f in (features, finer)]
    assert not torch.allclose(*written)
    torch.testing.assert_close(written[0][1], written[1][1])


def test_images_that_do_not_match_the_placeholders(model, batch):
    with pytest.raises(Exception, match="3 images, but 2"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    longer = torch.full((1, IMAGE_LENGTH + 1), model.config.image_token_id)
    with pytest.raises(Exception, match=f"longer than the {IMAGE_LENGTH}"):
        model(input_ids=longer, pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="one of pixel_values"):
        model(**batch, image_features=torch.zeros(3, IMAGE_LENGTH, 32))
    with pytest.raises(ValueError, match="only inputs_embeds was given"):
        model(inputs_embeds=torch.zeros(1, 5, 32), pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="one bool for each of the 3 images"):
        model(**batch, labels=batch["input_ids"], image_loss_mask=torch.tensor([True]))


def test_positions():
    ids = torch.tensor([[9, 7, 7, 8, 7, 7], [7, 7, 9, 9, 9, 9]])
    positions = ImagePositions.find(ids, 7)
    assert positions.image[positions.mask].tolist() == [0, 0, 1, 1, 2, 2]
    assert positions.offset[positions.mask].tolist() == [0, 1, 0, 1, 0, 1]
    assert positions.starts.int().tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert positions.scales([4, 1])[positions.mask].tolist() == [1, 0, 1, 0, 1, 0]


def test_what_is_read_is_not_what_is_learnt(processor, batch):
    """With `read_features` the sequence is that of other images, and the targets are the images' own."""
    model = make_model(processor)
    written = torch.tensor([False, True, True])
    batch = {**batch, "labels": text_labels(processor, batch), "image_loss_mask": written}
    plain = model(**batch)
    assert torch.equal(plain.predicted_features[~written], plain.image_features[~written])
    others = torch.randn_like(plain.image_features)
    found = model(**batch, read_features=others)
    expected = model(**{**batch, "pixel_values": None}, image_features=others)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.image_features, plain.image_features)
    torch.testing.assert_close(found.predicted_features[written], expected.predicted_features[written])
    weights = torch.tensor(model.config.scale_loss_weights)[scale_of_position(model.config.tokens_per_scale)]
    error = (found.predicted_features - plain.image_features)[written].square().mean(-1)
    torch.testing.assert_close(found.image_loss, (weights * error).mean())
    with pytest.raises(ValueError, match=r"have shape \(1, 21, 32\), the images \(3, 21, 32\): expected the same"):
        model(**batch, read_features=others[:1])
    with pytest.raises(ValueError, match=r"have shape \(3, 21, 32\), the images None"):
        model(input_ids=batch["input_ids"][:1, :3], read_features=others)


def test_noise_is_on_what_is_read_not_on_the_targets(model, batch):
    torch.manual_seed(0)
    noisy = model.model(**batch, feature_noise=0.5)
    clean = model.model(**batch)
    torch.testing.assert_close(noisy.image_features, clean.image_features)
    assert not torch.allclose(noisy.last_hidden_state, clean.last_hidden_state)


@pytest.mark.parametrize("image_decoding", ["autoregressive", "prefilled", "next_scale"])
@pytest.mark.parametrize("written", [False, True])
def test_an_image_that_ends_after_a_coarse_scale_begins_as_the_whole_one(processor, image_decoding, written):
    model = make_model(processor, image_decoding=image_decoding)
    inputs = processor(text=["a <image>"], images=[[make_picture(0)]], return_tensors="pt")
    end = inputs["input_ids"][0].tolist().index(model.config.image_token_id) + sum(model.config.tokens_per_scale[1:])
    features, mask = flatten_scales(model.encode_image(inputs["pixel_values"])), torch.tensor([written])
    whole = model.model(inputs["input_ids"], image_features=features, image_loss_mask=mask)
    short = model.model(inputs["input_ids"][:, :end], image_features=features, image_loss_mask=mask)
    torch.testing.assert_close(short.last_hidden_state, whole.last_hidden_state[:, :end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(processor, batch, dtype):
    model = make_model(processor).to(dtype)
    output = model(**batch, labels=text_labels(processor, batch), image_loss_mask=torch.ones(3).bool())
    assert output.logits.dtype == dtype and output.loss.isfinite()


def test_gradient_checkpointing_changes_nothing(processor, batch):
    labels = text_labels(processor, batch)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(processor).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=labels, image_loss_mask=torch.ones(3).bool(), use_cache=False).loss.backward()
        gradients.append(model.model.projector.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_round_trip_with_either_attention(model, batch, tmp_path, attention):
    model.save_pretrained(tmp_path)
    again = PumaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_logits_of_chosen_positions(model, processor):
    ids = processor(text="a red car", return_tensors="pt")["input_ids"]
    whole = model(input_ids=ids, labels=ids)
    for kept in (2, torch.tensor([0, 3])):
        chosen = model(input_ids=ids, labels=ids, logits_to_keep=kept)
        expected = whole.logits[:, -2:] if isinstance(kept, int) else whole.logits[:, kept]
        torch.testing.assert_close(chosen.logits, expected)
        torch.testing.assert_close(chosen.loss, whole.loss)


def test_noise_is_in_units_of_each_channel_and_as_strong_as_drawn_for_each_image():
    deviations = torch.tensor([0.1, 1.0, 10.0])
    features = torch.randn(400, 21, 3, generator=torch.Generator().manual_seed(0)) * deviations + 5
    torch.manual_seed(0)
    noise = (with_noise(features, 0.5, num_tokens=21) - features) / deviations
    strengths = noise.std(dim=(1, 2))
    assert noise.std(dim=(0, 1)).tolist() == pytest.approx([0.5 / 3**0.5] * 3, rel=0.1)
    assert strengths.min() < 0.05 and 0.45 < strengths.max() < 0.65
    assert with_noise(features, 0.5, num_tokens=5).shape == (400, 5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_is_summed_in_single_precision(dtype):
    logits = (8 * torch.randn(600, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.zeros(600).long()
    loss = text_loss(logits, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, text_loss(logits.float(), targets))
