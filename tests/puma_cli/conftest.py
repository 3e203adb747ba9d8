"""Saved folders of tiny models, made once; tests that change one copy it."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from diffusers_puma import PumaPipeline
from tests.diffusers_puma.conftest import VISION, make_decoder_components, make_language_model, make_processor


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory) -> Path:
    """A language model and five decoders; 3 denoising steps by default."""
    folder, processor = tmp_path_factory.mktemp("models") / "full", make_processor()
    components = {**make_decoder_components(), "mllm": make_language_model(processor), "processor": processor}
    PumaPipeline(**components, default_num_inference_steps=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoders_folder(tmp_path_factory) -> Path:
    """An image encoder and the decoders of scales 1, 3 and 4."""
    folder, components = tmp_path_factory.mktemp("models") / "decoders", make_decoder_components()
    components["unet_0"] = components["unet_2"] = None
    torch.manual_seed(1)
    encoder = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "model_type"})).eval()
    PumaPipeline(**components, image_encoder=encoder, default_num_inference_steps=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model_folder(tmp_path_factory) -> Path:
    folder, processor = tmp_path_factory.mktemp("models") / "language_model", make_processor()
    make_language_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
