"""What is pushed to the Hub comes back bit by bit, and loads with `trust_remote_code` where PUMA is not installed.

Each test runs `python -m tests.test_hub_round_trip CHECK FOLDER`, with a cache of its own. The parts are small and
built anew from a seed wherever they are compared.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.hub_server import HubServer

PACKAGES = ("transformers_puma", "diffusers_puma")
NAMES = ("puma", "pipeline", "lora", "decoder-lora", "trained")
MODEL, PIPELINE, LORA, DECODER_LORA, TRAINED = (f"tester/{name}" for name in NAMES)
TEXT = "<image> a cat"


def build_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from transformers_puma import PumaImageProcessor, PumaProcessor, add_puma_tokens

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "cat", "USER", "ASSISTANT", ":"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    add_puma_tokens(tokenizer, num_location_tokens=8)
    image_processor = PumaImageProcessor(size={"height": 32, "width": 32}, image_std=[0.5, 0.4, 0.3])
    return PumaProcessor(image_processor, tokenizer, image_seq_length=21, num_location_tokens=8)


def build_model():
    from transformers_puma import PumaConfig, PumaForConditionalGeneration

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    processor = build_processor()
    config = PumaConfig(
        text_config={"model_type": "llama", "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, **layers},
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **layers},
        num_scales=3,
        scale_loss_weights=[1, 2, 5],
        num_location_tokens=8,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    return PumaForConditionalGeneration(config).eval()


def build_pipeline():
    from diffusers import AutoencoderKL, DDPMScheduler

    from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel

    mllm = build_model()
    unets = {}
    for scale, num_tokens in enumerate(mllm.config.tokens_per_scale):
        unets[f"unet_{scale}"] = PumaUNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=16,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            num_tokens=num_tokens,
            use_position_table=scale == 0,
        )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.3)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    return PumaPipeline(
        vae=vae, scheduler=scheduler, mllm=mllm, processor=build_processor(), default_num_inference_steps=2, **unets
    )


def build_adapter(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    target_modules = r".*language_model.*\.(q_proj|v_proj)"
    return get_peft_model(model, LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False))


def build_decoder_lora() -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model_state_dict

    unet = build_pipeline().unet_1
    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return get_peft_model_state_dict(unet)


def picture():
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").rotate(30)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, value in expected.items()
        if found[name].dtype != value.dtype or not torch.equal(found[name], value)
    ]
    assert not different


def assert_same_processor(found, expected) -> None:
    for name in ("image_seq_length", "num_location_tokens", "chat_template"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.tokenizer.padding_side == expected.tokenizer.padding_side == "left"
    assert found.tokenizer.backend_tokenizer.to_str() == expected.tokenizer.backend_tokenizer.to_str()
    arguments = {"images": [picture()], "text": TEXT, "return_tensors": "pt"}
    assert_equal(dict(found(**arguments)), dict(expected(**arguments)))


def train(folder: Path):
    """One step that pushes its checkpoint, and nothing after it."""
    from transformers_puma.training import PumaTrainer, PumaTrainingArguments

    pushing = {"push_to_hub": True, "hub_model_id": TRAINED, "hub_strategy": "all_checkpoints"}
    arguments = PumaTrainingArguments(
        str(folder / "training"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, **pushing
    )
    rows = [{"prompt": "a cat", "completion": "<image>", "images": [picture()]}]
    trainer = PumaTrainer(build_model(), arguments, processing_class=build_processor(), train_dataset=rows)
    trainer.train()
    trainer._finish_current_push()
    return trainer.model


def generate(model, processor) -> dict[str, torch.Tensor]:
    """Inputs and output of one generation of features."""
    inputs = processor(images=[picture()], text=TEXT, generation_mode="image", return_tensors="pt")
    features = model.generate_image_features(**inputs, scale=1)
    return {**inputs, **{f"features_{scale}": value for scale, value in features.items()}}


def check_push(folder: Path) -> None:
    """Also saves below `folder` the model, the pipeline and what they compute, for `check_remote_code`."""
    from huggingface_hub import HfApi, snapshot_download
    from safetensors.torch import save_file
    from transformers import AutoModelForMultimodalLM

    from diffusers_puma import PumaPipeline
    from transformers_puma.training.checkpoints import missing_files

    trained = train(folder)
    assert missing_files(Path(snapshot_download(TRAINED), "checkpoint-1")) == []
    save_file(trained.state_dict(), folder / "trained.safetensors")

    model, processor, pipeline = build_model(), build_processor(), build_pipeline()
    model.push_to_hub(MODEL)
    processor.push_to_hub(MODEL)
    pipeline.push_to_hub(PIPELINE)
    build_adapter(AutoModelForMultimodalLM.from_pretrained(MODEL)).push_to_hub(LORA)
    PumaPipeline.save_lora_weights(folder / "lora", {1: build_decoder_lora()})
    api = HfApi()
    api.create_repo(DECODER_LORA)
    api.upload_folder(repo_id=DECODER_LORA, folder_path=folder / "lora")

    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    pipeline.save_pretrained(folder / "pipeline", variant="fp16", max_shard_size="40KB")
    save_file(generate(model, processor), folder / "generated.safetensors")


def check_reload(folder: Path) -> None:
    """In-process: every Auto class, both pipeline classes and both kinds of adapter, from Hub ids."""
    from diffusers import DiffusionPipeline
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )

    from diffusers_puma import PumaPipeline
    from transformers_puma import PumaForConditionalGeneration, PumaModel, PumaProcessor

    model, processor, pipeline = build_model(), build_processor(), build_pipeline()
    for repo in (MODEL, PIPELINE):
        for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText):
            found = auto_class.from_pretrained(repo)
            assert type(found) is PumaForConditionalGeneration
            assert_equal(found.state_dict(), model.state_dict())
            assert found.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
        found, loading_info = AutoModel.from_pretrained(repo, output_loading_info=True)
        assert type(found) is PumaModel and not loading_info["missing_keys"]
        assert_equal(found.state_dict(), model.model.state_dict())
        found = AutoProcessor.from_pretrained(repo)
        assert type(found) is PumaProcessor
        assert_same_processor(found, processor)
        assert len(AutoTokenizer.from_pretrained(repo)) == len(processor.tokenizer)

    adapted = build_adapter(build_model())
    found = PeftModel.from_pretrained(build_model(), LORA)
    assert_equal(get_peft_model_state_dict(found), get_peft_model_state_dict(adapted))
    found = AutoModelForMultimodalLM.from_pretrained(LORA)  # reads the adapter's base model too
    inputs = processor(images=[picture()], text=TEXT, return_tensors="pt")
    torch.testing.assert_close(found(**inputs).logits, adapted(**inputs).logits)
    assert not torch.allclose(found(**inputs).logits, model(**inputs).logits)

    request = {"prompt": "a cat", "scale": "all", "output_type": "pt"}
    expected = pipeline(**request, generator=torch.Generator().manual_seed(0)).images
    for pipeline_class in (PumaPipeline, DiffusionPipeline):
        found = pipeline_class.from_pretrained(PIPELINE)
        assert type(found) is PumaPipeline and found.scales == [0, 1, 2]
        assert found.config.default_num_inference_steps == 2
        assert type(found.scheduler) is type(pipeline.scheduler)
        settings = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
        assert settings.items() <= found.scheduler.config.items()
        assert_same_processor(found.processor, processor)
        for name in ("mllm", "vae", "unet_0", "unet_1", "unet_2"):
            assert_equal(getattr(found, name).state_dict(), getattr(pipeline, name).state_dict())
        images = found(**request, generator=torch.Generator().manual_seed(0)).images
        torch.testing.assert_close(images, expected)
        assert found.mllm.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()

    found.load_lora_weights(DECODER_LORA, scale=1)
    assert_equal(get_peft_model_state_dict(found.unet_1, adapter_name="default_0"), build_decoder_lora())

    cache = folder / "one-decoder"
    assert PumaPipeline.from_pretrained(PIPELINE, scales=[1], cache_dir=cache).scales == [1]
    weights = {path.parent.name for path in cache.rglob("*.safetensors")}
    assert weights == {"mllm", "vae", "unet_1"}


def check_remote_code(folder: Path) -> None:
    """The Auto classes from saved folders and Hub ids, in a process where neither package can be imported."""
    sys.meta_path.insert(0, Absent())
    for package in PACKAGES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(package)
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    expected = load_file(folder / "model" / "model.safetensors")
    trained = AutoModelForMultimodalLM.from_pretrained(TRAINED, trust_remote_code=True)
    assert_equal(trained.state_dict(), load_file(folder / "trained.safetensors"))
    bare = {name.removeprefix("model."): value for name, value in expected.items() if name.startswith("model.")}
    generated = load_file(folder / "generated.safetensors")
    assert len(list((folder / "pipeline" / "mllm").glob("model.fp16-*.safetensors"))) > 1
    for source, variant in ((folder / "model", None), (folder / "pipeline", "fp16"), (MODEL, None), (PIPELINE, None)):
        for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText):
            model = auto_class.from_pretrained(source, trust_remote_code=True, variant=variant)
            assert type(model).__name__ == "PumaForConditionalGeneration"
            assert type(model).__module__.startswith("transformers_modules.")
            assert_equal(model.state_dict(), expected)
        bare_model = AutoModel.from_pretrained(source, trust_remote_code=True, variant=variant)
        assert type(bare_model).__name__ == "PumaModel"
        assert_equal(bare_model.state_dict(), bare)

        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        assert type(processor).__name__ == "PumaProcessor"
        torch.testing.assert_close(generate(model, processor), generated)
    assert not any(name.startswith(PACKAGES) for name in sys.modules)


class Absent:
    """First in `sys.meta_path`: hides the packages however they are installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, folder):
    """A server that `check_push` has pushed to."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.run("tests.test_hub_round_trip", "check_push", str(folder))
        yield hub


@pytest.mark.parametrize("check", [check_reload, check_remote_code], ids=lambda check: check.__name__)
def test_hub_round_trip(check, folder, hub):
    hub.run("tests.test_hub_round_trip", check.__name__, str(folder))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
