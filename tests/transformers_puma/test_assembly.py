"""Pretrained parts joined: the language model still computes what it did, and what PUMA cannot compute is refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from transformers_puma import PumaImageProcessor
from transformers_puma.assembly import assemble_puma, load_encoder, load_language_model, require_language_model
from transformers_puma.image_processing_puma import CLIPImageProcessorPil

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 16, "patch_size": 4, **LAYERS}
TEXT = {"vocab_size": 70, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **LAYERS}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, **TEXT}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 70, "num_kv_shared_layers": 0, **GEMMA}
QWEN = {"num_key_value_heads": 2, "head_dim": 8, **TEXT}
GPT2 = {"vocab_size": 70, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[1, 3, 4, 5, 3, 2]])


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "red", "cat"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def save_language_model(folder, model_type: str, auto=AutoModelForCausalLM, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **config)).to(dtype).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_vision() -> CLIPVisionModel:
    torch.manual_seed(1)
    return CLIPVisionModel(AutoConfig.for_model("clip_vision_model", **VISION))


def assemble(folder):
    language_model, tokenizer = load_language_model(str(folder))
    image_processor = PumaImageProcessor(size={"height": 16, "width": 16})
    return assemble_puma(language_model, tokenizer, make_vision(), image_processor)


@pytest.mark.parametrize(
    ("model_type", "config", "is_tied"),
    [
        ("llama", TEXT, False),
        ("llama", {**TEXT, "tie_word_embeddings": True}, True),
        ("qwen3", QWEN, False),
        ("gemma", GEMMA, True),
        ("gpt_neox", TEXT, False),
        ("gpt2", GPT2, True),
    ],
)
@torch.no_grad()
def test_language_model_computes_what_it_did(tmp_path, model_type, config, is_tied):
    source = save_language_model(tmp_path / "llm", model_type, **config)
    model, processor = assemble(tmp_path / "llm")
    expected = source(IDS).logits
    torch.testing.assert_close(model(IDS).logits[..., :70], expected, atol=1e-5, rtol=0)
    assert not any(parameter.is_meta for parameter in model.parameters())

    model.save_pretrained(tmp_path / "puma")
    processor.save_pretrained(tmp_path / "puma")
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "puma", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(IDS).logits[..., :70], expected, atol=1e-5, rtol=0)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == is_tied
    assert not loaded.config.text_config._name_or_path and not loaded.config.vision_config._name_or_path

    prompt = AutoProcessor.from_pretrained(tmp_path / "puma").prepare_generation(["a red cat"])
    features = loaded.generate_image_features(**prompt, scale=1)
    assert {scale: tuple(f.shape) for scale, f in features.items()} == {2: (1, 1, 32), 1: (1, 4, 32)}


def test_vocabulary(tmp_path):
    """6 tokens in 70 rows: 227 more tokens take 163 more rows, and 23 that only pad to a multiple of 64."""
    source = save_language_model(tmp_path, "llama", **TEXT)
    model, processor = assemble(tmp_path)
    assert len(processor.tokenizer) == 6 + 227
    assert model.config.text_config.vocab_size == 256
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (256, 32)
    assert (processor.image_start_token_id, processor.image_end_token_id, processor.image_token_id) == (6, 7, 8)
    assert model.config.image_start_token_id == 6 and model.config.image_token_id == 8
    assert model.config.num_scales == 3 and processor.image_seq_length == model.config.image_seq_length == 21
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token == "</s>"

    for old, new in ((source.get_input_embeddings(), model.get_input_embeddings()), (source.lm_head, model.lm_head)):
        torch.testing.assert_close(new.weight[:70], old.weight, atol=0, rtol=0)
        # Drawn around the mean of the old rows.
        mean = old.weight.mean(0)
        assert (new.weight[70:] - mean).norm(dim=1).max() < old.weight.norm(dim=1).mean()


def test_rows_beyond_the_tokenizer_are_kept(tmp_path):
    save_language_model(tmp_path, "llama", **{**TEXT, "vocab_size": 500})
    model, _ = assemble(tmp_path)
    assert model.config.text_config.vocab_size == 512


def test_new_heads_start_small_and_unbiased(tmp_path):
    save_language_model(tmp_path, "llama", **TEXT)
    model, _ = assemble(tmp_path)
    for linear in (model.model.projector, model.image_head):
        assert linear.bias.abs().max() == 0
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_number_format_is_the_language_models(tmp_path):
    save_language_model(tmp_path / "llm", "llama", dtype=torch.bfloat16, **TEXT)
    model, _ = assemble(tmp_path / "llm")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "puma")
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "puma").dtype == torch.bfloat16


def test_generation_ends_where_the_language_model_does(tmp_path):
    source = save_language_model(tmp_path, "llama", **TEXT)
    source.generation_config.update(eos_token_id=[2, 5], temperature=0.6, do_sample=True)
    source.generation_config.save_pretrained(tmp_path)
    config = assemble(tmp_path)[0].generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 2)
    assert config.suppress_tokens == [6, 7, 8]
    assert not config.do_sample


def test_chat_template_of_the_language_model_is_not_pumas(tmp_path):
    save_language_model(tmp_path / "llm", "llama", **TEXT)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'another format' }}"
    tokenizer.save_pretrained(tmp_path / "llm")
    model, processor = assemble(tmp_path / "llm")
    processor.save_pretrained(tmp_path / "puma")
    model.save_pretrained(tmp_path / "puma")
    loaded = AutoProcessor.from_pretrained(tmp_path / "puma")
    message = {"role": "user", "content": "cat"}
    assert loaded.chat_template == processor.chat_template
    assert loaded.apply_chat_template([message]).endswith("USER: cat")
    assert loaded.tokenizer.apply_chat_template([message], tokenize=False).endswith("USER: cat")


def test_language_model_without_bos(tmp_path):
    """Qwen's tokenizers have none; then a row starts with its first token."""
    save_language_model(tmp_path, "qwen3", **{**QWEN, "bos_token_id": None})
    make_tokenizer(bos_token=None).save_pretrained(tmp_path)
    model, processor = assemble(tmp_path)
    assert model.generation_config.bos_token_id is None
    prompt = processor.prepare_generation(["a cat"])
    assert prompt["input_ids"].tolist() == [[3, 5, 6]]
    assert model.generate_image_features(**prompt, scale=2)[2].shape == (1, 1, 32)


