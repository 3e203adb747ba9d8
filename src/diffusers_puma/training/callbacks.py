"""What a decoder's training shows of itself."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..unet_puma import PumaUNet2DConditionModel


class DecoderTensorBoardCallback(TensorBoardCallback):
    """The stock callback asks a model's config for its JSON, and diffusers' configs are plain dicts."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PumaUNet2DConditionModel,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None:
            self.tb_writer.add_text("model_config", model.to_json_string())
