"""Memory of one GPU in training, computed from a model's configuration and a training YAML. Computed, not measured.

    python examples/accelerate/memory.py examples/configs/pretraining.yaml --model hub_configs/puma-8b \\
        --accelerate examples/accelerate/zero3.yaml --num_processes 256 --gpu_memory 32 --days 10

The model is built on the meta device, without weights: parameters are counted, and what autograd keeps of one layer is
counted by its own hooks. What cannot be counted so (CUDA's context, communication, fragmentation) is a reserve.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import yaml
from peft import get_peft_model
from torch import nn
from transformers import AttentionInterface, AutoModel, PreTrainedConfig
from transformers.models.llama.modeling_llama import repeat_kv

from transformers_puma import PumaConfig, PumaForConditionalGeneration
from transformers_puma.training.lora import puma_lora_config

HALF, FULL = 2, 4  # bytes of a number
RESERVE_GB, RESERVE_SHARE = 1.5, 0.05  # CUDA context and NCCL; fragmentation, as a share of the GPU's memory
GB = 1e9


def fused_attention(module: nn.Module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, None]:
    """The kernel that GPUs run, which keeps no T x T scores; on the meta device stock SDPA takes one that does."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    output = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)[0]
    return output.transpose(1, 2), None


AttentionInterface.register("fused_on_meta", fused_attention)


def kept_for_backward(compute: Callable[[], object], weights: nn.Module) -> int:
    """Bytes that autograd keeps of a computation, without the weights."""
    known = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())


