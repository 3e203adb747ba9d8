"""What all of PUMA's model classes share: what they can do, initial weights, loading and saving."""

from functools import wraps

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_puma import PumaConfig
from .image_head_puma import PumaFlowHead


class PumaPreTrainedModel(PreTrainedModel):
    config: PumaConfig
    config_class = PumaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PumaFlowHead):
            module.start()

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Weights that stay on the disk are looked for beside the first file. The index of a pipeline's folder has
        # `mllm/` before each name, where that file is.
        weight_map = (load_config.sharded_metadata or {}).get("weight_map", {})
        weight_map.update({name: file.rpartition("/")[2] for name, file in weight_map.items()})
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    # diffusers reads from the signature whether to pass on `variant` and `max_shard_size`.
    @wraps(PreTrainedModel.save_pretrained, assigned=())
    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the folder also loads with `trust_remote_code=True` where this package is not
        installed."""
        self.config.auto_map = {
            "AutoConfig": "configuration_puma.PumaConfig",
            "AutoModel": "modeling_puma.PumaModel",
            "AutoModelForMultimodalLM": "modeling_puma.PumaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_puma.PumaForConditionalGeneration",
        }
        return super().save_pretrained(*args, **kwargs)
