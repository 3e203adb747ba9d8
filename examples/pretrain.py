"""Pretrain PUMA's language model, all of it but the encoder (report section A.2.3):

    accelerate launch --config_file examples/accelerate/zero3.yaml examples/pretrain.py \\
        examples/configs/pretraining.yaml --model puma-8b --data_root /data

Every argument of the YAML file but its sources can be given on the command line, which wins. The same command again
continues from the last whole checkpoint.
"""

from dataclasses import dataclass, field

import torch
from training_recipe import DataArguments, SampleArguments, parse_recipe, run
from transformers import AutoModelForMultimodalLM, AutoProcessor

import transformers_puma  # noqa: F401
from transformers_puma.training import PumaTrainer, PumaTrainingArguments


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "folder or Hub id, such as `puma init` makes"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2, flex_attention, .."})


def main(argv: list[str] | None = None) -> None:
    # The training arguments first: DeepSpeed shards the model while it is read.
    types = (PumaTrainingArguments, ModelArguments, DataArguments, SampleArguments)
    arguments, source, data, samples = parse_recipe(types, argv)
    model = AutoModelForMultimodalLM.from_pretrained(
        source.model, dtype=torch.float32, attn_implementation=source.attn_implementation
    )
    processor = AutoProcessor.from_pretrained(source.model)
    sets = {"train_dataset": data.load(arguments), "eval_dataset": data.load_validation(arguments)}
    trainer = PumaTrainer(model, arguments, processing_class=processor, **sets)
    samples.add_to(trainer)
    run(trainer)


if __name__ == "__main__":
    main()