def bytes_per_token_of_a_layer(text_config: PreTrainedConfig, length: int) -> float:
    """What one layer of the backbone in half precision keeps of each token: of two layers, what one does not."""
    kept = []
    for num_layers in (1, 2):
        config = copy.deepcopy(text_config)
        config.num_hidden_layers = num_layers
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="fused_on_meta")
            states = torch.empty(1, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            kept.append(kept_for_backward(partial(backbone, inputs_embeds=states, use_cache=False), backbone))
    return (kept[1] - kept[0]) / length


def build_model(folder: str, training: dict) -> nn.Module:
    """The model on the meta device, with its adapter if the training has one, and what is trained marked."""
    with torch.device("meta"):
        model = PumaForConditionalGeneration(PumaConfig.from_pretrained(folder))
        model.model.vision_tower.requires_grad_(False)
        if training.get("lora_r"):
            first, tokens = model.config.image_start_token_id, 3 + model.config.num_location_tokens
            lora = puma_lora_config(model, list(range(first, first + tokens)), r=training["lora_r"])
            model = get_peft_model(model, lora)
    return model


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def read_sharding(accelerate_config: str | None) -> tuple[str, dict]:
    """`distributed_type` of an accelerate config ("NO" without one), and DeepSpeed's `zero_optimization`."""
    if accelerate_config is None:
        return "NO", {}
    config = yaml.safe_load(Path(accelerate_config).read_text())
    if config["distributed_type"] != "DEEPSPEED":
        return config["distributed_type"], {}
    deepspeed = json.loads(Path(config["deepspeed_config"]["deepspeed_config_file"]).read_text())
    return "DEEPSPEED", deepspeed["zero_optimization"]


def state_bytes(model: nn.Module, kind: str, zero: dict, num_processes: int) -> dict[str, float]:
    """Weights, gradients and optimiser states of one GPU.

    DeepSpeed trains half-precision weights with a full-precision copy in the optimiser. Elsewhere the trained weights
    are in full precision and are cast where they are used. Frozen weights are in half precision.
    """
    trained = count(p for p in model.parameters() if p.requires_grad)
    frozen = count(p for p in model.parameters() if not p.requires_grad)
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    if kind == "DEEPSPEED":
        return {
            "weights, sharded": HALF * (trained + frozen) / num_processes,
            "gradients, sharded": (HALF + FULL) * trained / num_processes,  # and the optimiser's copy at its step
            "optimiser (weights, two moments), sharded": 3 * FULL * trained / num_processes,
            "gathered weights (stage3_max_live_parameters)": HALF * zero["stage3_max_live_parameters"],
            "largest gradient and two buckets": HALF * (largest + 2 * zero["reduce_bucket_size"]),
        }
    if kind == "FSDP":
        units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        unit = max(count(module.parameters()) for module in units)
        root = trained + frozen - sum(count(module.parameters()) for module in units)
        return {
            "weights, sharded": (FULL * trained + HALF * frozen) / num_processes,
            "gradients, sharded": FULL * trained / num_processes,
            "optimiser (two moments), sharded": 2 * FULL * trained / num_processes,
            "gathered weights (two layers, and what is in none)": HALF * (2 * unit + root),
            "their gradients before they are reduced": HALF * (unit + root) * (trained > frozen),
        }
    return {
        "weights": FULL * trained + HALF * frozen,
        "copies of autocast": HALF * trained,
        "gradients": FULL * trained * (2 if kind == "MULTI_GPU" else 1),  # DDP: and its buckets
        "optimiser (two moments)": 2 * FULL * trained,
    }


def activation_bytes(config: PumaConfig, training: dict) -> dict[str, float]:
    """What a forward and backward pass needs beside the weights, with every row as long as rows may be."""
    tokens = training["per_device_train_batch_size"] * training["max_length"]
    text, vision = config.text_config, config.vision_config
    layer = tokens * bytes_per_token_of_a_layer(text, training["max_length"])
    kept = HALF * tokens * text.hidden_size if training.get("gradient_checkpointing") else layer
    patches = tokens // config.image_seq_length * config.grid_size**2
    return {
        f"kept of {text.num_hidden_layers} layers": kept * text.num_hidden_layers,
        "one layer and its gradients": 2 * layer,
        # Rows of text alone, all supervised: logits and their gradient; in fp32 a copy, its softmax and gradient.
        "logits and loss": (2 * HALF + 3 * FULL) * tokens * text.vocab_size,
        "encoder (no gradient), a layer": HALF * patches * (4 * vision.hidden_size + 2 * vision.intermediate_size),
    }


def needed_speed(model: nn.Module, training: dict, num_processes: int, days: float) -> float:
    """FLOP/s of each GPU for the whole run: 6 FLOP a parameter and token, and 2 more where layers are recomputed."""
    tokens = training["max_steps"] * training["global_batch_size"] * training["max_length"]
    operations = (8 if training.get("gradient_checkpointing") else 6) * tokens * count(model.parameters())
    return operations / (num_processes * days * 86400)


def report(rows: dict[str, float], gpu_memory: float) -> str:
    rows = rows | {
        "reserve (context, communication, fragmentation)": RESERVE_GB * GB + RESERVE_SHARE * gpu_memory * GB
    }
    total = sum(rows.values()) / GB
    lines = [f"{name:<52} {size / GB:8.2f} GB" for name, size in rows.items()]
    verdict = "fits" if total <= gpu_memory else "does not fit"
    return "\n".join([*lines, f"{'total, computed, not measured':<52} {total:8.2f} GB: {verdict} {gpu_memory:g} GB"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", help="training YAML, such as examples/configs/pretraining.yaml")
    parser.add_argument("--model", required=True, help="folder with the model's config.json")
    parser.add_argument("--accelerate", help="accelerate config; without one, a single GPU")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs")
    parser.add_argument("--gpu_memory", type=float, required=True, help="GB of one GPU")
    parser.add_argument("--days", type=float, help="also print the speed that the whole run in that time asks for")
    arguments = parser.parse_args(argv)

    training = yaml.safe_load(Path(arguments.training).read_text())
    model = build_model(arguments.model, training)
    trained = count(p for p in model.parameters() if p.requires_grad)
    per_step = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    training["global_batch_size"] = per_step * arguments.num_processes
    kind, zero = read_sharding(arguments.accelerate)
    print(f"{count(model.parameters()):,} parameters, {trained:,} of them trained, on {arguments.num_processes} GPUs")
    print(f"rows of up to {training['max_length']} tokens, {training['global_batch_size']} in a step")
    states = state_bytes(model, kind, zero, arguments.num_processes)
    print(report(states | activation_bytes(model.config, training), arguments.gpu_memory))
    if arguments.days:
        speed = needed_speed(model, training, arguments.num_processes, arguments.days)
        print(f"{arguments.days:g} days ask {speed / 1e12:.1f} TFLOP/s of each GPU")


if __name__ == "__main__":
    main()
