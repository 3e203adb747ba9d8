"""`puma init` on tiny stand-ins: what it makes loads everywhere, computes what its parts did, and trains."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel, convert_released_decoders
from diffusers_puma.initialization import HUB_FILES, initialize_puma
from diffusers_puma.training import PumaDecoderTrainer, PumaDecoderTrainingArguments
from diffusers_puma.unet_puma import initial_position_table
from puma_cli import main
from transformers_puma import PumaForConditionalGeneration, PumaModel
from transformers_puma.training import PumaTrainer, PumaTrainingArguments

RELEASE = Path(__file__).parents[1] / "parity" / "data" / "official_release_tiny"
ENCODER = RELEASE / "ckpts" / "clip-vit-large-patch14"
PICTURE = Image.open(RELEASE / "input.png").convert("RGB")
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 70, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **LAYERS}
LANGUAGE_MODELS = {
    "llama": TEXT,
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, **TEXT},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8, **TEXT},
}
IDS = torch.tensor([[1, 3, 4, 5, 3, 2]])


def make_language_model(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **LANGUAGE_MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "red", "cat"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return model


def make_plain_pipeline(folder: Path, dtype: torch.dtype = torch.float32, **unet_changes) -> UNet2DConditionModel:
    """An SDXL without its text encoders: a UNet with the embedding of text and size, a VAE, Euler's scheduler."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 16,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
            **unet_changes,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    without_text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **without_text)
    pipe.to(dtype).save_pretrained(folder)
    return unet


def load_quietly(folder: Path, **kwargs) -> PumaPipeline:
    pipe = PumaPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(report) -> dict[str, str]:
    return {part.name: part.state for part in report.parts}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_language_model(folder)
    return folder


@pytest.fixture(scope="module")
def full_model(tmp_path_factory, llama) -> Path:
    """Llama and the release's decoders."""
    out = tmp_path_factory.mktemp("init") / "puma"
    initialize_puma(llama, ENCODER, RELEASE, out)
    return out


def train_one_step(folder: Path, out: Path) -> PumaForConditionalGeneration:
    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    rows = [{"prompt": "a red cat", "completion": "<image>", "images": [PICTURE]}] * 2
    args = PumaTrainingArguments(
        output_dir=out, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[]
    )
    trainer = PumaTrainer(model, args, train_dataset=rows, processing_class=processor)
    assert trainer.train().training_loss > 0
    return model


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_with_released_decoders(tmp_path, model_type):
    source = make_language_model(tmp_path / "llm", model_type)
    out = tmp_path / "models" / "puma"
    report = initialize_puma(str(tmp_path / "llm"), str(ENCODER), str(RELEASE), str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "models"]
    assert [path.name for path in out.parent.iterdir()] == ["puma"]

    mllm = AutoModelForMultimodalLM.from_pretrained(out).eval()
    assert isinstance(mllm, PumaForConditionalGeneration)
    with torch.no_grad():
        torch.testing.assert_close(mllm(IDS).logits[..., :70], source(IDS).logits, atol=1e-5, rtol=0)
    assert isinstance(AutoModel.from_pretrained(out), PumaModel)
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(text="<image> a red cat", images=[PICTURE], return_tensors="pt")
    assert inputs["input_ids"].eq(mllm.config.image_token_id).sum() == 341

    pipe = load_quietly(out)
    assert pipe.scales == [0, 1, 2, 3, 4] and isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe("a red cat", num_inference_steps=1).images[0].size == (64, 64)
    assert pipe("a cat", PICTURE, scale=4, num_inference_steps=1).image_features.keys() == {4}

    trained = train_one_step(out, tmp_path / "training")
    before, after = dict(mllm.named_parameters()), dict(trained.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "vision_tower" not in name}
    # The report's claim about what is trained by default.
    counts = {part.name: part.num_parameters for part in report.parts if part.state.endswith("trained by default")}
    assert sum(counts.values()) == sum(before[name].numel() for name in changed)
    assert counts["token rows"] == (256 - 70) * 32 * (1 if model_type == "gemma" else 2)


