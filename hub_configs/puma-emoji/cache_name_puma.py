"""What the installed transformers calls the cache of keys and values, in arguments and outputs: 5.24 renamed it."""

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
