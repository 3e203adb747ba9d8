import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from transformers_puma import flatten_scales
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

from .conftest import IMAGE_LENGTH, make_model, make_picture


def without_cache(model, row, scale):
    """Features of one prompt by running the whole sequence anew at every step."""
    ids, pixels = row["input_ids"], row.get("pixel_values")
    features = []
    embeds = model.get_input_embeddings()(ids)
    if pixels is not None:
        states = model.get_image_features(pixels).pooler_output.flatten(0, 1)
        embeds[ids == model.config.image_token_id] = states
    for _ in range(sum(model.config.tokens_per_scale[scale:])):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        features.append(model.image_head(hidden[:, -1:]))
        embeds = torch.cat([embeds, model.model.projector(features[-1])], dim=1)
    return torch.cat(features, dim=1)


@pytest.fixture
def prompts():
    return ["a red car", "b", "what"], [[], [make_picture(1)], [make_picture(2), make_picture(3)]]


@torch.no_grad()
def test_cached_left_padded_batches_equal_single_rows_without_cache(model, processor, prompts):
    together = flatten_scales(model.generate_image_features(**processor.prepare_generation(*prompts), scale=0))
    for i, (prompt, images) in enumerate(zip(*prompts, strict=True)):
        alone = without_cache(model, processor.prepare_generation([prompt], [images]), scale=0)
        assert (together[i] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize(("scale", "steps"), [(2, 1), (1, 5), (0, 21)])
def test_a_scale_costs_its_tokens_and_nothing_finer(model, processor, scale, steps):
    passes, told = [], []
    handle = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    features = model.generate_image_features(
        **processor.prepare_generation(["a car", "b"]), scale=scale, callback=lambda *step: told.append(step)
    )
    handle.remove()
    assert len(passes) == steps and told == [(i + 1, steps) for i in range(steps)]
    assert sorted(features) == list(range(scale, 3))
    assert flatten_scales(features).shape == (2, steps, 32)


@torch.no_grad()
def test_teacher_forcing_reproduces_what_was_generated(model, processor):
    """Generated features, given as an image, predict themselves in one pass."""
    prompt = processor.prepare_generation(["a red car"])
    features = flatten_scales(model.generate_image_features(**prompt))
    ids = torch.cat([prompt["input_ids"], torch.full((1, IMAGE_LENGTH), processor.image_token_id)], dim=1)
    states = model.model(input_ids=ids, image_features=features).last_hidden_state
    predicted = model.image_head(states[:, prompt["input_ids"].shape[1] - 1 : -1])
    assert (predicted - features).abs().max() < 1e-4


def test_bad_requests(model, processor, picture):
    for scale in (3, 1.0, None):
        with pytest.raises(ValueError, match=f"scale={scale} must be one of 0..2"):
            model.generate_image_features(**processor.prepare_generation(["a"]), scale=scale)
    pictured = processor(text="<image>b", images=picture, generation_mode="image", return_tensors="pt")
    with pytest.raises(ValueError, match="one of pixel_values and image_features"):
        model.generate_image_features(**pictured, image_features=torch.zeros(1, 21, 32))
    del pictured["pixel_values"]
    with pytest.raises(ValueError, match="images of 20 tokens were given: expected the 21"):
        model.generate_image_features(**pictured, image_features=torch.zeros(1, 20, 32))
    with pytest.raises(ValueError, match=r"must end with \[IMG\]"):
        model.generate_image_features(**processor(text="a", return_tensors="pt"))


def test_stock_generation_never_opens_an_image(processor, picture):
    model = make_model(processor)
    with torch.no_grad():
        model.lm_head.weight[processor.image_start_token_id] += 10
    ids = model.generate(**processor.prepare_question(["what?"], [[picture]]), max_new_tokens=8, do_sample=True)
    written = ids[0, -8:]
    assert not set(written.tolist()) & set(processor.image_ids)


def test_text_goes_on_from_embeddings(model, processor, picture):
    inputs = processor.prepare_question(["what?"], [[picture]])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    features = flatten_scales(model.encode_image(inputs["pixel_values"]))
    embeddings, _ = model.model.embed(inputs["input_ids"], features, None)
    found = model.generate(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], max_new_tokens=4, do_sample=False
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("as_features", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_copies_of_a_row_keep_its_pictures(model, processor, options, as_features):
    questions, images = ["one?", "two?"], [[make_picture(0), make_picture(1)], [make_picture(2)]]

    def first_logits(rows, **kwargs):
        inputs = processor.prepare_question([questions[row] for row in rows], [images[row] for row in rows])
        if as_features:
            inputs["image_features"] = flatten_scales(model.encode_image(inputs.pop("pixel_values")))
        outputs = model.generate(
            **inputs, **kwargs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        return outputs.logits[0]

    copies = first_logits([0, 1], **options)
    for row in range(2):
        torch.testing.assert_close(copies[2 * row : 2 * row + 2], first_logits([row]).expand(2, -1), rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a model spread over two GPUs needs two")
@pytest.mark.parametrize("image_head", ["regression", "flow"])
@pytest.mark.parametrize("embedding", [0, 1])
def test_a_model_spread_over_two_gpus(processor, picture, image_head, embedding):
    model = make_model(processor, image_head=image_head)
    inputs = processor(text="<image>a<image>", images=[[picture, picture]], return_tensors="pt")
    inputs |= {"labels": inputs["input_ids"], "image_loss_mask": torch.tensor([False, True])}
    prompt = processor.prepare_generation(["a"])

    def run(device: str):
        torch.manual_seed(0)
        noise = torch.Generator().manual_seed(0)
        features = model.generate_image_features(**prompt.to(device), scale=1, generator=noise)
        outputs = model(**{name: value.to(device) for name, value in inputs.items()})
        return outputs.text_loss, outputs.logits, features[1]

    expected = run("cpu")
    first = {
        "model.vision_tower",
        "model.projector",
        "model.language_model.rotary_emb",
        "model.language_model.layers.0",
    }
    last = {"model.language_model.layers.1", "model.language_model.norm", "image_head", "lm_head"}
    model = dispatch_model(
        model, dict.fromkeys(first, 0) | dict.fromkeys(last, 1) | {"model.language_model.embed_tokens": embedding}
    )
    for ours, theirs in zip(run("cuda:0"), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


def test_a_prompt_whose_pictures_are_missing(model, processor, picture):
    inputs = processor(text="<image>b", images=picture, generation_mode="image", return_tensors="pt")
    del inputs["pixel_values"]
    for generate in (model.generate_image_features, model.generate, model.generate_interleaved):
        with pytest.raises(ValueError, match="the text holds 1 images, but 0 were given"):
            generate(**inputs)


def test_a_conversation_goes_on_from_its_cache(model, processor, picture):
    """What is in the cache needs no picture again."""
    inputs = processor.prepare_question(["what?"], [[picture]])
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[70, 71]])], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False}
    went_on = model.generate(ids, past_key_values=first.past_key_values, **options)
    assert torch.equal(went_on, model.generate(ids, pixel_values=inputs["pixel_values"], **options))


def test_a_prompt_with_pictures_is_not_read_in_chunks(model, processor, picture):
    inputs = processor.prepare_question(["what?"], [[picture]])
    with pytest.raises(ValueError, match="prefill_chunk_size does not work with images"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


@pytest.mark.parametrize("decoding", ["autoregressive", "next_scale"])
def test_weights_that_are_elsewhere_until_their_module_runs(processor, picture, decoding):
    model = make_model(processor, image_decoding=decoding)
    prompt, question = processor.prepare_generation(["a"], [[picture]]), processor.prepare_question(["b"], [[picture]])
    expected, answer = model.generate_image_features(**prompt), model.generate(**question, max_new_tokens=3)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.projector.weight.device.type == "meta"
    for scale, features in model.generate_image_features(**prompt).items():
        assert torch.equal(features, expected[scale])
    assert torch.equal(model.generate(**question, max_new_tokens=3), answer)


LEARNED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_positions": 128}
LEARNED |= {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@torch.no_grad()
def test_padding_moves_no_position(processor):
    """Rotary embeddings, relative as they are, would not show it: a table of positions does."""
    model = make_model(processor, text_config=LEARNED)
    torch.nn.init.normal_(model.model.language_model.wpe.weight, std=0.5)
    prompts, images = ["a long red car", "b"], [[make_picture(1)], []]
    inputs = processor.prepare_generation(prompts, images)
    together = model.generate_image_features(**inputs)
    forced = teacher_forced_features(model, **inputs, target_features=flatten_scales(together))
    for row in range(2):
        alone = model.generate_image_features(**processor.prepare_generation([prompts[row]], [images[row]]))
        for scale, features in alone.items():
            torch.testing.assert_close(together[scale][row], features[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(forced[scale][row], features[0], rtol=0, atol=1e-4)