def test_decodes_as_the_converted_release(tmp_path, full_model):
    convert_released_decoders(RELEASE, tmp_path / "converted")
    pipes = [load_quietly(tmp_path / "converted"), load_quietly(full_model)]
    for scale in (0, 3):
        first, second = (
            pipe(
                image=PICTURE,
                scale=scale,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
            for pipe in pipes
        )
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_report(tmp_path, llama):
    report = initialize_puma(llama, ENCODER, RELEASE, tmp_path / "out")
    assert states(report) == {
        "language model": "pretrained, trained by default",
        "token rows": "new, trained by default",
        "projector": "new, trained by default",
        "image head": "new, trained by default",
        "encoder": "pretrained, frozen",
        **{f"unet_{scale}": "pretrained for this encoder" for scale in range(5)},
        "vae": "pretrained, frozen",
    }
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    counts = {part.name: part.num_parameters for part in report.parts}
    assert (
        sum(count for name, count in counts.items() if "unet" not in name and name != "vae") == model.num_parameters()
    )
    assert counts["projector"] == counts["image head"] == 33 * 32
    text = str(report)
    assert text.startswith(f"{tmp_path / 'out'} is ready for training:")
    assert f"{llama} (llama, float32)" in text and "227 new tokens in 186 new rows" in text
    assert len(text.splitlines()) == 1 + 1 + len(report.parts) + 1


def test_language_model_alone(tmp_path, llama):
    report = initialize_puma(llama, ENCODER, None, tmp_path / "out")
    assert not any("unet" in part.name for part in report.parts)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), PumaModel)
    train_one_step(tmp_path / "out", tmp_path / "training")


def test_half_precision_is_kept(tmp_path):
    make_language_model(tmp_path / "llm", dtype=torch.bfloat16)
    make_plain_pipeline(tmp_path / "plain", torch.float16)
    report = initialize_puma(tmp_path / "llm", ENCODER, tmp_path / "plain", tmp_path / "out")
    assert "The encoder was float32 and is bfloat16 now." in str(report)
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    weights = load_file(tmp_path / "out" / "unet_0" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama):
    """A folder with decoders from a plain pipeline, its report, and the plain UNet."""
    folder = tmp_path_factory.mktemp("plain")
    stock = make_plain_pipeline(folder / "plain")
    return folder / "out", initialize_puma(llama, ENCODER, folder / "plain", folder / "out"), stock


class TestPlainDecoders:
    def test_each_starts_as_the_plain_unet(self, made):
        out, _, stock = made
        weights = {name: w for name, w in stock.state_dict().items() if not name.startswith("add_embedding.")}
        assert len(weights) < len(stock.state_dict())
        projections = []
        for scale, num_tokens in enumerate([256, 64, 16, 4, 1]):
            decoder = PumaUNet2DConditionModel.from_pretrained(out / f"unet_{scale}")
            new = {"encoder_hid_proj.weight", "encoder_hid_proj.bias", *(["position_table"] if scale == 0 else [])}
            assert decoder.state_dict().keys() == weights.keys() | new
            assert all(torch.equal(decoder.state_dict()[name], weight) for name, weight in weights.items())
            assert decoder.config.num_tokens == num_tokens and decoder.config.encoder_hid_dim == 32
            projections.append(decoder.encoder_hid_proj.weight)
            if scale == 0:
                torch.testing.assert_close(decoder.position_table, initial_position_table(256, 16))
        assert not torch.equal(projections[0], projections[1])

    def test_computes_as_the_plain_unet_on_projected_features(self, made):
        out, _, stock = made
        decoder = PumaUNet2DConditionModel.from_pretrained(out / "unet_2").eval()
        sample, features = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
        with torch.no_grad():
            states = decoder.project_features(features)
            # The plain UNet always adds its embedding of text and size; without it, it is the decoder.
            stock.add_embedding.linear_2.weight.zero_()
            stock.add_embedding.linear_2.bias.zero_()
            condition = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
            expected = stock.eval()(sample, 10, states, added_cond_kwargs=condition).sample
            torch.testing.assert_close(decoder(sample, 10, features).sample, expected, atol=1e-5, rtol=0)

    def test_report_says_that_they_must_be_trained(self, made):
        out, report, _ = made
        assert states(report)["unet_4"] == "plain UNet with a new feature projection, must be trained"
        assert states(report)["vae"] == "pretrained, frozen"

    def test_pipeline_runs(self, made):
        pipe = load_quietly(made[0])
        assert isinstance(pipe.scheduler, DDPMScheduler)
        assert pipe.scheduler.config.beta_schedule == "scaled_linear" and pipe.scheduler.config.steps_offset == 1
        images = pipe(image=PICTURE, scale="all", num_inference_steps=1).images
        assert {scale: image[0].size for scale, image in images.items()} == dict.fromkeys(range(5), (16, 16))

    def test_decoder_trains(self, made, tmp_path):
        pipe = load_quietly(made[0], scales=[0])
        features = pipe.encode_image([PICTURE])[0]
        rows = [{"latents": torch.randn(4, 8, 8), "features": features[0]}] * 2
        args = PumaDecoderTrainingArguments(output_dir=tmp_path, max_steps=1, use_cpu=True, report_to=[])
        before = pipe.unet_0.position_table.detach().clone()
        trainer = PumaDecoderTrainer(
            pipe.unet_0,
            args,
            noise_scheduler=pipe.scheduler,
            null_features=pipe.black_image_features()[0],
            train_dataset=rows,
        )
        assert trainer.train().training_loss > 0
        assert not torch.equal(pipe.unet_0.position_table, before)

    def test_inpainting_unet_is_refused(self, tmp_path, llama):
        make_plain_pipeline(tmp_path / "plain", in_channels=9)
        with pytest.raises(ValueError, match="takes 9 channels, but the VAE's latents have 4"):
            initialize_puma(llama, ENCODER, tmp_path / "plain", tmp_path / "out")

    def test_weights_that_do_not_fit_are_refused(self, tmp_path, llama):
        make_plain_pipeline(tmp_path / "plain")
        file = tmp_path / "plain" / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_per_block": 2}))
        with pytest.raises(ValueError, match="plain/unet do not fit its config: down_blocks.0.resnets.1"):
            initialize_puma(llama, ENCODER, tmp_path / "plain", tmp_path / "out")


