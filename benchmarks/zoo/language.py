"""Models of transformers, from small configurations of their own classes."""

from typing import Any

from torch import nn

from .entries import Entry, Inputs, ids, images, named, numbers
from .vision import stub_torchvision

VOCABULARY, LENGTH, PIXELS = 96, 12, 32
TEXT = named(input_ids=ids(LENGTH, VOCABULARY))
BOTH = named(input_ids=ids(LENGTH, VOCABULARY), decoder_input_ids=ids(LENGTH, VOCABULARY))


def _transformers(model: str, config: str, inputs: Any, **options: Any) -> Entry:
    def build() -> nn.Module:
        stub_torchvision()
        import transformers

        made = {
            name: getattr(transformers, value[0])(**value[1]) if isinstance(value, tuple) else value
            for name, value in options.items()
        }
        return getattr(transformers, model)(getattr(transformers, config)(**made))

    return Entry("transformers", build, inputs)


def _of(name: str, suffix: str, inputs: Any, **options: Any) -> Entry:
    """`name`'s configuration, and its model of that kind: _of("Bert", "ForMaskedLM", ...)."""
    return _transformers(name + suffix, f"{name}Config", inputs, **options)


WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODER = {**WIDTHS, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
DECODER = {
    **WIDTHS, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_key_value_heads": 2, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WHOLE = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}  # as many keys as queries
PICTURE = {**WIDTHS, "image_size": PIXELS, "patch_size": 8, "num_labels": 5}
PAIR = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "use_cache": False,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
SPEECH = {
    **WIDTHS, "vocab_size": VOCABULARY, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
LABELS = "ForImageClassification"
CAUSAL = "ForCausalLM"
MASKED = "ForMaskedLM"
SEQ2SEQ = "ForConditionalGeneration"


def _spectrogram(batch: int) -> Inputs:
    return (), {"input_features": numbers(16, 32)(batch), "decoder_input_ids": ids(LENGTH, VOCABULARY)(batch)}


TRANSFORMERS = {
    # encoders
    "bert": _of("Bert", MASKED, TEXT, **ENCODER),
    "roberta": _of("Roberta", MASKED, TEXT, **ENCODER),
    "electra": _of("Electra", MASKED, TEXT, **ENCODER, embedding_size=32),
    "albert": _of("Albert", MASKED, TEXT, **ENCODER, embedding_size=32),
    "distilbert": _of(
        "DistilBert", MASKED, TEXT, vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, hidden_dim=128,
        max_position_embeddings=32,
    ),
    "deberta_v2": _of("DebertaV2", MASKED, TEXT, **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": _of("ModernBert", MASKED, TEXT, **ENCODER, pad_token_id=0),
    # decoders
    "gpt2": _transformers(
        "GPT2LMHeadModel", "GPT2Config", TEXT, vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=4,
        use_cache=False,
    ),
    "gpt_neo": _of(
        "GPTNeo", CAUSAL, TEXT, vocab_size=VOCABULARY, max_position_embeddings=32, hidden_size=64, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], use_cache=False,
    ),
    "gpt_neox": _of("GPTNeoX", CAUSAL, TEXT, **WHOLE),
    "opt": _of(
        "OPT", CAUSAL, TEXT, vocab_size=VOCABULARY, max_position_embeddings=32, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64, use_cache=False,
    ),
    "bloom": _of("Bloom", CAUSAL, TEXT, vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, use_cache=False),
    "llama": _of("Llama", CAUSAL, TEXT, **DECODER),
    "mistral": _of("Mistral", CAUSAL, TEXT, **DECODER),
    "qwen2": _of("Qwen2", CAUSAL, TEXT, **DECODER),
    "qwen3": _of("Qwen3", CAUSAL, TEXT, **DECODER, head_dim=16),
    "gemma2": _of("Gemma2", CAUSAL, TEXT, **DECODER, head_dim=16),
    "phi3": _of("Phi3", CAUSAL, TEXT, **DECODER),
    "falcon": _of("Falcon", CAUSAL, TEXT, **WHOLE),
    # mixtures of experts
    "mixtral": _of("Mixtral", CAUSAL, TEXT, **DECODER, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _of(
        "Qwen2Moe", CAUSAL, TEXT, **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
    ),
    "olmoe": _of("Olmoe", CAUSAL, TEXT, **DECODER, num_experts=4, num_experts_per_tok=2),
    # encoder-decoders
    "t5": _of(
        "T5", SEQ2SEQ, BOTH, vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        use_cache=False, decoder_start_token_id=0,
    ),
    "flan_t5": _of(
        "T5", SEQ2SEQ, BOTH, vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, use_cache=False, decoder_start_token_id=0,
    ),
    "bart": _of("Bart", SEQ2SEQ, BOTH, **PAIR),
    "pegasus": _of("Pegasus", SEQ2SEQ, BOTH, **PAIR),
    # vision
    "vit_hf": _of("ViT", LABELS, images(PIXELS), **PICTURE),
    "beit_hf": _of("Beit", LABELS, images(PIXELS), **PICTURE, use_relative_position_bias=True),
    "dinov2": _of("Dinov2", LABELS, images(PIXELS), **PICTURE),
    "swin_hf": _of(
        "Swin", LABELS, images(PIXELS), image_size=PIXELS, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4],
        window_size=4, num_labels=5,
    ),
    "resnet_hf": _of(
        "ResNet", LABELS, images(PIXELS), embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=5
    ),
    "convnext_hf": _of(
        "ConvNext", LABELS, images(64), hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=5
    ),
    "mobilenet_v2_hf": _of("MobileNetV2", LABELS, images(PIXELS), depth_multiplier=0.5, num_labels=5),
    "segformer": _of(
        "Segformer", "ForSemanticSegmentation", images(64), hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=32, num_labels=5,
    ),
    "detr": _transformers(
        "DetrForObjectDetection", "DetrConfig", named(pixel_values=numbers(3, 64, 64)), use_timm_backbone=False,
        backbone=None, use_pretrained_backbone=False,
        backbone_config=(
            "ResNetConfig",
            {
                "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
                "out_features": ["stage4"],
            },
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=9, num_labels=5,
    ),
    "clip": _transformers(
        "CLIPModel", "CLIPConfig", named(input_ids=ids(LENGTH, VOCABULARY), pixel_values=numbers(3, PIXELS, PIXELS)),
        text_config={**ENCODER, "projection_dim": 32, "eos_token_id": 2}, projection_dim=32,
        vision_config={**WIDTHS, "image_size": PIXELS, "patch_size": 8, "projection_dim": 32},
    ),
    # audio
    "wav2vec2": _of("Wav2Vec2", "ForCTC", named(input_values=numbers(1200)), **SPEECH),
    "hubert": _of("Hubert", "ForCTC", named(input_values=numbers(1200)), **SPEECH),
    "whisper": _of(
        "Whisper", SEQ2SEQ, _spectrogram, **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"},
        num_mel_bins=16, max_source_positions=16, max_target_positions=32, suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    # state space
    "mamba": _of(
        "Mamba", CAUSAL, TEXT, vocab_size=VOCABULARY, hidden_size=48, state_size=8, num_hidden_layers=2, use_cache=False
    ),
    "rwkv": _of(
        "Rwkv", CAUSAL, TEXT, vocab_size=VOCABULARY, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2,
        context_length=32, use_cache=False,
    ),
}  # fmt: skip
