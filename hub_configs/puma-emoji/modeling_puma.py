"""PUMA's language model: encode images, pool them, splice them into the text, run a stock decoder, read both heads.

This file knows no pictures beyond `pixel_values` and no decoder: it takes and gives features.

Legend: B rows, T positions, n images (in the order of their placeholders, row by row), C feature channels, H hidden
size, k_i tokens of scale i, S = sum of all k_i (`config.image_seq_length`).
"""

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache_name_puma import CACHE
from .configuration_puma import PumaConfig
from .granularity import flatten_scales, multigranular_features
from .image_decoding_puma import parent_of_position
from .image_head_puma import PumaFlowHead, PumaRegressionHead
from .image_positions_puma import ImagePositions, blockwise_causal_mask, splice, with_noise
from .interleaved_puma import PumaInterleavedGenerationMixin
from .loss_puma import image_loss, is_supervised_text, squared_error, text_loss
from .outputs_puma import PumaCausalLMOutputWithPast, PumaModelOutputWithPast
from .pretrained_puma import PumaPreTrainedModel


class PumaModel(PumaPreTrainedModel):
    """Encoder, projector and language model, without heads."""

    # A checkpoint of the whole model holds the heads as well.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^image_head\."]

    def __init__(self, config: PumaConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = nn.Linear(config.vision_config.hidden_size, hidden_size)
        if config.image_decoding != "autoregressive":
            self.image_queries = nn.Embedding(config.image_seq_length, hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """(n, 3, height, width) -> `{scale: (n, k_scale, C)}`: patch features before the last layernorm, class token
        dropped, pooled (report section 3.1).

        Without gradient: the encoder defines the regression targets and is frozen in every stage (report section 3.2).
        """
        if not len(pixel_values):
            raise ValueError("pixel_values holds no pictures: leave it out")
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state[:, 1:]
        return dict(enumerate(multigranular_features(features, self.config.num_scales)))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """`last_hidden_state`: (n, S, C) encoder features, coarsest first; `pooler_output`: (n, S, H), what the
        language model reads of them."""
        features = flatten_scales(self.encode_image(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.read_states(features))

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features.to(self.projector.bias.dtype))  # the weight may be quantised

    def read_states(self, features: torch.Tensor) -> torch.Tensor:
        """(n, m, C), the first m tokens of images -> (n, m, H), what is fed of images that are given, see
        `image_decoding_puma`."""
        states = self._project(features)
        if self.config.image_decoding == "autoregressive":
            return states
        return states + self.image_queries(torch.arange(features.shape[1], device=features.device))

    def written_states(self, features: torch.Tensor, positions: slice) -> torch.Tensor:
        """What is fed at some positions of images that are being written, see `image_decoding_puma`.

        Args:
            features: (n, m, C), what the images hold so far, coarsest first.
            positions: which to feed; with `autoregressive` they are among the m, with `next_scale` their parents.

        Returns:
            (n, number of positions, H).
        """
        if self.config.image_decoding == "autoregressive":
            return self._project(features[:, positions])
        places = torch.arange(self.config.image_seq_length, device=features.device)[positions]
        queries = self.image_queries(places).expand(len(features), -1, -1)
        if self.config.image_decoding == "prefilled" or positions.stop <= self.config.tokens_per_scale[-1]:
            return queries
        parents = parent_of_position(self.config.tokens_per_scale).to(features.device)[positions]
        states = self._project(features[:, parents.clamp(min=0)])
        return queries + torch.where((parents < 0)[:, None], 0, states)

    def embed(
        self,
        input_ids: torch.LongTensor,
        features: torch.Tensor,
        image_loss_mask: torch.Tensor | None,
        feature_noise: float = 0.0,
        states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ImagePositions]:
        """Embeddings (B, T, H) of text and images.

        Args:
            features: (n, S, C), the images.
            image_loss_mask, feature_noise: see `forward`.
            states: (n, S, H), `read_states` of the features, if that was done already.
        """
        positions = ImagePositions.find(input_ids, self.config.image_token_id)
        num_tokens = self._check_images(positions, features if states is None else states)
        if image_loss_mask is not None and image_loss_mask.shape != features.shape[:1]:
            raise ValueError(
                f"image_loss_mask has shape {tuple(image_loss_mask.shape)}: expected one bool for each of the "
                f"{features.shape[0]} images"
            )
        # What no row has room for is most of the images where rows end after a coarse scale.
        given = with_noise(features, feature_noise, num_tokens) if feature_noise else features[:, :num_tokens]
        states = self.read_states(given) if states is None or feature_noise else states[:, :num_tokens]
        if self.config.image_decoding != "autoregressive" and image_loss_mask is not None:
            written = self.written_states(given, slice(0, num_tokens))
            states = torch.where(image_loss_mask.to(states.device, torch.bool)[:, None, None], written, states)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        return splice(inputs_embeds, states, positions, self._is_read(positions, image_loss_mask)), positions

    def _is_read(self, positions: ImagePositions, image_loss_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool: image positions whose feature the language model sees.

        `input_scales` hides scales of images that are given, never of those that are written; a hidden position
        keeps the placeholder's embedding.
        """
        if self.config.input_scales is None:
            return positions.mask
        scales = positions.scales(self.config.tokens_per_scale)
        visible = torch.isin(scales, torch.tensor(self.config.input_scales, device=scales.device))
        return (positions.mask & visible) | positions.of_images(image_loss_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        read_features: torch.Tensor | None = None,
        feature_noise: float = 0.0,
        attention_blocks: torch.Tensor | None = None,
        run_image_modules: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PumaModelOutputWithPast:
        """
        Args:
            input_ids: (B, T); each image is a run of placeholders.
            pixel_values: (n, 3, height, width), one for each run in `input_ids`, row by row.
            past_key_values, cache: keys and values of what came before, by its old or its new name.
            image_features: (n, S, C) encoder features, coarsest first, in place of `pixel_values`.
            image_loss_mask: (n,) bool, images that the model writes (or wrote): they are fed as
                `config.image_decoding` says, and `input_scales` does not hide anything of them.
            read_features: (n, S, C), read in place of the images' own features, which stay regression targets.
            feature_noise: standard deviation of noise on the features that are read, in units of each channel's own
                over the batch, drawn up to this for each image; regression targets stay clean.
            attention_blocks: (B, T) long, with `inputs_embeds` only: positions of equal numbers from 0 see each other
                beside what causality lets them see; -1 for none.
            run_image_modules: for text alone too, and the encoder for features. Sharded training (FSDP, ZeRO-3) waits
                for ever if one process runs a module that another does not.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; images without `input_ids` or from more
                than one source; if any are given, a number of images that differs from the runs of placeholders or
                from `image_loss_mask`; `read_features` of another shape or without images; an attention implementation
                that cannot do what `image_decoding` needs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        cache = past_key_values if cache is None else cache
        encoded = (mm_encoder_outputs or {}).get("image")
        sources = [source for source in (pixel_values, image_features, encoded) if source is not None]
        if len(sources) > 1:
            raise ValueError("images must come from one of pixel_values, image_features and mm_encoder_outputs")
        if sources and inputs_embeds is not None:
            raise ValueError("images are placed by their placeholders in input_ids, but only inputs_embeds was given")
        if encoded is not None and encoded.last_hidden_state is None:
            raise ValueError("mm_encoder_outputs has no last_hidden_state: expected what get_image_features returns")

        if pixel_values is not None:
            image_features = flatten_scales(self.encode_image(pixel_values))
        elif encoded is not None:
            image_features = encoded.last_hidden_state
        elif image_features is not None and run_image_modules:
            self.encode_image(self._blank_pixels(image_features.device))
        shapes = [None if features is None else tuple(features.shape) for features in (read_features, image_features)]
        if shapes[0] not in (None, shapes[1]):
            raise ValueError(f"read_features have shape {shapes[0]}, the images {shapes[1]}: expected the same")
        positions = None
        if image_features is not None:
            states = encoded.pooler_output if encoded is not None and read_features is None else None
            read = image_features if read_features is None else read_features
            inputs_embeds, positions = self.embed(input_ids, read, image_loss_mask, feature_noise, states)
            if self.config.image_decoding == "next_scale":
                attention_blocks = positions.scale_blocks(self.config.tokens_per_scale)
        elif input_ids is not None:
            blank = 0 * self._blank_image(input_ids.device) if run_image_modules else None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = inputs_embeds if blank is None else inputs_embeds + blank.to(inputs_embeds.device)

        if attention_blocks is not None:
            attention_mask = blockwise_causal_mask(
                self.language_model.config, inputs_embeds, attention_mask, cache, position_ids, attention_blocks
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        return PumaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=image_features,
            image_positions=positions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _blank_image(self, device: torch.device) -> torch.Tensor:
        """A finite number that depends on every module that images pass, run in their order (see `embed`).

        No parameter may be read before its turn either: under ZeRO-3 reading one gathers it from all processes.
        """
        features = flatten_scales(self.encode_image(self._blank_pixels(device)))
        states = self.read_states(features)
        if self.config.image_decoding != "autoregressive":
            states = states + self.written_states(features, slice(0, features.shape[1]))
        return states.mean()  # a sum may leave the range of fp16

    def _blank_pixels(self, device: torch.device) -> torch.Tensor:
        size = self.config.vision_config.image_size
        return torch.zeros(1, 3, size, size, device=device)

    def _check_images(self, positions: ImagePositions, images: torch.Tensor) -> int:
        """How many tokens of the images (n, S, ...) there are placeholders for: those of the longest run."""
        runs = positions.image[-1, -1] + 1
        longest = torch.where(positions.mask, positions.offset + 1, 0).max()
        if torch.compiler.is_compiling():
            # Looking at values would split the graph.
            fits = (runs == images.shape[0]) & (longest <= images.shape[1])
            torch._assert_async(fits, "the images are not as many or as long as their placeholders")
            return images.shape[1]
        if runs != images.shape[0]:
            raise ValueError(f"the text holds {int(runs)} images, but {images.shape[0]} were given")
        if images.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"images of {images.shape[1]} tokens were given: expected the {self.config.image_seq_length} of all "
                f"scales {self.config.tokens_per_scale}, coarsest first"
            )
        if longest > images.shape[1]:
            raise ValueError(f"a run of image placeholders is longer than the {images.shape[1]} tokens of an image")
        return int(longest)


class PumaForConditionalGeneration(PumaPreTrainedModel, PumaInterleavedGenerationMixin):
    """PUMA's language model with its text head and its image head (report section 3.3)."""

    # The loss takes two counts of its own, not the Trainer's `num_items_in_batch`.
    accepts_loss_kwargs = False
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PumaConfig):
        super().__init__(config)
        self.model = PumaModel(config)
        self.image_head = self._make_image_head()
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Backbones differ in the name of their embedding (`embed_tokens`, `wte`, ..).
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # Stock text generation must not open an image that nothing would fill; `generate_interleaved` lifts this.
        self.generation_config = GenerationConfig.from_model_config(config)
        ids = config.image_start_token_id, config.image_end_token_id, config.image_token_id
        self.generation_config.suppress_tokens = list(ids)
        self.post_init()

    def _make_image_head(self) -> PumaRegressionHead | PumaFlowHead:
        config = self.config
        hidden_size, feature_size = config.text_config.hidden_size, config.vision_config.hidden_size
        if config.image_head == "regression":
            return PumaRegressionHead(hidden_size, feature_size)
        width = config.flow_width or hidden_size
        return PumaFlowHead(hidden_size, feature_size, config.num_scales, width, config.flow_num_layers)

    def encode_image(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """(n, 3, height, width) -> `{scale: (n, k_scale, C)}`, see `PumaModel.encode_image`."""
        return self.model.encode_image(pixel_values)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `PumaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        num_text_items: torch.Tensor | int | None = None,
        num_image_items: torch.Tensor | int | None = None,
        image_features: torch.Tensor | None = None,
        feature_noise: float = 0.0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        run_image_modules: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PumaCausalLMOutputWithPast:
        """See `PumaModel.forward` for the sequence and its images; with `labels`, `run_image_modules` is on.

        Args:
            labels: (B, T) supervised text tokens, -100 or an image's id elsewhere; without them none is.
            image_loss_mask: (n,) bool, images that are regression targets; without it none is.
            num_text_items, num_image_items: supervised text and image tokens of the global batch, the two
                denominators of the loss; by default those of this batch.
            logits_to_keep: logits for the last that many positions only, or for the positions in a tensor; 0 for all.
            skip_logits: no logits but those that the loss needs: most positions of an image have no label, and with a
                large vocabulary their logits are most of the memory. `logits` is then None.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            image_loss_mask=image_loss_mask,
            feature_noise=feature_noise,
            run_image_modules=run_image_modules or labels is not None,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if skip_logits else self.lm_head(hidden_states[:, kept])

        losses = {}
        if labels is not None:
            text = self._text_loss(hidden_states, logits, labels, num_text_items)
            images = self._image_losses(outputs, image_loss_mask, num_image_items)
            weights = self.config.text_loss_weight, self.config.image_loss_weight
            loss = weights[0] * text + weights[1] * images["image_loss"].to(text.device)
            losses = {"loss": loss, "text_loss": text} | images
        return PumaCausalLMOutputWithPast(
            **losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=outputs.image_features,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _text_loss(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.LongTensor,
        num_items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        has_all = logits is not None and logits.shape[1] == hidden_states.shape[1]
        states = logits if has_all else hidden_states
        labels = labels.to(states.device)
        supervised = is_supervised_text(labels, self.config.image_token_id)
        states = states[:, :-1][supervised]
        return text_loss(states if has_all else self.lm_head(states), labels[:, 1:][supervised], num_items)

    def _image_losses(
        self,
        outputs: PumaModelOutputWithPast,
        image_loss_mask: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """What the output holds of the images to be written, each predicted from the state that `image_decoding`
        says."""
        hidden_states = outputs.last_hidden_state
        device = hidden_states.device
        weights = torch.tensor(self.config.scale_loss_weights, dtype=torch.float32, device=device)
        if outputs.image_positions is None:
            states, scales = hidden_states[0, :0], torch.zeros(0, dtype=torch.long, device=device)
            target = states.new_zeros(0, self.config.vision_config.hidden_size)
        else:
            positions, features = outputs.image_positions.to(device), outputs.image_features.to(device)
            supervised = positions.of_images(image_loss_mask)
            is_shifted = self.config.image_decoding == "autoregressive"
            states = hidden_states[:, :-1][supervised[:, 1:]] if is_shifted else hidden_states[supervised]
            places = positions.image[supervised], positions.offset[supervised]
            scales, target = positions.scales(self.config.tokens_per_scale)[supervised], features[places]
        if self.config.image_head == "flow":
            predicted, target = (pair.to(device) for pair in self.image_head.loss_pair(states, target, scales))
        else:
            predicted = self.image_head(states).to(device)
        error = squared_error(predicted.detach(), target)
        per_scale = torch.zeros_like(weights).index_add(0, scales, error)
        losses = {
            "image_loss": image_loss(predicted, target, scales, weights, num_items),
            "scale_losses": per_scale / torch.bincount(scales, minlength=len(weights)),
        }
        if outputs.image_positions is not None and self.config.image_head == "regression":
            losses["predicted_features"] = features.index_put(places, predicted.detach().to(features))
        return losses