class TestSavedPipeline:
    def test_decoders_of_a_full_model_and_its_encoder(self, tmp_path, full_model):
        """Another language model in front of the same decoders."""
        make_language_model(tmp_path / "llm", "qwen3")
        report = initialize_puma(tmp_path / "llm", full_model, full_model, tmp_path / "out")
        assert states(report)["unet_0"] == "pretrained for this encoder"
        pipe = load_quietly(tmp_path / "out")
        assert pipe.mllm.config.text_config.model_type == "qwen3" and pipe.scales == [0, 1, 2, 3, 4]
        original = load_file(full_model / "unet_0" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(pipe.unet_0.state_dict()[name], weight) for name, weight in original.items())

    def test_some_decoders_another_scheduler_and_an_encoder_beside_them(self, tmp_path, llama):
        convert_released_decoders(RELEASE, tmp_path / "converted")
        source = PumaPipeline.from_pretrained(tmp_path / "converted", scales=[1, 3], default_num_inference_steps=7)
        source.scheduler = EulerDiscreteScheduler.from_config(source.scheduler.config)
        source.save_pretrained(tmp_path / "source")
        report = initialize_puma(llama, ENCODER, tmp_path / "source", tmp_path / "out")
        assert states(report)["unet_3"] == "pretrained for this encoder"
        pipe = load_quietly(tmp_path / "out")
        assert pipe.scales == [1, 3] and isinstance(pipe.scheduler, EulerDiscreteScheduler)
        assert pipe.config.default_num_inference_steps == 7 and pipe.image_encoder is None

    def test_decoders_without_any_encoder(self, tmp_path, llama):
        convert_released_decoders(RELEASE, tmp_path / "source")
        index = json.loads((tmp_path / "source" / "model_index.json").read_text())
        (tmp_path / "source" / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
        shutil.rmtree(tmp_path / "source" / "image_encoder")
        report = initialize_puma(llama, ENCODER, tmp_path / "source", tmp_path / "out")
        assert states(report)["unet_3"] == "pretrained, for the encoder that it was trained with"

    def test_another_encoder_of_the_same_size(self, tmp_path, llama):
        torch.manual_seed(5)
        CLIPVisionModel(AutoConfig.from_pretrained(ENCODER)).save_pretrained(tmp_path / "vision")
        report = initialize_puma(llama, tmp_path / "vision", RELEASE, tmp_path / "out")
        assert states(report)["unet_3"] == "pretrained for another encoder, must be trained again"


def test_what_is_downloaded_of_a_source():
    release = [path.relative_to(RELEASE).as_posix() for path in RELEASE.rglob("*") if path.is_file()]
    read = [
        *(path for path in release if path.startswith("ckpts/")),
        *("model_index.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"),
        *(
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet_3/diffusion_pytorch_model.safetensors",
        ),
        *("unet_3/diffusion_pytorch_model-00001-of-00002.safetensors", "image_encoder/model.safetensors"),
    ]
    ignored = [
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx", "vae_1_0/config.json", "README.md"),
        *("text_encoder/model.safetensors", "mllm/model.safetensors", "sd_xl_base_1.0.safetensors"),
        "ckpts/stable-diffusion-xl-base-1.0/unet/diffusion_pytorch_model.safetensors",
    ]
    assert list(filter_repo_objects([*read, *ignored], allow_patterns=HUB_FILES)) == read


def test_grid_of_8_has_four_scales(tmp_path, llama):
    config = AutoConfig.from_pretrained(ENCODER, image_size=32, patch_size=4)
    CLIPVisionModel(config).save_pretrained(tmp_path / "vision")
    make_plain_pipeline(tmp_path / "plain")
    initialize_puma(llama, tmp_path / "vision", tmp_path / "plain", tmp_path / "out")
    pipe = load_quietly(tmp_path / "out")
    assert pipe.scales == [0, 1, 2, 3] and pipe.mllm.config.tokens_per_scale == [64, 16, 4, 1]
    assert pipe.unet_0.config.use_position_table and pipe.unet_0.position_table.shape == (1, 64, 16)


class TestMistakes:
    """Each raises before anything is left on the disk."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert not [path for path in tmp_path.rglob("*") if "out" in path.name and path.suffix != ".py"]

    @pytest.mark.parametrize(
        ("changes", "gives"),
        [
            ({"hidden_size": 64}, "256 tokens of 64 channels"),
            ({"image_size": 112}, "64 tokens of 32 channels"),
        ],
    )
    @pytest.mark.parametrize("source", ["release", "full_model"])
    def test_decoders_of_another_encoder(self, tmp_path, llama, full_model, source, changes, gives):
        CLIPVisionModel(AutoConfig.from_pretrained(ENCODER, **changes)).save_pretrained(tmp_path / "vision")
        decoders = RELEASE if source == "release" else full_model
        takes = "the decoder of scale 0 in .* takes 256 tokens of 32 channels"
        with pytest.raises(ValueError, match=f"{takes}, but the encoder gives {gives} at that scale"):
            initialize_puma(llama, tmp_path / "vision", decoders, tmp_path / "out")

    def test_pipeline_without_one_of_its_decoders(self, tmp_path, llama, full_model):
        shutil.copytree(full_model, tmp_path / "source")
        shutil.rmtree(tmp_path / "source" / "unet_2")
        with pytest.raises(FileNotFoundError, match="unet_2/config.json is missing"):
            initialize_puma(llama, ENCODER, tmp_path / "source", tmp_path / "out")

    def test_folder_without_decoders(self, tmp_path, llama):
        with pytest.raises(ValueError, match="holds no decoders: expected ckpts/stable-diffusion"):
            initialize_puma(llama, ENCODER, llama, tmp_path / "out")

    @pytest.mark.parametrize("part", ["llm", "vision", "decoders"])
    def test_no_such_folder(self, tmp_path, llama, part):
        sources = {"llm": llama, "vision": ENCODER, "decoders": RELEASE, part: tmp_path / "missing"}
        with pytest.raises((OSError, ValueError), match="missing"):
            initialize_puma(**sources, out=tmp_path / "out")

    def test_incomplete_release(self, tmp_path, llama):
        shutil.copytree(RELEASE, tmp_path / "release")
        shutil.rmtree(tmp_path / "release" / "ckpts" / "stable-diffusion-xl-base-1.0" / "unet_4")
        with pytest.raises(FileNotFoundError, match="unet_4 is missing"):
            initialize_puma(llama, ENCODER, tmp_path / "release", tmp_path / "out")


def test_existing_folder(tmp_path, llama):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out must be a new or an empty folder"):
        initialize_puma(llama, ENCODER, None, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    initialize_puma(llama, ENCODER, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


class TestCommand:
    def test_init(self, tmp_path, llama, capsys):
        arguments = ["--llm", llama, "--vision", ENCODER, "--decoders", RELEASE, "--out", tmp_path / "out"]
        assert main(["init", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{tmp_path / 'out'} is ready for training:") and "new, trained by default" in out
        assert "converted the 256-token decoder" in err and "unet_4 is in place" in err
        assert load_quietly(tmp_path / "out", scales=[4]).scales == [4]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--vision": "open_clip:ViT-L-14"}, "must be open_clip:ARCH/TAG"),
            ({"--vision": "open_clip:ViT-Q-14/openai"}, "no architecture 'ViT-Q-14'"),
            ({"--llm": str(ENCODER)}, "which writes no text"),
            ({"--decoders": "./missing"}, "--decoders ./missing: no such model folder"),
            ({"--out": str(RELEASE)}, "must be a new or an empty folder"),
        ],
    )
    def test_mistakes(self, tmp_path, llama, capsys, changes, message):
        arguments = {"--llm": str(llama), "--vision": str(ENCODER), "--decoders": str(RELEASE)}
        arguments |= {"--out": str(tmp_path / "out")} | changes
        assert main(["init", *(word for pair in arguments.items() for word in pair)]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1
        assert err.startswith("puma: error:") and message in err

    def test_open_clip_is_not_installed(self, tmp_path, llama, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        arguments = ["--llm", str(llama), "--vision", "open_clip:ViT-L-14/openai", "--out", str(tmp_path / "out")]
        assert main(["init", *arguments]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "pip install 'puma-hub[train]'" in err
