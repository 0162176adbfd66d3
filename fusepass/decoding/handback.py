"""What the loop leaves to Hugging Face's, because it could not do exactly the same."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria
from transformers.generation import utils as generation
from transformers.generation.configuration_utils import GenerationMode

# Functions of their arguments alone, and none of them waits for the device. A processor that keeps a state would be
# called for surplus tokens as well, and one that reads scores on the host would stall every step.
PROCESSORS = frozenset(
    {
        processors.EpsilonLogitsWarper,
        processors.EtaLogitsWarper,
        processors.InfNanRemoveLogitsProcessor,
        processors.LogitNormalization,
        processors.MinLengthLogitsProcessor,
        processors.MinNewTokensLengthLogitsProcessor,
        processors.MinPLogitsWarper,
        processors.RepetitionPenaltyLogitsProcessor,
        processors.SuppressTokensAtBeginLogitsProcessor,
        processors.SuppressTokensLogitsProcessor,
        processors.TemperatureLogitsWarper,
        processors.TopKLogitsWarper,
        processors.TopPLogitsWarper,
        processors.TypicalLogitsWarper,
    }
)
CRITERIA = frozenset({criteria.EosTokenCriteria, criteria.MaxLengthCriteria})
INPUTS = frozenset({"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"})
# A model that has one of these of its own prepares its steps in its own way.
METHODS = ("_sample", "_update_model_kwargs_for_generation", "prepare_inputs_for_generation")
# The release that brought this class marks the caches that users give (`_is_user_defined`).
CACHES_ARE_MARKED = hasattr(generation, "DeferredStopCheck")


def obstacle(model: Any, prepared: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
    """Why this call of `generate` is not one for the loop, in words; None if it is one.

    `prepared` is what `generate` gives its loops, by name, `model_kwargs` what it gives the model.
    """
    input_ids, config = prepared["input_ids"], prepared["generation_config"]
    return (
        _of_the_model(model, input_ids)
        or _of_the_request(prepared["logits_processor"], prepared["stopping_criteria"], config, model_kwargs)
        or _of_the_inputs(model, input_ids, config, model_kwargs)
    )


def _of_the_model(model: Any, input_ids: Tensor) -> str | None:
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if model.training:  # dropout draws random numbers, in surplus steps too
        return f"{type(model).__name__} is in training mode"
    if torch.is_grad_enabled():  # the kept cache would hold the graph of all calls
        return "gradients are enabled"
    for name in METHODS:
        if getattr(getattr(model, name), "__func__", None) is not getattr(GenerationMixin, name):
            return f"{type(model).__name__} has its own {name}"
    if not model._can_compile_fullgraph:
        return f"{type(model).__name__} can not be compiled with a static cache"
    # The others take their mask as something else than a tensor of the cache's length.
    if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
        return f"the attention implementation is {attention!r}"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if input_ids.device.type not in ("cuda", "cpu") or input_ids.device != model.device:
        return f"the tokens are on {input_ids.device} and the model on {model.device}"
    if torch.is_autocast_enabled(model.device.type):  # keys in f32 and values in bf16 do not fit one static cache
        return "autocast is enabled"
    if model._extract_generation_mode_kwargs(None, {}, None, None, None)["synced_gpus"]:
        return "FSDP or ZeRO-3 needs every process to take every step"
    return None


def _of_the_request(
    logits_processor: list[Any], stopping_criteria: Any, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> str | None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode is {mode.value}"
    for name in ("output_attentions", "output_hidden_states", "output_logits", "output_scores", "is_assistant"):
        if getattr(config, name, None):
            return f"{name} is set"
    if not model_kwargs.get("use_cache"):
        return "use_cache is off"
    for part in (*logits_processor, *stopping_criteria):
        if type(part) not in PROCESSORS | CRITERIA:
            return f"{type(part).__name__} is not known to be a function of the tokens alone"
    for part in stopping_criteria:
        if type(part) is criteria.MaxLengthCriteria and part.max_length != config.max_length:
            return f"a criterion stops at {part.max_length} tokens and max_length is {config.max_length}"
    if config._pad_token_tensor is None and any(type(part) is criteria.EosTokenCriteria for part in stopping_criteria):
        return "there is no token to pad with"
    return None


def _of_the_inputs(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> str | None:
    for name, item in model_kwargs.items():
        if item is not None and name not in INPUTS:
            return f"'{name}' is passed to the model"
    text = model.config.get_text_config(decoder=True)
    pad = config._pad_token_tensor
    # Rows that have ended are fed it: in surplus steps all of them.
    if pad is not None and len(input_ids) > 1 and not 0 <= int(pad) < text.vocab_size:
        return f"the model has no embedding for the pad token, {int(pad)}"
    cache = model_kwargs.get("past_key_values")
    layers: Any
    if ours := is_ours_to_choose(cache, config):
        if config.cache_implementation not in (None, "static"):
            return f"cache_implementation is {config.cache_implementation!r}"
        layers, past = StaticCache(config=text, max_cache_len=1).layers, 0
    elif type(cache) is not StaticCache:
        return f"the cache is a {type(cache).__name__}, not a static one (cache_implementation='static')"
    elif cache.offloading:
        return "the cache is offloaded"
    else:
        layers, past = cache.layers, int(cache.get_seq_length())
    if layer := next((layer for layer in layers if type(layer) is not StaticLayer), None):
        return f"a layer of the cache is a {type(layer).__name__}"

    if past and getattr(config, "prefill_chunk_size", None):  # Hugging Face's loop feeds those in the cache again
        return f"the prompt comes in chunks, with {past} tokens in the cache"
    mask, given, length = model_kwargs.get("attention_mask"), input_ids.shape[1], prompt_length(config, model_kwargs)
    if length is None:
        return "there is no attention mask of two dimensions"
    if length not in (past + given, given) or length <= past:
        return f"the attention mask has {length} columns, for {given} tokens after {past} in the cache"
    if mask is not None and not mask[:, -1].all():
        return "the prompts are padded on the right"
    need = length + config.max_length - given - 1
    # Surplus steps would look up positions that are not there, or change those of a dynamic rotary embedding; Hugging
    # Face's loop warns; and who sets no limit wants no cache of that length.
    if need > (most := getattr(text, "max_position_embeddings", None) or math.inf):
        return f"the model has {most} positions, and {need} may come"
    if not ours and layers[0].max_cache_len < need:
        return f"the cache has room for {layers[0].max_cache_len} tokens, and {need} may come"
    # The releases that have this argument do not count given positions on.
    if model_kwargs.get("position_ids") is not None and "cache_position" in inspect.signature(model.forward).parameters:
        return "'position_ids' is passed to the model"
    return None


def is_ours_to_choose(cache: Any, config: GenerationConfig) -> bool:
    """Whether `generate` made `cache` for this call alone, so that another may take its place; False where transformers
    does not tell."""
    if not CACHES_ARE_MARKED or cache is None or config.return_dict_in_generate:
        return False
    return not getattr(cache, "_is_user_defined", False)


def prompt_length(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens the cache holds after the prompt: the columns of the attention mask. Newer releases drop a mask
    that hides nothing, and keep their number."""
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return getattr(config, "_mask_length", None)
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
