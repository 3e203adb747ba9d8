"""LoRA weights of the decoders, in diffusers' format: one file holds those of any scales, prefixed `unet_<scale>.`."""

from pathlib import Path

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from transformers_puma.granularity import MAX_SCALES

from .loading import fetch_lora_state_dict
from .pipeline_inputs import is_scale


def has_lora_layers(module: torch.nn.Module) -> bool:
    """Also where `delete_adapters` has left them empty, and `peft_config` is gone."""
    return any(".base_layer." in name for name, _ in module.named_parameters())


class PumaLoraLoaderMixin(LoraBaseMixin):
    """Loads and saves LoRA weights. Needs `peft`.

    `set_adapters`, `unload_lora_weights` and the rest are diffusers' own.
    """

    _lora_loadable_modules = [f"unet_{scale}" for scale in range(MAX_SCALES)]

    def load_lora_weights(
        self,
        path_or_dict: str | Path | dict[str, torch.Tensor],
        scale: int | None = None,
        *,
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **hub_kwargs,
    ) -> None:
        """Adds LoRA weights to one decoder, or to each that the file has weights for.

        Args:
            path_or_dict: a safetensors file, a folder, a Hub id or a state dict, with keys prefixed `unet_<scale>.`.
            scale: whose weights to take; None takes all that the file holds.
            adapter_name: by default `default_0` and so on, as in diffusers.
            hotswap: replaces the weights of the adapter of that name in place.
            low_cpu_mem_usage: makes no random weights that the file's then replace.
            hub_kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, as in diffusers.

        Raises:
            ValueError: no scale, no weights for it in the file, or no decoder of that scale in this pipeline.
        """
        if scale is not None and not is_scale(scale):
            raise ValueError(f"scale must be 0..{MAX_SCALES - 1}, or None for all in the file, got {scale!r}")
        state_dict, metadata = fetch_lora_state_dict(path_or_dict, **hub_kwargs)
        prefixes = {key.split(".")[0] for key in state_dict}
        held = [number for number in range(MAX_SCALES) if f"unet_{number}" in prefixes]
        wanted = held if scale is None else [scale]
        if not held or not set(wanted) <= set(held):
            asked = f"unet_{scale}." if scale is not None else "unet_<scale>."
            raise ValueError(f"no keys prefixed {asked!r} among these LoRA weights: found {sorted(prefixes)}")
        absent = [number for number in wanted if getattr(self, f"unet_{number}") is None]
        if absent:
            raise ValueError(f"LoRA weights for scales {absent}, whose decoders are absent from this pipeline")
        for number in wanted:
            getattr(self, f"unet_{number}").load_lora_adapter(
                state_dict,
                prefix=f"unet_{number}",
                metadata=metadata,
                adapter_name=adapter_name,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """As diffusers' own; `components` are by default all decoders."""
        components = self._lora_loadable_modules if components is None else components
        super().fuse_lora(
            components=components, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names
        )

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """As diffusers' own; `components` are by default all decoders."""
        super().unfuse_lora(self._lora_loadable_modules if components is None else components)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: dict[int, dict[str, torch.Tensor]],
        *,
        unet_lora_adapter_metadata: dict[int, dict] | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Writes LoRA weights that `load_lora_weights` reads.

        Args:
            save_directory: folder, made if absent.
            unet_lora_layers: `{scale: state dict}`, each as `peft.get_peft_model_state_dict(unet)` gives it.
            unet_lora_adapter_metadata: `{scale: settings}`, each a `LoraConfig.to_dict()`, stored in the file.
            weight_name: file name, by default `pytorch_lora_weights.safetensors`.
        """
        metadata = unet_lora_adapter_metadata or {}
        cls._save_lora_weights(
            save_directory=str(save_directory),
            lora_layers={f"unet_{scale}": layers for scale, layers in unet_lora_layers.items()},
            lora_metadata={f"unet_{scale}": settings for scale, settings in metadata.items()},
            weight_name=weight_name,
        )
