"""Configurations of test size, of any model: by what transformers calls its sizes.

What a rule does not name keeps its default, and what a configuration derives from its sizes (the kinds of its layers,
the size of its heads) it derives again.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 160
FIRST_TOKEN = 32
"""The smallest token that means nothing special (an image, the end) in a shrunk configuration."""
MOST_LAYERS = 8

_SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim input_embedding_size"
    " output_embedding_size lru_width rotary_embed_dim backbone_hidden_size hidden_size_global"
    " router_hidden_size pronunciation_embed_dim shape_embed_dim out_hidden_size output_channels ple_embed_dim",
    96: "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_dim"
    " moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size"
    " intermediate_size_mlp dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth"
    " num_encoder_layers num_blocks num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok moe_k moe_topk"
    " moe_top_k num_experts_per_token linear_num_key_heads swa_num_key_value_heads num_query_groups"
    " conf_num_hidden_layers num_global_layers index_n_heads mamba_n_groups n_groups o_groups zero_expert_num"
    " num_layers_per_stack",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
    " num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts"
    " moe_num_experts linear_num_value_heads linear_num_heads swa_num_attention_heads altup_num_inputs"
    " conf_num_attention_heads",
    16: "head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size"
    " dim_head d_head kv_channels qk_nope_head_dim v_head_dim swa_head_dim index_head_dim rotary_dim mamba_chunk_size"
    " chunk_size ssm_state_size state_size mamba_d_state time_step_rank index_topk laurel_rank"
    " hidden_size_per_layer_input mamba_d_head mamba_head_dim adapter_rank num_centroids codebook_size global_head_dim",
    8: "num_position_embeddings embed_dim hc_lowrank mamba_n_heads mamba_num_heads n_mamba_heads mamba_dt_rank",
    32: "q_lora_rank kv_lora_rank o_lora_rank image_size prompt_length prompt_types segment_types",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"
    " model_max_length context_length sliding_window attention_chunk_size local_attention window_size"
    " attention_window_size sliding_window_size ngram_vocab_size_base",
    1: "first_k_dense_replace num_dense_layers n_group topk_group num_expert_group n_shared_experts"
    " num_shared_experts moe_num_shared_experts num_kv_shared_layers num_mem_blocks",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size shape_vocab_size"
    " audio_vocab_size encoder_hash_byte_group_vocab",
}
RULES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
# A decoder; weights large enough that a wrong layer shows in the logits; nothing drawn at random.
RULES |= {"is_decoder": True, "initializer_range": 0.125}

_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 7, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 48), "attn_layers": ("local", "lsh")},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""By model type: what the rules do not get right, or what has no default."""


def shrunk(model_type: str) -> PretrainedConfig:
    """The configuration that `model_type` stands for in transformers, at test size. Raises what its class raises."""
    return _shrink(CONFIG_MAPPING[model_type]())


def _shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same class as `config`, and the configurations inside it, at test size."""
    changes: dict[str, Any] = {}
    for name, default in vars(config).items():
        if isinstance(default, PretrainedConfig):
            changes[name] = _shrink(default)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
            changes[name] = default % FIRST_TOKEN
        elif name in RULES and (default is not None or name in ("head_dim", "num_key_value_heads")):
            rule = RULES[name]
            changes[name] = min(default, rule) if type(default) is int else rule
    # As many kv heads as heads stay as many.
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads == groups and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    kinds = getattr(config, "layer_types", None)
    if kinds and "num_hidden_layers" in changes:
        # Enough layers for one of each kind.
        changes["num_hidden_layers"] = min(max(2, *(kinds.index(kind) + 1 for kind in kinds)), MOST_LAYERS)
    return type(config)(**{**changes, **_SPECIAL.get(config.model_type, {})})
