"""Where this package meets names that diffusers keeps private. One place, tested with each supported version.

Saved folders name their components' classes by library; diffusers knows which libraries it may load from, and
`DiffusionPipeline` and `AutoModel` look for pipelines and lone models in its own namespace. LoRA files and offloading
go through helpers of diffusers and accelerate that have no public name either.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from puma_files import read_json, read_safetensors_header

from .unet_puma import PumaUNet2DConditionModel

_INDEX_STEM = SAFE_WEIGHTS_INDEX_NAME.removesuffix(".json")
WEIGHT_FILES = "model*.safetensors*"  # whole, sharded, variants, and their indexes
COMPONENTS = {
    "transformers_puma": ["PumaForConditionalGeneration", "PumaProcessor"],
    "diffusers_puma": ["PumaUNet2DConditionModel"],
}


def register_pipeline(pipeline_class: type[DiffusionPipeline]) -> None:
    """Makes diffusers load `pipeline_class` and this package's components, from folders and from the Hub."""
    for library, names in COMPONENTS.items():
        LOADABLE_CLASSES[library] = {name: ["save_pretrained", "from_pretrained"] for name in names}
        ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES[library])
    for named_by_folders in (pipeline_class, PumaUNet2DConditionModel):
        setattr(diffusers, named_by_folders.__name__, named_by_folders)
    # How `set_adapters` reads per-block weights is looked up by the model's class name.
    _SET_ADAPTER_SCALE_FN_MAPPING["PumaUNet2DConditionModel"] = _SET_ADAPTER_SCALE_FN_MAPPING["UNet2DConditionModel"]


def fetch_lora_state_dict(
    path_or_dict: str | Path | dict[str, torch.Tensor],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
) -> tuple[dict[str, torch.Tensor], dict | None]:
    """LoRA weights and their adapter's settings from a safetensors file, a folder, a Hub id or a state dict."""
    return _fetch_state_dict(
        path_or_dict if isinstance(path_or_dict, dict) else str(path_or_dict),
        weight_name=weight_name,
        use_safetensors=True,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
        force_download=force_download,
        proxies=None,
        token=token,
        revision=revision,
        subfolder=subfolder,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
    )


def bring_in(pipeline: DiffusionPipeline, module: nn.Module) -> torch.device:
    """Makes one component of a pipeline ready to run and returns the device that its inputs belong on.

    With group offload the weights that the model itself holds come in, those of its blocks by their own hooks. With
    model offload it comes in alone. By themselves accelerate's hooks move a model only when its `forward` is
    called, which methods such as `generate` reach too late, and send back only the neighbour in
    `model_cpu_offload_seq`, which is the wrong one when a pipeline runs some of its decoders.
    """
    for offload in getattr(pipeline, "_all_hooks", []):
        if offload.model is not module:
            offload.offload()
    hooks = getattr(module, "_diffusers_hook", None)
    if hooks is not None and (offloading := hooks.get_hook("group_offloading")) is not None:
        offloading.group.onload_()
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return pipeline._execution_device
    hook.pre_forward(module)
    device = getattr(hook, "execution_device", None)
    return pipeline._execution_device if device is None else torch.device(device)


def restore_generation_config(language_model: nn.Module) -> None:
    """Reads the generation settings that a download by diffusers left out, once, as they may be changed then.

    Of a component's folder on the Hub diffusers fetches the weights and `config.json`, of a repository's root also
    `generation_config.json`, which a saved `PumaPipeline` has there.
    """
    if getattr(language_model, "_is_generation_config_restored", False):
        return
    language_model._is_generation_config_restored = True
    folder = Path(language_model.name_or_path)
    root = folder.parent
    is_missing = not (folder / GENERATION_CONFIG_NAME).is_file()
    if is_missing and (root / "model_index.json").is_file() and (root / GENERATION_CONFIG_NAME).is_file():
        language_model.generation_config = GenerationConfig.from_pretrained(root)


def write_language_model_root(folder: Path) -> None:
    """Makes a saved pipeline a folder of transformers too, without a second copy of any weight.

    Configuration, processor, tokenizer and custom code are copied from `mllm/` and `processor/` to the root, beside a
    weight index that points into `mllm/`. Weights of a language model that was saved at the root before are removed.
    """
    for component in ("mllm", "processor"):
        for file in (folder / component).glob("*"):
            if file.is_file() and not fnmatch(file.name, WEIGHT_FILES):
                shutil.copyfile(file, folder / file.name)
    for name, index in _weight_indexes(folder / "mllm").items():
        index["weight_map"] = {key: f"mllm/{file}" for key, file in index["weight_map"].items()}
        (folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for pattern in superseded_weights(folder):
        for file in folder.glob(pattern):
            file.unlink()


def superseded_weights(folder: Path) -> list[str]:
    """Patterns of the weight files at the root of a saved pipeline that transformers would read rather than those in
    `mllm/`, which an index names: a language model that was there before."""
    variants = [
        index.name.removeprefix(_INDEX_STEM).removesuffix(".json")
        for index in folder.glob(f"{_INDEX_STEM}*.json")
        if any(file.startswith("mllm/") for file in read_json(index)["weight_map"].values())
    ]
    return [f"model{variant}{part}.safetensors" for variant in variants for part in ("", "-*-of-*")]


def _weight_indexes(folder: Path) -> dict[str, dict]:
    """`{file name: index}` of a model's safetensors weights, whole or sharded, in each variant that is there."""
    indexes = {file.name: read_json(file) for file in folder.glob(f"{_INDEX_STEM}*.json")}
    for file in folder.glob("model*.safetensors"):
        if "-of-" in file.name:
            continue
        variant = file.name.removeprefix("model").removesuffix(".safetensors")
        header = read_safetensors_header(file)
        sizes = [tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header.values()]
        weight_map = dict.fromkeys(header, file.name)
        indexes[f"{_INDEX_STEM}{variant}.json"] = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    return indexes
