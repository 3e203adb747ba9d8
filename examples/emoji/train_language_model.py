"""Train tokenizer and language model on cached features, to draw from words:

    python examples/emoji/train_language_model.py --cache runs/emoji/cache --encoder runs/emoji/encoder \
        --out runs/emoji/mllm
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from build_scenes import load_scenes
from cache_features import load_cache
from emoji_tasks import KINDS, EmojiRows, EmojiSplit, TaskMix, all_texts, alone
from emoji_training import StageArguments, count_parameters, load_pictures, parse_arguments, run_stage
from muon import MuonWithAdamW, check_unused
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch.utils.data import SequentialSampler
from transformers import CLIPVisionModel, LlamaConfig, PreTrainedTokenizerFast

from diffusers_puma.training import feature_statistics
from transformers_puma import (
    PumaConfig,
    PumaForConditionalGeneration,
    PumaImageProcessor,
    PumaProcessor,
    add_puma_tokens,
    tokens_per_scale,
)
from transformers_puma.training import PumaTrainer, PumaTrainingArguments, standardize_feature_heads

COMMON = dict(lr_scheduler_type="cosine", weight_decay=0.05, max_grad_norm=5.0, feature_noise=0.3, eval_on_start=False)
PRESETS = {
    "cpu": dict(
        max_steps=3200, per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=200, save_steps=500, **COMMON
    ),
    "gpu": dict(
        max_steps=30000,
        per_device_train_batch_size=256,
        learning_rate=1e-3,
        warmup_steps=1000,
        save_steps=3000,
        **COMMON,
    ),
}
# Rows that hold a whole picture to be read cost ten times what the first scales of a drawn one do: they come with the
# tuning, all tasks at once.
SHARES = alone("draw")
# What a run is evaluated on: pictures down to the finest scale.
DRAWING = TaskMix(
    kinds=SHARES,
    finest_scale=(1.0, 0.0, 0.0, 0.0, 0.0),
    finest_scale_edits=(1.0, 0.0, 0.0, 0.0, 0.0),
    scenes=0.25,
)
# The report pretrains with 0.02. In runs as short as the small model's that leaves answers untrained.
TEXT_LOSS_WEIGHT = 1.0


@dataclass
class CachedData:
    cache: str = field(default="runs/emoji/cache", metadata={"help": "folder that cache_features.py wrote"})
    scenes: str = field(default="data/emoji-scenes", metadata={"help": "folder that build_scenes.py wrote"})


@dataclass
class LanguageModelArguments(CachedData):
    encoder: str = field(default="runs/emoji/encoder", metadata={"help": "the trained encoder"})
    hidden_size: int = field(default=256, metadata={"help": "width of the language model"})
    num_layers: int = field(default=4, metadata={"help": "depth of the language model"})
    image_decoding: str = field(default="next_scale", metadata={"help": "how an image is written, see PumaConfig"})
    image_head: str = field(default="regression", metadata={"help": "regression or flow, see PumaConfig"})
    processor: str | None = field(default=None, metadata={"help": "use this saved one; None trains a tokenizer"})
    shares: list[float] = field(
        default_factory=lambda: list(SHARES), metadata={"help": f"of the tasks: {', '.join(KINDS)}"}
    )


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS, EOS and padding, plus PUMA's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )
    add_puma_tokens(fast)
    return fast


def build_processor(texts: list[str], encoder: CLIPVisionModel, num_scales: int = 5) -> PumaProcessor:
    size, patch = encoder.config.image_size, encoder.config.patch_size
    return PumaProcessor(
        PumaImageProcessor(size={"height": size, "width": size}),
        train_tokenizer(all_texts(texts)),
        image_seq_length=sum(tokens_per_scale(size // patch, num_scales)),
    )


def build_model(
    processor: PumaProcessor, encoder: CLIPVisionModel, options: LanguageModelArguments
) -> PumaForConditionalGeneration:
    tokenizer, hidden_size = processor.tokenizer, options.hidden_size
    text_config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=options.num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = PumaConfig(
        text_config=text_config,
        vision_config=encoder.config,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_decoding=options.image_decoding,
        image_head=options.image_head,
        text_loss_weight=TEXT_LOSS_WEIGHT,
    )
    model = PumaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    return model


def load_trained(folder: str, **settings) -> tuple[PumaForConditionalGeneration, PumaProcessor]:
    """To be trained on, in single precision: a finished model folder holds half, which is too coarse for that."""
    model = PumaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **settings)
    return model, PumaProcessor.from_pretrained(folder)


class OrderedTrainer(PumaTrainer):
    """Rows come in the order of `EmojiRows`, whose batches are of one kind each. A whole model is trained with Muon,
    an adapter with the optimizer of the arguments."""

    def create_optimizer(self, model=None):
        if self.optimizer is None and not isinstance(self.model, PeftModel):
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = MuonWithAdamW(self.model, decayed, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def train(
    model: PumaForConditionalGeneration | PeftModel,
    processor: PumaProcessor,
    stage: StageArguments,
    arguments: PumaTrainingArguments,
    options: CachedData,
    mix: TaskMix,
    evaluated: TaskMix = DRAWING,
    held_out: str = "heldout_pair",
) -> None:
    """Trains on rows of `mix`, evaluates on rows of `evaluated` of a held-out split (512, or as many as it trains on
    where those are fewer), and writes `stage.out`.

    Raises:
        ValueError: for a whole model, arguments of an optimizer that is not used.
    """
    if not isinstance(model, PeftModel):
        check_unused(arguments)
    pictures, scenes = load_pictures(stage.data), load_scenes(options.scenes)

    def rows(split: str, length: int, mix: TaskMix) -> EmojiRows:
        emoji = EmojiSplit(
            pictures[split].described(),
            scenes[split].remove_columns("image").to_list(),
            load_cache(options.cache, split)["features"],
            load_cache(options.cache, f"scenes_{split}")["features"],
        )
        size = arguments.per_device_train_batch_size
        return EmojiRows(emoji, model.config.num_scales, size, length, arguments.seed, mix)

    length = arguments.max_steps * arguments.per_device_train_batch_size
    trainer = OrderedTrainer(
        model,
        arguments,
        processing_class=processor,
        train_dataset=rows("train", length, mix),
        eval_dataset=rows(held_out, min(length, 512), evaluated),
    )

    def save(folder: str) -> dict:
        trainer.save_model(folder)
        return {"parameters": count_parameters(model), held_out: trainer.evaluate()}

    run_stage(trainer, stage.out, save)


def main() -> None:
    stage, arguments, options = parse_arguments(
        "mllm", PRESETS, extra=LanguageModelArguments, training_arguments=PumaTrainingArguments
    )
    if Path(stage.out).exists():
        return
    texts = load_pictures(stage.data)["train"].texts
    encoder = CLIPVisionModel.from_pretrained(options.encoder)
    features = load_cache(options.cache, "train")["features"]
    processor = (
        PumaProcessor.from_pretrained(options.processor) if options.processor else build_processor(texts, encoder)
    )
    torch.manual_seed(arguments.seed)
    model = build_model(processor, encoder, options)
    standardize_feature_heads(model, *feature_statistics(features.split(512), features.shape[1]))
    train(model, processor, stage, arguments, options, TaskMix(tuple(options.shares)))


if __name__ == "__main__":
    main()
