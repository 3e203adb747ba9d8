"""What the language model predicts of an image whose true features it is shown, as in training."""

import torch

from ..granularity import scale_of_position, split_scales
from ..image_positions_puma import ImagePositions
from ..modeling_puma import PumaForConditionalGeneration


@torch.no_grad()
def teacher_forced_features(
    model: PumaForConditionalGeneration,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    target_features: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Each feature predicted from the true ones before it; `generate_image_features` predicts from its own.

    Args:
        input_ids, attention_mask: (B, T) prompts as for `generate_image_features`, left-padded, ending with `[IMG]`.
        target_features: (B, S, C), the true features of the image that follows each prompt, coarsest scale first.
        pixel_values: (n, 3, height, width), the images in the prompts, row by row.
        noise: (B, S, C) unit noise, for a model that samples features.

    Returns:
        `{scale: (B, k_scale, C)}`.
    """
    config, length = model.config, model.config.image_seq_length
    counts = ImagePositions.find(input_ids, config.image_token_id).counts()
    images, is_target = _with_targets(model, counts, target_features, pixel_values)

    ids = torch.cat([input_ids, input_ids.new_full((len(input_ids), length), config.image_token_id)], dim=1)
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), length)], dim=1)
    hidden_states = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        image_features=images,
        image_loss_mask=is_target,
    ).last_hidden_state
    # As in `image_decoding_puma`: from the state before a feature, or from its own.
    stop = -1 if config.image_decoding == "autoregressive" else None
    states = hidden_states[:, -length + (stop or 0) : stop]
    scales = scale_of_position(config.tokens_per_scale).to(states.device)
    predicted = model.predict_features(states, scales, noise)
    return split_scales(predicted, config.tokens_per_scale)


def _with_targets(
    model: PumaForConditionalGeneration,
    counts: list[int],
    target_features: torch.Tensor,
    pixel_values: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of all rows in order, (n + B, S, C), each row's target behind those of its prompt; and which are
    targets, (n + B,) bool."""
    given = target_features[:0]
    if pixel_values is not None:
        given = model.get_image_features(pixel_values, return_dict=True).last_hidden_state.to(target_features)
    rows = zip(given.split(counts), target_features, strict=True)
    images = torch.cat([torch.cat([group, target[None]]) for group, target in rows])
    flags = [flag for count in counts for flag in (*[False] * count, True)]
    return images, torch.tensor(flags, device=images.device)