T5 = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 70}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 70}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


@pytest.mark.parametrize(
    ("model_type", "auto", "config", "message"),
    [
        ("t5", AutoModel, T5, "an encoder-decoder model .t5."),
        ("clip_vision_model", AutoModel, VISION, "of type clip_vision_model, which writes no text"),
        ("bert", AutoModelForCausalLM, LAYERS, ".bert. is not causal"),
        ("bart", AutoModelForCausalLM, BART, ".bart. is no decoder-only model"),
        ("mamba", AutoModelForCausalLM, MAMBA, "no cache of keys and values"),
        ("gemma2", AutoModelForCausalLM, GEMMA, "by more than one Linear without bias"),
        ("granite", AutoModelForCausalLM, {**TEXT, "logits_scaling": 2.0}, "by more than one Linear without bias"),
        ("gemma4_text", AutoModelForCausalLM, GEMMA4, "cannot read embeddings in place of tokens"),
        ("phi", AutoModelForCausalLM, TEXT, "by more than one Linear without bias"),
    ],
)
def test_other_models_are_refused(tmp_path, model_type, auto, config, message):
    save_language_model(tmp_path, model_type, auto, **config)
    with pytest.raises(ValueError, match=message):
        load_language_model(str(tmp_path))


def test_incomplete_weights_are_refused(tmp_path):
    model = save_language_model(tmp_path, "llama", **TEXT)
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lack 1 entries, such as model.layers.1.mlp.up_proj.weight"):
        load_language_model(str(tmp_path))


