"""Folders that `PumaPipeline` saves, through every loader that should read them, and LoRA files."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel as AutoDiffusersModel
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from diffusers_puma.folders import new_folder
from tests.hub_server import HubServer
from transformers_puma import PumaForConditionalGeneration, PumaModel, PumaProcessor

MODULES = ("vae", "mllm", "image_encoder", "unet_0", "unet_1", "unet_2", "unet_3", "unet_4")


def assert_same_pipeline(found: PumaPipeline, expected: PumaPipeline) -> None:
    assert type(found) is PumaPipeline
    for name in MODULES:
        assert (getattr(found, name) is None) == (getattr(expected, name) is None), name
        if getattr(expected, name) is not None:
            weights = getattr(found, name).state_dict()
            for key, value in getattr(expected, name).state_dict().items():
                assert torch.equal(weights[key], value), f"{name}.{key}"


def image(pipe: PumaPipeline, scale: int = 3) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    features = {scale: torch.ones(1, (256, 64, 16, 4, 1)[scale], 32)}
    generator = torch.Generator().manual_seed(0)
    return pipe(image_features=features, scale=scale, generator=generator, output_type="pt").images


class TestFolder:
    @pytest.mark.parametrize("loader", [PumaPipeline, DiffusionPipeline])
    def test_full(self, full_pipeline, tmp_path, loader):
        full_pipeline.mllm.generation_config.max_new_tokens = 17
        full_pipeline.save_pretrained(tmp_path)
        loaded = loader.from_pretrained(tmp_path)
        assert_same_pipeline(loaded, full_pipeline)
        assert type(loaded.processor) is PumaProcessor
        assert loaded.config.default_num_inference_steps == 3
        assert loaded.mllm.generation_config.max_new_tokens == 17
        assert not loaded.mllm.training and not loaded.unet_0.training
        torch.testing.assert_close(image(loaded), image(full_pipeline), atol=0, rtol=0)

    @pytest.mark.parametrize("loader", [PumaPipeline, DiffusionPipeline])
    def test_some_decoders_alone(self, decoder_pipeline, tmp_path, loader):
        decoder_pipeline.unet_0 = decoder_pipeline.unet_2 = None
        decoder_pipeline.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["unet_0"] == index["mllm"] == [None, None]
        assert index["unet_1"] == ["diffusers_puma", "PumaUNet2DConditionModel"]
        assert not (tmp_path / "config.json").exists()
        loaded = loader.from_pretrained(tmp_path)
        assert_same_pipeline(loaded, decoder_pipeline)
        assert loaded.scales == [1, 3, 4]

    def test_a_decoder_put_into_an_empty_place_is_saved(self, decoder_pipeline, tmp_path):
        decoder_pipeline.save_pretrained(tmp_path / "whole")
        loaded = PumaPipeline.from_pretrained(tmp_path / "whole", scales=[3])
        loaded.unet_1 = decoder_pipeline.unet_1
        loaded.save_pretrained(tmp_path / "two")
        assert PumaPipeline.from_pretrained(tmp_path / "two").scales == [1, 3]

    def test_reads_only_the_scales_asked_for(self, decoder_pipeline, tmp_path):
        decoder_pipeline.save_pretrained(tmp_path)
        for scale in (0, 1, 2, 4):
            shutil.rmtree(tmp_path / f"unet_{scale}")
        loaded = PumaPipeline.from_pretrained(tmp_path, scales=[3])
        assert loaded.scales == [3]
        torch.testing.assert_close(image(loaded), image(decoder_pipeline), atol=0, rtol=0)
        assert PumaPipeline.from_pretrained(tmp_path, scales=[]).scales == []
        passed = PumaPipeline.from_pretrained(tmp_path, scales=[3], unet_1=decoder_pipeline.unet_1)
        assert passed.scales == [1, 3]

    def test_scale_that_the_folder_lacks(self, decoder_pipeline, tmp_path):
        decoder_pipeline.unet_2 = None
        decoder_pipeline.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="scale 2 has no decoder here"):
            PumaPipeline.from_pretrained(tmp_path, scales=[3, 2])
        with pytest.raises(ValueError, match="scale must be 0..4.*got 5"):
            PumaPipeline.from_pretrained(tmp_path, scales=[5])

    def test_auto_model_loads_a_lone_decoder(self, decoder_pipeline, tmp_path):
        decoder_pipeline.unet_1.save_pretrained(tmp_path)
        loaded = AutoDiffusersModel.from_pretrained(str(tmp_path))
        assert type(loaded) is PumaUNet2DConditionModel and loaded.config.num_tokens == 64
        assert torch.equal(loaded.conv_in.weight, decoder_pipeline.unet_1.conv_in.weight)

    def test_components_passed_in(self, decoder_pipeline, tmp_path):
        decoder_pipeline.save_pretrained(tmp_path)
        scheduler = EulerDiscreteScheduler.from_config(decoder_pipeline.scheduler.config)
        loaded = PumaPipeline.from_pretrained(tmp_path, scheduler=scheduler, image_encoder=None)
        assert loaded.scheduler is scheduler and loaded.image_encoder is None

    def test_dtype(self, full_pipeline, tmp_path):
        full_pipeline.save_pretrained(tmp_path)
        loaded = PumaPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, scales=[4])
        assert {loaded.mllm.dtype, loaded.unet_4.dtype, loaded.vae.dtype} == {torch.bfloat16}
        loaded.set_progress_bar_config(disable=True)
        assert loaded("a", scale=4, output_type="pt").images.shape == (1, 3, 16, 16)

    def test_all_is_single_precision_where_nothing_is_said(self, full_pipeline, tmp_path):
        full_pipeline.to(torch.float16).save_pretrained(tmp_path)
        loaded = PumaPipeline.from_pretrained(tmp_path)
        assert {loaded.mllm.dtype, loaded.unet_4.dtype, loaded.vae.dtype} == {torch.float32}

    def test_variant(self, full_pipeline, tmp_path):
        full_pipeline.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
        loaded = PumaPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
        assert_same_pipeline(loaded, full_pipeline)
        model = AutoModelForMultimodalLM.from_pretrained(tmp_path, variant="bf16")
        assert torch.equal(model.image_head.weight, full_pipeline.mllm.image_head.weight)


class TestLanguageModelRoot:
    @pytest.mark.parametrize("max_shard_size", [None, "40KB"])
    def test_transformers_read_the_pipelines_root(self, full_pipeline, tmp_path, max_shard_size):
        full_pipeline.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert (len(list((tmp_path / "mllm").glob("*.safetensors"))) > 1) == (max_shard_size is not None)
        assert not list(tmp_path.glob("*.safetensors"))

        model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is PumaForConditionalGeneration
        assert not info["missing_keys"] and not info["unexpected_keys"]
        expected = full_pipeline.mllm.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        assert model.generation_config.suppress_tokens == full_pipeline.mllm.generation_config.suppress_tokens

        base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(base) is PumaModel and not info["missing_keys"]
        assert torch.equal(base.projector.weight, full_pipeline.mllm.model.projector.weight)

        processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(processor) is PumaProcessor
        expected_ids = full_pipeline.processor.prepare_generation(["a cat"])["input_ids"]
        assert torch.equal(processor.prepare_generation(["a cat"])["input_ids"], expected_ids)
        assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(full_pipeline.processor.tokenizer)

    def test_weights_that_stay_on_the_disk(self, full_pipeline, tmp_path):
        full_pipeline.save_pretrained(tmp_path)
        parts = {name: "cpu" for name, _ in full_pipeline.mllm.named_children()}
        parts |= {f"model.{name}": "cpu" for name, _ in full_pipeline.mllm.model.named_children()}
        del parts["model"]
        device_map = parts | {"model.language_model": "disk"}
        model = AutoModelForMultimodalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert model.model.language_model.norm.weight.device.type == "meta"
        prompt = full_pipeline.processor.prepare_generation(["a cat"])
        expected = full_pipeline.mllm.generate_image_features(**prompt)
        found = model.generate_image_features(**prompt)
        assert all(torch.equal(found[scale], expected[scale]) for scale in expected)

    def test_weight_index(self, full_pipeline, tmp_path):
        full_pipeline.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {"mllm/model.safetensors"}
        with safe_open(tmp_path / "mllm" / "model.safetensors", "pt") as weights:
            assert set(index["weight_map"]) == set(weights.keys())
            sizes = [weights.get_tensor(key).nbytes for key in weights.keys()]
        assert index["metadata"]["total_size"] == sum(sizes)

    def test_a_language_model_that_was_there_gives_way(self, full_pipeline, tmp_path):
        full_pipeline.mllm.save_pretrained(tmp_path, max_shard_size="40KB")
        full_pipeline.mllm.save_pretrained(tmp_path / "whole")
        (tmp_path / "whole/model.safetensors").rename(tmp_path / "model.safetensors")
        (tmp_path / "model.fp16.safetensors").touch()  # a variant that is not saved now
        with torch.no_grad():
            full_pipeline.mllm.image_head.weight += 1
        full_pipeline.save_pretrained(tmp_path)
        model = AutoModelForMultimodalLM.from_pretrained(tmp_path)
        assert torch.equal(model.image_head.weight, full_pipeline.mllm.image_head.weight)
        assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.fp16.safetensors"]

    def test_folder_holds_the_code(self, full_pipeline, tmp_path):
        full_pipeline.save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        files = {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
        assert files and all((tmp_path / file).is_file() for file in files)

    def test_generation_settings_that_a_download_left_at_the_root(self, full_pipeline, tmp_path):
        full_pipeline.mllm.generation_config.max_new_tokens = 17
        full_pipeline.save_pretrained(tmp_path)
        (tmp_path / "mllm" / "generation_config.json").unlink()
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert loaded.mllm.generation_config.max_new_tokens == 17
        loaded.mllm.generation_config.max_new_tokens = 5  # what a user sets stays
        assert PumaPipeline.from_pipe(loaded).mllm.generation_config.max_new_tokens == 5


SAVE_AND_PUSH = """
import sys
from diffusers import DiffusionPipeline
from transformers import AutoModelForMultimodalLM
from diffusers_puma import PumaPipeline

