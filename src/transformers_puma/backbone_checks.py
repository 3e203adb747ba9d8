"""What PUMA needs of a pretrained language model, seen from what it computes: each architecture has its own names for
what it adds."""

import torch
from transformers import MODEL_MAPPING, PreTrainedModel

from .cache_name_puma import CACHE
from .modeling_puma import PumaModel


@torch.no_grad()
def require_plain_decoder(name: str, language_model: PreTrainedModel) -> None:
    """Raises `ValueError` unless this is a causal model with a cache whose logits are one Linear of its last states.

    Args:
        name: where it is from, for the message.
    """
    kind, base_model = language_model.config.model_type, language_model.base_model
    if type(base_model) is not MODEL_MAPPING[type(language_model.config)]:
        raise ValueError(f"{name} ({kind}) is no decoder-only model: it is the decoder of a larger one")
    # Two texts that differ in the last token.
    input_ids = torch.tensor([[3, 2, 1, 0], [3, 2, 1, 4]])
    outputs = base_model(input_ids, use_cache=True)
    states = outputs.last_hidden_state
    tolerance = 8 * torch.finfo(states.dtype).eps * states.abs().max().item()
    embeddings = base_model.get_input_embeddings()(input_ids)
    try:
        # As those of pictures, the last two are of no token.
        embedded = base_model(inputs_embeds=torch.cat([embeddings, embeddings / 2])).last_hidden_state[:2]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} ({kind}) cannot read embeddings in place of tokens: {error}") from error
    if not torch.allclose(embedded, states, rtol=0, atol=tolerance):
        raise ValueError(f"{name} ({kind}) computes other states of embeddings than of their tokens")
    if not torch.allclose(states[0, :-1], states[1, :-1], rtol=0, atol=tolerance):
        raise ValueError(f"{name} ({kind}) is not causal: it reads what follows a token")
    cache = outputs.get(CACHE)
    if cache is None or all(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise ValueError(f"{name} ({kind}) has no cache of keys and values, which drawing needs")

    head, seen = language_model.get_output_embeddings(), {}

    def watch(module, args, output):
        # Larger than any real logits, so that a soft cap shows.
        seen["input"], seen["output"] = args[0], output * 100
        return seen["output"]

    hook = head.register_forward_hook(watch)
    logits = language_model(input_ids).logits
    hook.remove()
    reads_states = torch.allclose(seen["input"], states, rtol=0, atol=tolerance)
    is_plain = reads_states and torch.equal(seen["output"].to(logits.dtype), logits)
    if not is_plain or head.bias is not None:
        raise ValueError(
            f"{name} ({kind}) computes its logits from the last hidden state by more than one Linear without bias, "
            "which PUMA cannot"
        )


@torch.no_grad()
def require_separate_rows(language_model: PreTrainedModel) -> None:
    """Raises `ValueError` if rows that are packed into one sequence would see each other.

    Some architectures (OPT, BLOOM) make their mask without a look at the position ids.
    """
    # Two sequences of two rows, of which the second is the same.
    sequences = torch.tensor([[3, 2, 1, 0], [4, 5, 1, 0]], device=language_model.device)

    def difference(position_ids: list[int]) -> torch.Tensor:
        """Between the states of the second rows."""
        positions = torch.tensor([position_ids], device=language_model.device)
        states = [
            language_model(input_ids=ids[None], position_ids=positions, use_cache=False).last_hidden_state[:, 2:]
            for ids in sequences
        ]
        return (states[0] - states[1]).abs().max()

    packed, joined = difference([0, 1, 0, 1]), difference([0, 1, 2, 3])
    # Of packed rows it is rounding, and what the rows before do to these otherwise.
    if packed > joined / 2:
        raise ValueError(
            f"packing=True does not work with this language model ({language_model.config.model_type}), in which "
            "packed rows see each other: expected packing=False"
        )


@torch.no_grad()
def require_blocks(model: PumaModel) -> None:
    """Raises `ValueError` if the language model cannot let tokens of one scale see each other.

    Some architectures take no mask with blocks (OPT, BLOOM) or put their own over it (GPT Neo).
    """
    kind = model.config.text_config.model_type
    expected = "expected image_decoding='autoregressive' or 'prefilled'"
    # Two sequences that differ in the last token of a block; of noise, for what a model has learnt of two tokens may
    # be the same but for rounding.
    blocks = torch.tensor([[-1, 0, 0, -1]], device=model.device).expand(2, -1)
    learnt = model.get_input_embeddings()(torch.arange(4, device=model.device))
    noise = torch.randn(learnt.shape, generator=torch.Generator().manual_seed(0)).to(learnt)
    embeddings = (noise * learnt.std()).repeat(2, 1, 1)
    embeddings[1, 2] *= -1
    try:
        states = model(inputs_embeds=embeddings, attention_blocks=blocks, use_cache=False).last_hidden_state[:, 1]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{kind} has no room for image_decoding='next_scale' ({error}): {expected}") from error
    tolerance = 8 * torch.finfo(states.dtype).eps * states.abs().max().item()
    if torch.allclose(states[0], states[1], rtol=0, atol=tolerance):
        raise ValueError(f"{kind} masks what image_decoding='next_scale' lets tokens of a scale see: {expected}")
