"""Sizes of tiny models, and per architecture what the generic sizes cannot make consistent."""

from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS = 64, 4, 2, 16, 96, 4

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"], HIDDEN),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "d_kv", "dim_head", "d_head", "attention_head_size", "kv_channels"], HEAD_DIM),
    **dict.fromkeys(["intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff", "dff"], INNER),
    **dict.fromkeys(["dim_ff", "d_inner", "feed_forward_size", "ffn_hidden_size", "n_inner", "hidden_dim"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 48),
    **dict.fromkeys(["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"], 48),
    **dict.fromkeys(["shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp"], 80),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["max_source_positions", "max_target_positions", "model_max_length"], 64),
    "original_max_position_embeddings": 32,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 32),
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "rotary_dim": 8,
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size", "attention_window_size"], 8),
    **dict.fromkeys(["index_n_heads"], 2),
    "index_head_dim": 16,
    "index_topk": 8,
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 16),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["image_size", "crop_size"], 32),
    "patch_size": 8,
    "num_mel_bins": 16,
    "first_k_dense_replace": 1,
    **dict.fromkeys(["src_vocab_size", "tgt_vocab_size", "entity_vocab_size", "vocab_size_per_layer_input"], 128),
    "hidden_size_per_layer_input": 16,
}


_WINDOWS = {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "patch_size": 2}


def _codebooks(config: Any, tokens: Any, drawn: Any) -> dict[str, Any]:
    return {"input_ids": tokens.repeat(config.decoder.num_codebooks if hasattr(config, "decoder") else 4, 1)}


def _features(*shape: int) -> Any:
    """A spoken sentence as features, and the tokens written so far."""

    def inputs(config: Any, tokens: Any, drawn: Any) -> dict[str, Any]:
        decoder = {"decoder_input_ids": tokens[:, :7]} if config.is_encoder_decoder else {}
        return {"input_features": drawn(len(tokens), *shape), **decoder}

    return inputs


def _both(config: Any, tokens: Any, drawn: Any) -> dict[str, Any]:
    return {"input_ids": tokens, "pixel_values": drawn(len(tokens), 3, 32, 32)}


def _waveform(config: Any, tokens: Any, drawn: Any) -> dict[str, Any]:
    decoder = {"decoder_input_ids": tokens[:, :7]} if config.is_encoder_decoder else {}
    return {"input_values": drawn(len(tokens), 4000), **decoder}


# By model_type, or by the full name for inputs alone. set: values for its configuration.
# inputs: (config, tokens [B, T], drawn) → keyword arguments of one call.
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "set": {"max_length": 32},
        "inputs": lambda config, tokens, drawn: {"input_values": drawn(len(tokens), 32, 16)},
    },
    "clip": {"inputs": _both},
    "convnext": {"set": {"patch_size": 2, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}},
    "esm": {"set": {"pad_token_id": 0}},
    "funnel": {"set": {"block_sizes": [1, 1], "num_decoder_layers": 1}},
    "hiera": {"set": {"image_size": [32, 32], "depths": [1, 1, 1, 1], "patch_stride": [2, 2], "patch_kernel": [3, 3]}},
    "moonshine": {"inputs": _waveform},
    "segformer": {"inputs": lambda config, tokens, drawn: {"pixel_values": drawn(len(tokens), 3, 64, 64)}},
    "siglip": {"inputs": _both},
    "speech_to_text": {"set": {"input_feat_per_channel": 16}, "inputs": _features(20, 16)},
    "swin": {"set": _WINDOWS},
    "swinv2": {"set": _WINDOWS},
    "wav2vec2-bert": {"set": {"feature_projection_input_dim": 32}, "inputs": _features(20, 32)},
    "audio:whisper": {"inputs": _features(16, 128)},
    "yolos": {"set": {"image_size": [32, 32], "num_detection_tokens": 5}},
    "blt": {"set": {"encoder_hash_byte_group_vocab": 64, "patch_size": 4}},
    "blt_local_encoder": {"set": {"hidden_size_global": HIDDEN}},
    "blt_local_decoder": {"set": {"hidden_size_global": HIDDEN}},
    "cohere_compass_text": {
        "set": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
    },
    "deepseek_v4": {"set": {"index_topk": 1}},
    "dbrx": {"set": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0}}},
    "falcon_h1": {"set": {"mamba_d_ssm": 128}},
    "gemma3n_text": {
        "set": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "intermediate_size": [INNER] * 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "laurel_rank": 8,
        }
    },
    "gemma4_text": {"set": {"global_head_dim": 2 * HEAD_DIM}},
    "gemma4_unified_text": {"set": {"global_head_dim": 2 * HEAD_DIM}},
    "laguna": {"set": {"num_attention_heads_per_layer": [HEADS] * 2}},
    "lfm2_moe": {"set": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}},
    "longcat_flash": {"set": {"head_dim": 8}},
    "mamba2": {"set": {"num_heads": 8, "head_dim": 16, "n_groups": 2}},
    "musicgen": {"inputs": _codebooks},
    "musicgen_decoder": {"inputs": _codebooks},
    "musicgen_melody": {"inputs": _codebooks},
    "musicgen_melody_decoder": {"inputs": _codebooks},
    "qwen4_exp": {},
    "qwen4_exp_text": {
        "set": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 16,
            "ple_embed_dim": 64,
            "ngram_vocab_size_base": 50,
        }
    },
    "reformer": {
        "set": {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [4, 16],
            "axial_pos_embds_dim": [16, 48],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
        },
        "inputs": lambda config, tokens, drawn: {"input_ids": tokens[:, :8]},
    },
    "xmod": {"set": {"default_language": "en_XX"}},
    "zamba": {
        "set": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 8}
    },
    "zaya": {"set": {"num_experts_per_tok": 1, "router_hidden_size": 16}},
}

