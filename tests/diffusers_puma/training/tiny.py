"""A tiny decoder, rows and trainer; as a script, a run of it that the tests kill or spread over processes."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from diffusers_puma.training import PumaDecoderTrainer, PumaDecoderTrainingArguments
from diffusers_puma.unet_puma import PumaUNet2DConditionModel
from tests.killing import KillInStep, write_result

CHANNELS = 12
EPSILON = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VELOCITY = {**EPSILON, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def tiny_unet(num_tokens: int = 4, **kwargs) -> PumaUNet2DConditionModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "encoder_hid_dim": CHANNELS,
        "encoder_hid_dim_type": "text_proj",
    }
    return PumaUNet2DConditionModel(num_tokens=num_tokens, **{**defaults, **kwargs})


def rows(count: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "latents": torch.randn(4, 8, 8, generator=generator),
            "features": torch.randn(16, CHANNELS, generator=generator),
        }
        for _ in range(count)
    ]


def trainer(
    folder, unet=None, schedule=VELOCITY, callbacks=None, train_dataset=None, components=None, **arguments
) -> PumaDecoderTrainer:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return PumaDecoderTrainer(
        unet or tiny_unet(),
        PumaDecoderTrainingArguments(**arguments),
        noise_scheduler=DDPMScheduler(**schedule),
        train_dataset=train_dataset or rows(),
        eval_dataset=rows(5) if train_dataset is None else train_dataset,
        callbacks=callbacks,
        **(components or {"null_features": torch.zeros(1, 16, CHANNELS)}),
    )


def main(folder: str, options: str) -> None:
    """Trains in `folder`, goes on where it stands, and leaves the result of each process in `folder`/rank_<r>.

    `kill_in_step` is where it kills itself, `again_from` the checkpoint from which it then trains a second time.
    """
    options = json.loads(options)
    again_from = options.pop("again_from", None)
    callbacks = [KillInStep(options.pop("kill_in_step"))] if "kill_in_step" in options else None
    run = trainer(folder, callbacks=callbacks, **options)
    run.train(resume_from_checkpoint=True)
    if again_from is not None:
        run = trainer(folder, **options)
        run.train(resume_from_checkpoint=f"{folder}/checkpoint-{again_from}")
    evaluated = run.evaluate()["eval_loss"]
    result = Path(folder, f"rank_{run.args.process_index}")
    write_result(run, result)
    result.with_suffix(".eval").write_text(str(evaluated))


if __name__ == "__main__":
    main(*sys.argv[1:])