def test_weights_of_another_shape_are_refused(tmp_path):
    save_language_model(tmp_path, "llama", **TEXT)
    config = AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 64
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight has shape \(32, 48\), not \(32, 64\)"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(("shard_size", "files"), [("1GB", 1), ("20KB", 6)])
def test_cut_off_weights_are_named_before_any_is_read(tmp_path, shard_size, files):
    model = save_language_model(tmp_path, "llama", **TEXT)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is no complete safetensors file"):
        require_language_model(str(tmp_path))


def test_pickled_code_is_refused(tmp_path):
    save_language_model(tmp_path, "llama", **TEXT)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": pytest.fail}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"the weights of {tmp_path} cannot be read: it holds something else"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}'])
def test_damaged_tokenizer_is_refused(tmp_path, content):
    save_language_model(tmp_path, "llama", **TEXT)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"the tokenizer of {tmp_path} cannot be read"):
        load_language_model(str(tmp_path))


def test_impossible_config_is_refused(tmp_path):
    save_language_model(tmp_path, "llama", **TEXT)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TEXT, "num_attention_heads": 5}))
    with pytest.raises(ValueError, match=f"the config of {tmp_path} describes no model: .*not a multiple"):
        load_language_model(str(tmp_path))


def same_encoder(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    weights = right.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in left.state_dict().items())


class TestEncoder:
    def test_vision_model(self, tmp_path):
        make_vision().save_pretrained(tmp_path)
        vision, image_processor = load_encoder(str(tmp_path))
        assert same_encoder(vision, make_vision()) and not vision.training
        assert dict(image_processor.size) == {"height": 16, "width": 16}
        assert image_processor.image_mean == PumaImageProcessor().image_mean

    def test_whole_clip(self, tmp_path):
        config = AutoConfig.for_model("clip", text_config={**LAYERS, "vocab_size": 70}, vision_config=VISION)
        clip = CLIPModel(config)
        clip.save_pretrained(tmp_path)
        vision, _ = load_encoder(str(tmp_path))
        assert isinstance(vision, CLIPVisionModel)
        pixels = torch.randn(1, 3, 16, 16)
        expected = clip.eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(vision(pixels).last_hidden_state, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("image_processor_class", [CLIPImageProcessor, CLIPImageProcessorPil])
    def test_published_preprocessing_gives_mean_and_deviation_only(self, tmp_path, image_processor_class):
        make_vision().save_pretrained(tmp_path)
        image_processor_class(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
        _, image_processor = load_encoder(str(tmp_path))
        assert isinstance(image_processor, PumaImageProcessor)
        assert [*image_processor.image_mean, *image_processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        assert image_processor.resample == PumaImageProcessor.resample and not image_processor.do_center_crop

    def test_of_a_puma(self, tmp_path):
        save_language_model(tmp_path / "llm", "llama", **TEXT)
        model, processor = assemble(tmp_path / "llm")
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        model.save_pretrained(tmp_path / "puma")
        processor.save_pretrained(tmp_path / "puma")
        vision, image_processor = load_encoder(str(tmp_path / "puma"))
        assert same_encoder(vision, model.model.vision_tower)
        assert tuple(image_processor.image_mean) == (0.1, 0.2, 0.3)

    def test_damaged_weights_are_named(self, tmp_path):
        make_vision().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors is no complete safetensors file"):
            load_encoder(str(tmp_path))

    def test_other_models_are_refused(self, tmp_path):
        save_language_model(tmp_path, "llama", **TEXT)
        with pytest.raises(ValueError, match="of type llama: expected a CLIP encoder"):
            load_encoder(str(tmp_path))

    @pytest.mark.parametrize("name", ["open_clip:", "open_clip:ViT-L-14", "open_clip:/openai", "open_clip:ViT-L-14/"])
    def test_open_clip_needs_both_names(self, name):
        with pytest.raises(ValueError, match="must be open_clip:ARCH/TAG"):
            load_encoder(name)
