"""Models of the transformers library at test size, with random weights: name -> (model, inputs of a size)."""

import torch
import transformers as tf

TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
GROUPED = TEXT | dict(num_key_value_heads=2, max_position_embeddings=64)
IMAGE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16)
SEQ2SEQ = dict(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4)
SEQ2SEQ |= dict(decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)


def tokens(batch=2, length=7):
    """Token ids with a mask that hides the end of the second row."""
    ids = torch.randint(3, 99, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[1, length - length // 3 :] = 0
    return dict(input_ids=ids, attention_mask=mask)


def causal(batch=2, length=7):
    """Token ids alone, without padding."""
    return dict(input_ids=torch.randint(3, 99, (batch, length)))


def pairs(batch=2, length=7):
    """Token ids of an encoder and of its decoder."""
    return tokens(batch, length) | dict(decoder_input_ids=torch.randint(3, 99, (batch, length - 2)))


def pixels(batch=2, length=7):
    """Images of 16 by 16."""
    return dict(pixel_values=torch.randn(batch, 3, 16, 16))


def sound(batch=2, length=7):
    """Samples of a wave."""
    return dict(input_values=torch.randn(batch, 100 * length))


def spectra(batch=2, length=7):
    """Mel spectra of 2 x 16 frames, and ids of the decoder."""
    return dict(input_features=torch.randn(batch, 8, 32), decoder_input_ids=torch.randint(3, 99, (batch, length)))


def captions(batch=2, length=7):
    """Texts and images."""
    return tokens(batch, length) | pixels(batch)


def clip():
    text = tf.CLIPTextConfig(**TEXT, max_position_embeddings=64, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    vision = tf.CLIPVisionConfig(**IMAGE, patch_size=8)
    return tf.CLIPModel(tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def named(model, config, **options):
    return lambda: getattr(tf, model)(getattr(tf, config)(**options))


# name, builder, inputs
NAMED = (
    ("bert", named("BertModel", "BertConfig", **TEXT), tokens),
    ("vit", named("ViTModel", "ViTConfig", **IMAGE, patch_size=8), pixels),
    (
        "gpt2",
        named("GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64),
        causal,
    ),
    ("llama", named("LlamaForCausalLM", "LlamaConfig", **GROUPED), causal),
    (
        "t5",
        named(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=99,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        pairs,
    ),
)
OTHERS = (
    ("albert", named("AlbertModel", "AlbertConfig", **TEXT | dict(num_hidden_layers=2), embedding_size=16), tokens),
    (
        "deberta",
        named(
            "DebertaV2Model",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        tokens,
    ),
    ("modernbert", named("ModernBertModel", "ModernBertConfig", **TEXT, pad_token_id=0, local_attention=4), tokens),
    ("qwen3", named("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), causal),
    ("gpt_neox", named("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT), causal),
    (
        "falcon",
        named(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
        ),
        causal,
    ),
    ("mixtral", named("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4), causal),
    ("bart", named("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ), pairs),
    (
        "whisper",
        named(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        spectra,
    ),
    ("clip", clip, captions),
    (
        "wav2vec2",
        named(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **TEXT,
            conv_dim=[16, 16],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ),
        sound,
    ),
    ("xlm", named("XLMModel", "XLMConfig", vocab_size=99, emb_dim=32, n_layers=1, n_heads=4), tokens),
    (
        "swin",
        named(
            "SwinModel",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        pixels,
    ),
)
ALL = {name: (builder, inputs) for name, builder, inputs in NAMED + OTHERS}


def build(name, seed=0):
    """(model in eval mode, function of batch and length that draws its inputs)."""
    torch.manual_seed(seed)
    builder, inputs = ALL[name]
    return builder().eval(), inputs