folder, copy = sys.argv[1:]
before = AutoModelForMultimodalLM.from_pretrained(folder)
before.image_head.weight.data += 1
before.push_to_hub("tester/pushed")
PumaPipeline.from_pretrained(folder).save_pretrained(copy, push_to_hub=True, repo_id="tester/pushed")
DiffusionPipeline.from_pretrained("tester/pushed").save_pretrained(f"{copy}-pipeline")
AutoModelForMultimodalLM.from_pretrained("tester/pushed").save_pretrained(f"{copy}-model")
"""


def test_save_and_push_in_one(full_pipeline, tmp_path):
    full_pipeline.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", SAVE_AND_PUSH, str(tmp_path / "saved"), str(tmp_path / "copy")]
    with HubServer(tmp_path / "hub") as hub:
        result = subprocess.run(command, env=hub.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same_pipeline(PumaPipeline.from_pretrained(tmp_path / "copy-pipeline"), full_pipeline)
    model = PumaForConditionalGeneration.from_pretrained(tmp_path / "copy-model")
    assert all(torch.equal(value, full_pipeline.mllm.state_dict()[key]) for key, value in model.state_dict().items())


def lora(pipe: PumaPipeline, scale: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """LoRA weights that change what the decoder of `scale` does; `pipe` is left without them."""
    torch.manual_seed(seed)
    unet = getattr(pipe, f"unet_{scale}")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "new")
    layers = {key: value.clone() for key, value in get_peft_model_state_dict(unet, adapter_name="new").items()}
    unet.unload_lora()
    return layers


class TestNewFolder:
    @pytest.mark.parametrize("kind", ["new", "empty", "link", "here"])
    def test_all_or_nothing(self, tmp_path, monkeypatch, kind):
        folder, real = tmp_path / "folder", tmp_path / "real"
        if kind != "new":
            real.mkdir()
            folder.symlink_to(real) if kind == "link" else real.rename(folder)
        if kind == "here":
            monkeypatch.chdir(folder)
            folder = Path(".")
        for fails in (True, False):
            with contextlib.suppress(KeyError), new_folder(folder) as work:
                (work / "part").mkdir()
                (work / "model_index.json").write_text("{}")
                if fails:
                    raise KeyError
            names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            assert names == ([] if fails else ["model_index.json", "part"])
        assert folder.is_symlink() == (kind == "link")
        with pytest.raises(FileExistsError, match="must be a new or an empty folder"), new_folder(folder):
            pass


class TestLora:
    def test_round_trip(self, decoder_pipeline, tmp_path):
        layers = {scale: lora(decoder_pipeline, scale) for scale in (2, 3)}
        PumaPipeline.save_lora_weights(tmp_path, layers)
        plain = image(decoder_pipeline)

        decoder_pipeline.load_lora_weights(tmp_path, scale=3, adapter_name="style")
        assert decoder_pipeline.get_list_adapters() == {"unet_3": ["style"]}
        loaded = get_peft_model_state_dict(decoder_pipeline.unet_3, adapter_name="style")
        assert loaded.keys() == layers[3].keys()
        assert all(torch.equal(value, layers[3][key]) for key, value in loaded.items())
        full = image(decoder_pipeline)
        assert (full - plain).abs().max() > 1e-4

        decoder_pipeline.set_adapters("style", 0.0)
        torch.testing.assert_close(image(decoder_pipeline), plain)
        decoder_pipeline.set_adapters("style", 1.0)
        decoder_pipeline.fuse_lora()
        assert decoder_pipeline.num_fused_loras == 1
        torch.testing.assert_close(image(decoder_pipeline), full, atol=1e-4, rtol=0)
        decoder_pipeline.unfuse_lora()
        assert decoder_pipeline.num_fused_loras == 0
        decoder_pipeline.unload_lora_weights()
        assert decoder_pipeline.get_list_adapters() == {}
        torch.testing.assert_close(image(decoder_pipeline), plain)

    def test_is_not_saved_within_the_pipeline(self, decoder_pipeline, tmp_path):
        PumaPipeline.save_lora_weights(tmp_path, {3: lora(decoder_pipeline, 3)})
        decoder_pipeline.load_lora_weights(tmp_path, scale=3, adapter_name="style")
        expected = image(decoder_pipeline)
        with pytest.raises(ValueError, match=r"scales \[3\] hold LoRA layers"):
            decoder_pipeline.save_pretrained(tmp_path / "pipeline")
        assert not (tmp_path / "pipeline").exists()
        decoder_pipeline.fuse_lora(components=["unet_3"])
        decoder_pipeline.unload_lora_weights()
        decoder_pipeline.save_pretrained(tmp_path / "pipeline")
        again = PumaPipeline.from_pretrained(tmp_path / "pipeline")
        torch.testing.assert_close(image(again), expected, atol=1e-4, rtol=0)

    def test_a_language_model_with_an_adapter_draws_and_is_saved_once_merged(self, full_pipeline, tmp_path):
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        full_pipeline.mllm = get_peft_model(full_pipeline.mllm, settings)
        features = full_pipeline("a", scale=4, output_type="latent").image_features[4]
        with pytest.raises(ValueError, match="the language model holds LoRA layers"):
            full_pipeline.save_pretrained(tmp_path / "pipeline")
        assert not (tmp_path / "pipeline").exists()
        full_pipeline.mllm = full_pipeline.mllm.merge_and_unload()
        full_pipeline.save_pretrained(tmp_path / "pipeline")
        again = PumaPipeline.from_pretrained(tmp_path / "pipeline")
        torch.testing.assert_close(again("a", scale=4, output_type="latent").image_features[4], features)

    def test_empty_layers_that_a_deleted_adapter_leaves_are_not_saved(self, decoder_pipeline, tmp_path):
        expected = image(decoder_pipeline)
        layers = {f"unet_3.{key}": value for key, value in lora(decoder_pipeline, 3).items()}
        decoder_pipeline.load_lora_weights(layers, adapter_name="style")
        decoder_pipeline.delete_adapters("style")
        with pytest.raises(ValueError, match=r"scales \[3\] hold LoRA layers"):
            decoder_pipeline.save_pretrained(tmp_path)
        decoder_pipeline.unload_lora_weights()
        decoder_pipeline.save_pretrained(tmp_path)
        torch.testing.assert_close(image(PumaPipeline.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_random_weights_are_made_on_request_alone(self, decoder_pipeline, low_cpu_mem_usage):
        layers = lora(decoder_pipeline, 3)
        before = torch.get_rng_state()
        decoder_pipeline.load_lora_weights(
            {f"unet_3.{key}": value for key, value in layers.items()}, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(torch.get_rng_state(), before) == low_cpu_mem_usage
        loaded = get_peft_model_state_dict(decoder_pipeline.unet_3, adapter_name="default_0")
        assert all(torch.equal(value, layers[key]) for key, value in loaded.items())

    def test_all_scales_of_a_file(self, decoder_pipeline, tmp_path):
        PumaPipeline.save_lora_weights(tmp_path, {scale: lora(decoder_pipeline, scale) for scale in (0, 4)})
        decoder_pipeline.load_lora_weights(tmp_path, adapter_name="style")
        assert decoder_pipeline.get_list_adapters() == {"unet_0": ["style"], "unet_4": ["style"]}

    def test_settings_travel_with_the_weights(self, decoder_pipeline, tmp_path):
        settings = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"]).to_dict()
        layers = {3: lora(decoder_pipeline, 3)}
        PumaPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata={3: settings})
        decoder_pipeline.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors", scale=3)
        assert decoder_pipeline.unet_3.peft_config["default_0"].lora_alpha == 8

    def test_keeps_model_offload(self, decoder_pipeline, tmp_path):
        PumaPipeline.save_lora_weights(tmp_path, {3: lora(decoder_pipeline, 3)})
        decoder_pipeline.load_lora_weights(tmp_path, scale=3)
        expected = image(decoder_pipeline)
        decoder_pipeline.enable_model_cpu_offload(device="cpu")
        torch.testing.assert_close(image(decoder_pipeline), expected)

    def test_errors(self, decoder_pipeline):
        weights = {f"unet_3.{key}": value for key, value in lora(decoder_pipeline, 3).items()}
        with pytest.raises(ValueError, match=r"no keys prefixed 'unet_2.'.*found \['unet_3'\]"):
            decoder_pipeline.load_lora_weights(weights, scale=2)
        with pytest.raises(ValueError, match=r"no keys prefixed 'unet_<scale>.'"):
            decoder_pipeline.load_lora_weights({"transformer.a": torch.zeros(1)})
        for scale in ("3", [3, 1], True, 3.0, 5):
            with pytest.raises(ValueError, match=r"scale must be 0..4, or None for all in the file, got"):
                decoder_pipeline.load_lora_weights(weights, scale=scale)
        decoder_pipeline.unet_3 = None
        with pytest.raises(ValueError, match=r"scales \[3\], whose decoders are absent"):
            decoder_pipeline.load_lora_weights(weights, scale=3)
