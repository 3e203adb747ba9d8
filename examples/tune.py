"""Tune PUMA's language model for a task: text to image, editing, conditional generation or understanding.

    accelerate launch --config_file examples/accelerate/zero3.yaml examples/tune.py \\
        examples/configs/editing.yaml --model runs/pretraining --data_root /data

With `--lora_r 64` only an adapter of the backbone, projector, image head and the rows of PUMA's tokens are trained
and saved; `--load_in_4bit true` (QLoRA) keeps the frozen weights in four bits. Every argument of the YAML file but
its sources can be given on the command line, which wins. The same command again continues from the last whole
checkpoint.
"""

from dataclasses import dataclass, field

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from training_recipe import DataArguments, SampleArguments, parse_recipe, run
from transformers import AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig

from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.training import PumaTrainer, PumaTrainingArguments, puma_lora_config, puma_token_ids
from transformers_puma.training.lora import UNQUANTIZED


@dataclass
class TuningArguments:
    model: str = field(metadata={"help": "folder or Hub id of a trained language model"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2, flex_attention, .."})
    lora_r: int | None = field(default=None, metadata={"help": "rank of the adapter; None trains the whole model"})
    lora_alpha: int | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapter"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in 4-bit NormalFloat"})

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.lora_r is None:
            raise ValueError("load_in_4bit=True freezes the model: give lora_r, the rank of what is trained")

    def load(self, half: torch.dtype) -> PumaForConditionalGeneration:
        """The model in full precision where it is trained whole, its frozen weights in `half` or in four bits."""
        quantization = None
        if self.load_in_4bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=half,
                llm_int8_skip_modules=UNQUANTIZED,
            )
        return AutoModelForMultimodalLM.from_pretrained(
            self.model,
            dtype=torch.float32 if self.lora_r is None else half,
            attn_implementation=self.attn_implementation,
            quantization_config=quantization,
        )

    def add_adapter(self, model: PumaForConditionalGeneration, processor: PumaProcessor, checkpointing: bool):
        if self.load_in_4bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        alpha = self.lora_alpha or 2 * self.lora_r
        settings = {"r": self.lora_r, "lora_alpha": alpha, "lora_dropout": self.lora_dropout}
        adapted = get_peft_model(model, puma_lora_config(model, puma_token_ids(processor), **settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted


def main(argv: list[str] | None = None) -> None:
    # The training arguments first: DeepSpeed shards the model while it is read.
    types = (PumaTrainingArguments, TuningArguments, DataArguments, SampleArguments)
    arguments, tuning, data, samples = parse_recipe(types, argv)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    model = tuning.load(half)
    processor = AutoProcessor.from_pretrained(tuning.model)
    if tuning.lora_r is not None:
        model = tuning.add_adapter(model, processor, arguments.gradient_checkpointing)
    sets = {"train_dataset": data.load(arguments), "eval_dataset": data.load_validation(arguments)}
    trainer = PumaTrainer(model, arguments, processing_class=processor, **sets)
    samples.add_to(trainer)
    run(trainer)


if __name__ == "__main__":
    main()
