"""Language models of the transformers library that generate, at test size, with random weights: name -> builder.

Two layers, 64 channels, 128 tokens. Biases and norms are random too, and the weights are large enough that logits differ
clearly from one token to the next: with weights of a fresh model every continuation is nearly as good as another.
"""

import torch
import transformers as tf

VOCABULARY, WIDTH, PAD, EOS = 128, 64, 0, 2
PLAIN = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
PLAIN |= dict(max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS)
GROUPED = PLAIN | dict(num_key_value_heads=2)
HEADS = GROUPED | dict(head_dim=16)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=512)
GPT2 |= dict(pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS)
T5 = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=PAD)
T5 |= dict(pad_token_id=PAD, eos_token_id=EOS)
WHISPER = dict(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, num_mel_bins=8)
WHISPER |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96)
WHISPER |= dict(max_source_positions=16, max_target_positions=512, decoder_start_token_id=1, suppress_tokens=None)
WHISPER |= dict(pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, begin_suppress_tokens=None)

# name, model, configuration, options
DECODERS = (
    ("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED | dict(tie_word_embeddings=True)),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADS),
    ("mistral", "MistralForCausalLM", "MistralConfig", HEADS | dict(sliding_window=8)),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", HEADS),
    ("gemma2", "Gemma2ForCausalLM", "Gemma2Config", HEADS | dict(sliding_window=8)),
    ("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADS | dict(sliding_window=8)),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    ("phi", "PhiForCausalLM", "PhiConfig", PLAIN),
    ("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED),
)
PAIRS = (
    ("t5", "T5ForConditionalGeneration", "T5Config", T5),
    ("whisper", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
)
ALL = {name: entry for name, *entry in (*DECODERS, *PAIRS)}


def build(name, seed=0):
    """A model of float32 in eval mode."""
    torch.manual_seed(seed)
    kind, config, options = ALL[name]
    model = getattr(tf, kind)(getattr(tf, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompt(name, batch=2, length=7, padded=False):
    """What `generate` is given. padded: the second row begins with padding."""
    if name == "whisper":
        return dict(input_features=torch.randn(batch, 8, 32))
    ids = torch.randint(3, VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : length // 2] = 0
        ids[1, : length // 2] = PAD
    return dict(input_ids=ids, attention_mask=mask)
