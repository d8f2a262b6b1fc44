"""The architectures that every test run measures, and which of their linears nothing upstream can take the scale of.

Patterns over module names. All others fold: into norms, through gated products and ReLU, through attention.
"""

RESIDUAL = ["*q_proj", "*k_proj", "*v_proj", "*gate_proj", "*up_proj"]  # they read the residual stream, as norms do
POST_NORM = ["*query", "*key", "*value", "*.intermediate.dense", "*layer.?.output.dense"]  # so here; and GELU

DECODERS: dict[str, list[str]] = {
    "llama": [],
    "qwen2": [],
    "qwen3": [],
    "mistral": [],
    "gemma": [],
    "gemma2": [],
    "gemma3_text": [],
    "phi3": [],
    "glm4": [],
    "cohere": [],
    "opt": [],  # fc2 folds through ReLU
    "stablelm": [],
    "olmo2": RESIDUAL,
    "gpt2": ["*mlp.c_proj"],  # GELU, here and below
    "gpt_neox": ["*dense_4h_to_h"],
    "falcon": ["*dense_4h_to_h"],
    "phi": ["*fc2"],
    "bloom": ["*dense_4h_to_h"],
    "mixtral": [],
    "deepseek_v3": [],
    "falcon_mamba": ["*x_proj", "*dt_proj", "*out_proj"],  # after SiLU, and a norm without gain
}

OTHERS: dict[str, list[str]] = {
    "encoder:bert": POST_NORM,
    "encoder:albert": ["*query", "*key", "*value", "*ffn", "*ffn_output"],  # one layer's weights, used in every layer
    "encoder:deberta-v2": ["*query_proj", "*key_proj", "*value_proj", *POST_NORM],
    "encoder:modernbert": ["*layers.0.attn.Wqkv"],
    "seq2seq:t5": ["*EncDecAttention.k", "*EncDecAttention.v"],  # read an output of the model
    "seq2seq:bart": ["*q_proj", "*k_proj", "*v_proj", "*fc1", "*fc2"],
    "audio:whisper": ["*fc2", "*encoder_attn.k_proj", "*encoder_attn.v_proj"],
    "audio:wav2vec2": ["*q_proj", "*k_proj", "*v_proj", "*intermediate_dense", "*output_dense"],
    "vision:vit": ["*fc2"],
    "vision:clip": ["*fc2", "*text_projection"],
    "vision:swin": ["*fc2", "classifier"],
}
