"""The arithmetic of memory, and that the documents print what it computes."""

import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModel, LlamaConfig

from transformers_puma import PumaConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "accelerate"
sys.path.insert(0, str(FOLDER))

import memory  # noqa: E402

DOCUMENTS = [FOLDER / "README.md", ROOT / "hub_configs/puma-1b/README.md"]
PRINTED = [
    match for path in DOCUMENTS for match in re.findall(r"```console\n\$ (.*?)\n(.*?)```", path.read_text(), re.S)
]


@pytest.mark.parametrize(("command", "output"), PRINTED, ids=range(len(PRINTED)))
def test_the_documents_print_what_is_computed(command, output, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "examples/accelerate/memory.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory.main(arguments)
    assert capsys.readouterr().out == output


def test_what_a_layer_keeps_is_what_autograd_keeps_on_a_device():
    """The count on the meta device against the same layers with real numbers and a fused kernel."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    length, kept = 32, []
    for num_layers in (1, 2):
        config.num_hidden_layers = num_layers
        backbone = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        states = torch.randn(1, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            kept.append(
                memory.kept_for_backward(lambda: backbone(inputs_embeds=states, use_cache=False), backbone)  # noqa: B023
            )
    assert (kept[1] - kept[0]) / length == pytest.approx(memory.bytes_per_token_of_a_layer(config, length), rel=0.1)


def test_states_of_the_optimiser():
    """By hand: AdamW keeps two fp32 numbers of each trained weight, and DeepSpeed a third, shared among GPUs."""
    config = PumaConfig.from_pretrained(ROOT / "hub_configs/puma-1b")
    model = memory.build_model(str(ROOT / "hub_configs/puma-1b"), {})
    trained = 1_236_338_688 + 4_197_376
    alone = memory.state_bytes(model, "NO", {}, 1)
    assert alone["optimiser (two moments)"] == 8 * trained
    assert alone["weights"] == 4 * trained + 2 * 303_179_776
    zero = {"stage3_max_live_parameters": 10, "reduce_bucket_size": 1}
    sharded = memory.state_bytes(model, "DEEPSPEED", zero, 16)
    assert sharded["optimiser (weights, two moments), sharded"] == 12 * trained / 16
    assert sharded["largest gradient and two buckets"] == 2 * (config.text_config.vocab_size * 2048 + 2)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_configurations(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.distributed_type.value == yaml.safe_load(path.read_text())["distributed_type"]
    assert memory.read_sharding(str(path))[0] == config.distributed_type.value
    if name == "zero3":
        assert memory.read_sharding(str(path))[1]["stage"] == 3
        assert config.deepspeed_config["deepspeed_config_file"] == "examples/accelerate/zero3.json"
