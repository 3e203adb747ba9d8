"""Converted towers against open_clip's own forward, on random weights."""

import json
import sys

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from transformers_puma.assembly import load_encoder
from transformers_puma.open_clip_vision import clip_vision_from_open_clip, load_open_clip

VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_clip(model_class=CLIP, quick_gelu: bool = False, **changes) -> torch.nn.Module:
    """A tiny open_clip model whose every weight is random: some of open_clip's start at zero or one."""
    torch.manual_seed(0)
    model = model_class(16, CLIPVisionCfg(**{**VISION, **changes}), CLIPTextCfg(**TEXT), quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def assert_same_outputs(vision: CLIPVisionModel, visual: torch.nn.Module, atol: float = 1e-5) -> None:
    size = vision.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    blocks = []
    hook = visual.transformer.register_forward_hook(lambda module, args, output: blocks.append(output))
    features = visual(pixels)
    hook.remove()
    result = vision(pixels)
    torch.testing.assert_close(result.last_hidden_state[:, 1:], blocks[0][:, 1:], atol=atol, rtol=0)
    torch.testing.assert_close(result.pooler_output @ visual.proj, features, atol=atol, rtol=0)


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(("quick_gelu", "activation"), [(True, "quick_gelu"), (False, "gelu")])
def test_equals_open_clip(model_class, quick_gelu, activation):
    visual = make_clip(model_class, quick_gelu).visual
    vision = clip_vision_from_open_clip(visual)
    assert isinstance(vision, CLIPVisionModel) and not vision.training
    expected = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    expected |= {"image_size": 32, "patch_size": 8, "projection_dim": 16, "hidden_act": activation}
    assert {name: getattr(vision.config, name) for name in expected} == expected
    assert_same_outputs(vision, visual)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 32, "image_size": 224, "width": 48, "head_width": 12},
        {"mlp_ratio": 2.5, "layers": 1},
        {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
        {"final_ln_after_pool": True, "output_tokens": False, "patch_dropout": 0.5},
    ],
)
def test_equals_open_clip_at_other_configs(changes):
    visual = make_clip(**changes).visual
    assert_same_outputs(clip_vision_from_open_clip(visual), visual)


def test_activations_differ():
    """The parity above could not tell a wrong activation if the two gave the same numbers."""
    visual = make_clip(quick_gelu=True).visual
    vision = clip_vision_from_open_clip(visual)
    vision.config.hidden_act = "gelu"
    wrong = CLIPVisionModel(vision.config).eval()
    wrong.load_state_dict(vision.state_dict())
    with pytest.raises(AssertionError, match="not close"):
        assert_same_outputs(wrong, visual)


def test_keeps_the_number_format_and_shares_nothing():
    visual = make_clip().visual.to(torch.bfloat16)
    vision = clip_vision_from_open_clip(visual)
    assert vision.dtype == torch.bfloat16
    theirs = {parameter.data_ptr() for parameter in visual.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in vision.parameters()}


def test_saved_model_loads(tmp_path):
    visual = make_clip(quick_gelu=True).visual
    clip_vision_from_open_clip(visual).save_pretrained(tmp_path)
    assert_same_outputs(CLIPVisionModel.from_pretrained(tmp_path).eval(), visual)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}, "found ModifiedResNet"),
        ({"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}, "found TimmModel"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "found attentional pooling"),
        ({"pool_type": "avg"}, "found pool_type='avg' instead of its class token"),
        ({"no_ln_pre": True}, "found no layernorm before the first block"),
        ({"ls_init_value": 0.1}, "found scaled layers"),
        ({"image_size": (32, 64)}, r"found pictures of \(32, 64\) pixels"),
        ({"patch_size": (8, 4)}, r"found patches of \(8, 4\) pixels"),
        ({"scale_fc": True}, "found blocks of CustomResidualAttentionBlock"),
        ({"pool_type": "avg", "no_ln_pre": True}, "pool_type='avg'.*, no layernorm"),
    ],
)
def test_other_towers_are_refused(changes, found):
    visual = CLIP(16, CLIPVisionCfg(**{**VISION, **changes}), CLIPTextCfg(**TEXT)).visual
    with pytest.raises(ValueError, match=found):
        clip_vision_from_open_clip(visual)


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """An architecture `tiny-ViT` without quick GELU, a weight file of one with it, and a tag `quick` for that file."""
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    config = tmp_path / "tiny-ViT.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(config)

    model = make_clip(quick_gelu=True)
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    tag = {"file": str(weights), "quick_gelu": True, "mean": MEAN, "std": STD}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-ViT", {"quick": tag})
    return model, weights


def test_load_follows_the_tag(architecture):
    """`open_clip:ViT-L-14/openai` is such a case: the weights want quick GELU, the architecture has the other one."""
    model, _ = architecture
    vision, image_processor = load_open_clip("tiny-ViT", "quick")
    assert vision.config.hidden_act == "quick_gelu"
    assert_same_outputs(vision, model.visual)
    assert dict(image_processor.size) == {"height": 32, "width": 32}
    assert (tuple(image_processor.image_mean), tuple(image_processor.image_std)) == (MEAN, STD)


def test_as_the_encoder_of_a_new_model(architecture):
    vision, image_processor = load_encoder("open_clip:tiny-ViT/quick")
    assert_same_outputs(vision, architecture[0].visual)
    assert tuple(image_processor.image_mean) == MEAN


def test_load_from_a_weight_file(architecture):
    model, weights = architecture
    vision, _ = load_open_clip("tiny-ViT", str(weights))
    assert vision.config.hidden_act == "gelu"
    ours, theirs = vision.post_layernorm.weight, model.visual.ln_post.weight
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_unknown_names(architecture):
    with pytest.raises(ValueError, match="no architecture 'ViT-Q-14'"):
        load_open_clip("ViT-Q-14", "openai")
    with pytest.raises(ValueError, match=r"no weights 'slow' for tiny-ViT: expected one of \['quick'\] or a weight"):
        load_open_clip("tiny-ViT", "slow")


def test_unreadable_weights(architecture, tmp_path, monkeypatch):
    _, weights = architecture
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "text.bin").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "empty.bin").touch()
    torch.save({"visual.proj": torch.ones(3)}, tmp_path / "other.bin")
    reasons = {
        "cut.safetensors": "SafetensorError",
        "text.bin": "something else than tensors",
        "empty.bin": "EOFError",
    }
    for name, reason in (reasons | {"other.bin": "RuntimeError: .*Missing key"}).items():
        with pytest.raises(ValueError, match=f"open_clip cannot load the weights '.*/{name}' of tiny-ViT: .*{reason}"):
            load_open_clip("tiny-ViT", str(tmp_path / name))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["tiny-ViT"], "hub", {"hf_hub": "nobody/nothing/"})
    with pytest.raises(ValueError, match="cannot load the weights 'hub' of tiny-ViT: .*Failed to download"):
        load_open_clip("tiny-ViT", "hub")


def test_known_published_weights_want_quick_gelu():
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
    assert not open_clip.get_model_config("ViT-L-14").get("quick_gelu", False)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match=r"open_clip is not installed.*pip install 'puma-hub\[train\]'"):
        load_open_clip("ViT-L-14", "openai")
