"""What the processes of `test_language_model.py` run: the same training on one process and on several.

    torchrun --nproc_per_node 2 -m tests.distributed.training_runs FOLDER ddp fsdp2 zero3

Each starts from the model FOLDER/start, and leaves FOLDER/NAME, a model folder with `losses.json`.
"""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import IterableDataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.transformers_puma.conftest import make_picture, make_processor
from transformers_puma import PumaConfig, PumaForConditionalGeneration
from transformers_puma.training import PumaSampleCallback, PumaTrainer, PumaTrainingArguments

STEPS, GLOBAL_BATCH, WORLD_SIZE = 20, 4, 2
ZERO3 = Path(__file__).parents[2] / "examples" / "accelerate" / "zero3.json"


def make_rows() -> list[dict]:
    """In order: of every global batch one half has pictures, or features of some, and the other, on another process,
    text alone."""
    features = torch.randn(21, 32, generator=torch.Generator().manual_seed(0))
    shown = [{"images": [make_picture(0)]}, {"image_features": [features]}, {"images": [make_picture(2)]}]
    drawn = [{"prompt": f"picture {i}", "completion": "<image>", **shown[i]} for i in range(3)]
    read = [{"prompt": "<image>", "completion": f"words {i}", **shown[i]} for i in range(3)]
    text = [{"text": "only text " * (i + 1)} for i in range(6)]
    rows = []
    for i in range(3):
        halves = [[drawn[i], read[i]], text[2 * i : 2 * i + 2]]
        rows += sum(halves if i % 2 == 0 else halves[::-1], [])
    return rows


def load(folder: Path) -> PumaForConditionalGeneration:
    """Where DeepSpeed runs it shards the weights while they are read, so the arguments are made before."""
    return PumaForConditionalGeneration.from_pretrained(folder / "start", dtype=torch.float32)


def make_arguments(folder: Path, num_processes: int, **options) -> PumaTrainingArguments:
    is_next_scale = PumaConfig.from_pretrained(folder.parent / "start").image_decoding == "next_scale"
    defaults = dict(
        own_feature_share=0.5 if is_next_scale else 0.0,
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // num_processes,
        per_device_eval_batch_size=1,
        learning_rate=1e-3,
        projector_learning_rate=2e-3,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return PumaTrainingArguments(**(defaults | options))


def make_trainer(arguments: PumaTrainingArguments, model: PumaForConditionalGeneration) -> PumaTrainer:
    return PumaTrainer(model, arguments, processing_class=make_processor(), train_dataset=make_rows())


def run_trainer(arguments: PumaTrainingArguments, model: PumaForConditionalGeneration) -> PumaTrainer:
    trainer = make_trainer(arguments, model)
    trainer.train()
    trainer.save_model()
    evaluated = trainer.evaluate(make_rows()[:3])  # not as many for each process
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(arguments.output_dir, "losses.json").write_text(json.dumps(history))
        Path(arguments.output_dir, "evaluated.json").write_text(json.dumps(evaluated))
    return trainer


def ddp(folder: Path) -> None:
    trainer = run_trainer(make_arguments(folder / "ddp", WORLD_SIZE), load(folder))
    stream = IterableDataset.from_generator(lambda: iter(make_rows()[:3]))
    trainer.args.prediction_loss_only = True
    evaluated = [trainer.evaluate(stream), trainer.evaluate(make_rows()[:3])]
    evaluated.append(trainer.predict(stream, metric_key_prefix="eval").metrics)
    measured = [name for name in evaluated[1] if "loss" in name or "mse" in name]
    streamed, listed, predicted = ({name: metrics[name] for name in measured} for metrics in evaluated)
    assert streamed == predicted == pytest.approx(listed)
    assert dist.get_world_size() == trainer.accelerator.num_processes == WORLD_SIZE
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)


def fsdp2(folder: Path) -> None:
    """Accelerate shards on accelerators only: here torch does, and the trainer's own parts make the loop."""
    trainer = make_trainer(make_arguments(folder / "fsdp2", WORLD_SIZE, report_to="tensorboard"), load(folder))
    model = trainer.model.train()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    assert dist.get_world_size() == mesh.size() == WORLD_SIZE
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(STEPS, optimizer)
    history = []
    batches = trainer.get_train_dataloader()
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), STEPS):
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
        history.append({"loss": trainer.accelerator.reduce(loss.detach(), "mean").item()})
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # What is sampled while the weights are sharded is what the whole model makes.
    callback = PumaSampleCallback(trainer, [make_rows()[0], make_rows()[1]], scale=1, max_new_tokens=4)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.model.eval()
    sharded = [sample.text for sample in callback.sample()]
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / "fsdp2", state_dict=whole)
        (folder / "fsdp2" / "losses.json").write_text(json.dumps(history))
        error = trainer.state.log_history[-1]["eval_drawn_mse_scale_1"]
        callback.trainer = make_trainer(trainer.args, PumaForConditionalGeneration.from_pretrained(folder / "fsdp2"))
        assert sharded == [sample.text for sample in callback.sample()]
        assert callback.trainer.state.log_history[-1]["eval_drawn_mse_scale_1"] == pytest.approx(error, rel=1e-3)


def zero3(folder: Path) -> None:
    """With the settings of the examples, told as `accelerate launch` tells them; "auto" comes from the arguments."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles that first, on every new machine
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ZERO3)
    arguments = make_arguments(folder / "zero3", WORLD_SIZE, use_cpu=False, ddp_backend="gloo")
    trainer = run_trainer(arguments, load(folder))
    assert dist.get_world_size() == trainer.accelerator.num_processes == WORLD_SIZE
    assert trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() == 3
    assert all(parameter.ds_tensor.numel() < parameter.ds_numel for parameter in trainer.model.parameters())
    # A weight that is no number is seen by all processes, whichever has it.
    if trainer.is_world_process_zero():
        trainer.model.model.projector.weight.ds_tensor.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="projector.weight is not finite"):
        trainer._check_weights()


def leave() -> None:
    """Ends a process that has written all that is wanted of it, when the others have too: one that ended as usual was
    seen to abort ("terminate called without an active exception")."""
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name](Path(sys.argv[1]))
    leave()
