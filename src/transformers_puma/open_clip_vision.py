"""Vision towers of open_clip as transformers' `CLIPVisionModel`: the same computation under other names.

open_clip itself is needed only to read its weights; what is made here is saved and loaded without it.
"""

from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from puma_files import unreadable

from .image_processing_puma import PumaImageProcessor

EMBEDDINGS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
}
NORMS = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_open_clip(arch: str, tag: str) -> tuple[CLIPVisionModel, PumaImageProcessor]:
    """The vision tower of a published open_clip model, and the preprocessing that it was trained with.

    The processor has open_clip's size, mean and standard deviation, but PUMA's straight bilinear resize.

    Args:
        arch: a name of `open_clip.list_models()`, such as `ViT-L-14`.
        tag: a name of `open_clip.list_pretrained_tags_by_model(arch)`, such as `openai`, or a weight file.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: an architecture or weights that open_clip does not know or cannot load, such as without a network;
            or a tower that is no plain CLIP.
    """
    open_clip, quick_gelu = _import_open_clip(), needs_quick_gelu(arch, tag)
    try:
        model = open_clip.create_model(arch, pretrained=tag, force_quick_gelu=quick_gelu)
    except Exception as error:
        # Of a file that is no checkpoint open_clip raises whatever goes wrong first, even a `StopIteration`.
        raise ValueError(f"open_clip cannot load the weights {tag!r} of {arch}: {unreadable(error)}") from error

    vision = clip_vision_from_open_clip(model.visual)
    size, preprocessing = vision.config.image_size, model.visual.preprocess_cfg
    image_processor = PumaImageProcessor(
        size={"height": size, "width": size},
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )
    return vision, image_processor


def needs_quick_gelu(arch: str, tag: str) -> bool:
    """Whether weights were trained with the quick GELU, which their architecture may not have: open_clip only warns.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: an architecture or weights that open_clip does not know.
    """
    open_clip = _import_open_clip()
    if arch not in open_clip.list_models():
        raise ValueError(f"open_clip knows no architecture {arch!r}; open_clip.list_models() tells which there are")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in tags and not Path(tag).is_file():
        raise ValueError(f"open_clip has no weights {tag!r} for {arch}: expected one of {tags} or a weight file")
    return open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)


def clip_vision_from_open_clip(visual: nn.Module) -> CLIPVisionModel:
    """Converts the `visual` of an open_clip model: a plain vision transformer that pools its class token.

    Returns:
        A copy in evaluation mode, in the number format of the tower's patch embedding. Its `last_hidden_state` is what
        open_clip has before `ln_post`; its `pooler_output` has no projection, as `CLIPVisionModel` has none.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: any other tower; the message says what was found.
    """
    _require_plain_transformer(visual)
    (image_size, _), (patch_size, _) = visual.image_size, visual.patch_size
    block = visual.transformer.resblocks[0]
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        projection_dim=visual.output_dim,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act=_activation(block.mlp.gelu),
        layer_norm_eps=visual.ln_post.eps,
    )
    model = CLIPVisionModel(config).to(visual.conv1.weight.dtype)
    model.load_state_dict(_rename(visual.state_dict()))
    return model.eval()


def _rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if name in EMBEDDINGS:
            renamed[EMBEDDINGS[name]] = weight
        elif module in NORMS:
            renamed[f"{NORMS[module]}.{kind}"] = weight
        elif name.startswith("transformer.resblocks."):
            index, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
            renamed |= {f"encoder.layers.{index}.{new}": part for new, part in _rename_in_block(inner, weight).items()}
    return renamed


def _rename_in_block(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    module, _, kind = name.rpartition(".")
    if module in BLOCK:
        return {f"{BLOCK[module]}.{kind}": weight}
    # Query, key and value in one: `attn.in_proj_weight` and `attn.in_proj_bias`.
    kind = name.removeprefix("attn.in_proj_")
    return {f"self_attn.{head}_proj.{kind}": part for head, part in zip("qkv", weight.chunk(3), strict=True)}


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return "quick_gelu"


def _require_plain_transformer(visual: nn.Module) -> None:
    """Raises `ValueError` for everything that `CLIPVisionModel` does not compute."""
    from_open_clip = _import_open_clip().transformer
    if not isinstance(visual, from_open_clip.VisionTransformer):
        raise ValueError(f"the vision tower must be open_clip's VisionTransformer, found {type(visual).__name__}")
    blocks = visual.transformer.resblocks
    found = {
        "attentional pooling": visual.attn_pool is not None,
        f"pool_type={visual.pool_type!r} instead of its class token": visual.pool_type != "tok",
        "no layernorm before the first block": not isinstance(visual.ln_pre, nn.LayerNorm),
        f"pictures of {visual.image_size} pixels": len(set(visual.image_size)) > 1,
        f"patches of {visual.patch_size} pixels": len(set(visual.patch_size)) > 1,
        f"blocks of {type(blocks[0]).__name__}": type(blocks[0]) is not from_open_clip.ResidualAttentionBlock,
        "scaled layers (ls_init_value)": any(isinstance(m, from_open_clip.LayerScale) for m in blocks.modules()),
    }
    problems = [description for description, is_so in found.items() if is_so]
    if problems:
        raise ValueError(f"the open_clip vision tower is no plain CLIP: found {', '.join(problems)}")


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "open_clip is not installed, and an open_clip encoder needs it: pip install 'puma-hub[train]' (or [eval])"
        ) from error
    return open_clip