# Families beyond causal language models: the class of each, by model_type.
FAMILIES: dict[str, dict[str, str]] = {
    "encoder": {
        "albert": "AlbertForMaskedLM",
        "bert": "BertForMaskedLM",
        "convbert": "ConvBertForMaskedLM",
        "deberta": "DebertaForMaskedLM",
        "deberta-v2": "DebertaV2ForMaskedLM",
        "distilbert": "DistilBertForMaskedLM",
        "electra": "ElectraForMaskedLM",
        "esm": "EsmForMaskedLM",
        "eurobert": "EuroBertForMaskedLM",
        "flaubert": "FlaubertWithLMHeadModel",
        "fnet": "FNetForMaskedLM",
        "funnel": "FunnelForMaskedLM",
        "ibert": "IBertForMaskedLM",
        "layoutlm": "LayoutLMForMaskedLM",
        "longformer": "LongformerForMaskedLM",
        "luke": "LukeForMaskedLM",
        "mobilebert": "MobileBertForMaskedLM",
        "modernbert": "ModernBertForMaskedLM",
        "mpnet": "MPNetForMaskedLM",
        "nomic_bert": "NomicBertForMaskedLM",
        "nystromformer": "NystromformerForMaskedLM",
        "roberta": "RobertaForMaskedLM",
        "squeezebert": "SqueezeBertForMaskedLM",
        "yoso": "YosoForMaskedLM",
    },
    "seq2seq": {
        "bart": "BartForConditionalGeneration",
        "blenderbot": "BlenderbotForConditionalGeneration",
        "fsmt": "FSMTForConditionalGeneration",
        "led": "LEDForConditionalGeneration",
        "longt5": "LongT5ForConditionalGeneration",
        "m2m_100": "M2M100ForConditionalGeneration",
        "marian": "MarianMTModel",
        "mbart": "MBartForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
        "nllb-moe": "NllbMoeForConditionalGeneration",
        "pegasus": "PegasusForConditionalGeneration",
        "pegasus_x": "PegasusXForConditionalGeneration",
        "prophetnet": "ProphetNetForConditionalGeneration",
        "switch_transformers": "SwitchTransformersForConditionalGeneration",
        "t5": "T5ForConditionalGeneration",
        "t5gemma": "T5GemmaForConditionalGeneration",
        "umt5": "UMT5ForConditionalGeneration",
    },
    "vision": {
        "beit": "BeitForImageClassification",
        "clip": "CLIPModel",
        "convnext": "ConvNextForImageClassification",
        "deit": "DeiTForImageClassification",
        "dinov2": "Dinov2ForImageClassification",
        "dinov3_vit": "DINOv3ViTModel",
        "hiera": "HieraForImageClassification",
        "ijepa": "IJepaForImageClassification",
        "pvt_v2": "PvtV2ForImageClassification",
        "sam_vision_model": "SamVisionModel",
        "segformer": "SegformerForImageClassification",
        "siglip": "SiglipModel",
        "swin": "SwinForImageClassification",
        "swinv2": "Swinv2ForImageClassification",
        "vit": "ViTForImageClassification",
        "vit_mae": "ViTMAEModel",
        "yolos": "YolosModel",
    },
    "audio": {
        "audio-spectrogram-transformer": "ASTForAudioClassification",
        "data2vec-audio": "Data2VecAudioForCTC",
        "hubert": "HubertForCTC",
        "moonshine": "MoonshineForConditionalGeneration",
        "sew": "SEWForCTC",
        "speech_to_text": "Speech2TextForConditionalGeneration",
        "unispeech": "UniSpeechForCTC",
        "wav2vec2": "Wav2Vec2ForCTC",
        "wav2vec2-bert": "Wav2Vec2BertForCTC",
        "wav2vec2-conformer": "Wav2Vec2ConformerForCTC",
        "wavlm": "WavLMForCTC",
        "whisper": "WhisperForConditionalGeneration",
    },
}
