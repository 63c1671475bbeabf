"""Models of transformers and adapters of peft, small: about 16 units, two layers, 50 tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.case import Builder, Case

VOCABULARY = 50
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = {"intermediate_size": 32, "max_position_embeddings": 32}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    **MARKS,
}


def tokens(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def own_loss(model: nn.Module, num_examples: int = 2, in_double: bool = True, **inputs: Any) -> Case:
    """Return a case with the loss that the model computes itself."""
    return Case(model, lambda model: model(**inputs).loss, num_examples, in_double)


def causal(config: Any, make: Callable = hf.AutoModelForCausalLM.from_config, padding: int = 3) -> Case:
    """Return a language model with its defaults, on a batch with padding on the left."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return own_loss(make(config), input_ids=ids, attention_mask=mask, labels=ids.where(mask > 0, -100))


def masked(config: Any) -> Case:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.where(torch.arange(8) % 3 == 0, -100)
    return own_loss(hf.AutoModelForMaskedLM.from_config(config), input_ids=ids, attention_mask=mask, labels=labels)


def translates(config: Any) -> Case:
    model = hf.AutoModelForSeq2SeqLM.from_config(config)
    return own_loss(model, input_ids=tokens(), labels=tokens(length=6))


def pictures(config: Any, size: int = 32, make: Callable = hf.AutoModelForImageClassification.from_config) -> Case:
    return own_loss(make(config), pixel_values=torch.randn(2, 3, size, size), labels=torch.tensor([0, 1]))


def rwkv() -> Case:
    config = hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, context_length=16)
    ids = tokens()
    return own_loss(hf.RwkvForCausalLM(config), input_ids=ids, labels=ids, use_cache=False)


def mixtral() -> Case:
    config = hf.MixtralConfig(**SIZES, **LONG, num_key_value_heads=1, num_local_experts=4, output_router_logits=True)
    config._experts_implementation = "eager"  # torch has grouped products in float32 and below alone
    return causal(config)


def xlnet() -> Case:
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32)
    return own_loss(hf.XLNetLMHeadModel(config), input_ids=tokens(), labels=tokens())


def whisper() -> Case:
    config = hf.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    model = hf.WhisperForConditionalGeneration(config)
    return own_loss(model, input_features=torch.randn(2, 8, 32), labels=tokens())


def speech() -> Case:
    config = hf.Wav2Vec2Config(
        **SIZES,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_length=2,
        pad_token_id=0,
    )
    return own_loss(hf.Wav2Vec2ForCTC(config), input_values=torch.randn(2, 400), labels=tokens(length=4))


def clip() -> Case:
    text = {**SIZES, **LONG, "eos_token_id": 2}
    image = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
    return own_loss(model, input_ids=tokens(), pixel_values=torch.randn(2, 3, 16, 16), return_loss=True)


def image_transformer(config: type, **options: Any) -> Case:
    sizes = {**SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return pictures(config(**sizes, **options))


def masked_autoencoder() -> Case:
    config = hf.ViTMAEConfig(
        **SIZES,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        decoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=32,
    )
    return own_loss(hf.ViTMAEForPreTraining(config), pixel_values=torch.randn(2, 3, 32, 32))


def segformer() -> Case:
    # No dropout in the head: the layout of its input, and so the order of the draws, differs in a stacked pass.
    config = hf.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        classifier_dropout_prob=0.0,
    )
    labels = torch.randint(0, 2, (2, 32, 32))
    model = hf.SegformerForSemanticSegmentation(config)
    return own_loss(model, pixel_values=torch.randn(2, 3, 32, 32), labels=labels)


def time_series() -> Case:
    config = hf.TimeSeriesTransformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1, d_model=16
    )
    inputs = {
        "past_values": torch.rand(2, 10),
        "past_time_features": torch.rand(2, 10, 1),
        "past_observed_mask": torch.ones(2, 10),
        "future_values": torch.rand(2, 4),
        "future_time_features": torch.rand(2, 4, 1),
    }
    return own_loss(hf.TimeSeriesTransformerForPrediction(config), **inputs)


def adapted(config: peft.PeftConfig) -> Case:
    """Return GPT-2 with an adapter, whose own weights are frozen."""
    torch.manual_seed(1)
    model = peft.get_peft_model(hf.GPT2LMHeadModel(gpt2()), config)
    for p in model.parameters():  # adapters begin at zero, where half of the gradients vanish
        if p.requires_grad:
            nn.init.normal_(p, 0.5, 0.2)
    ids = tokens()
    return own_loss(model, input_ids=ids, labels=ids)


def gpt2() -> hf.GPT2Config:
    return hf.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, **MARKS)


def llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(**SIZES, **LONG, num_key_value_heads=1, **MARKS)


def bert() -> hf.BertConfig:
    return hf.BertConfig(**SIZES, **LONG)


def t5() -> hf.T5Config:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **MARKS
    )


def lora(**options: Any) -> Case:
    return adapted(peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, **options))


MODELS: dict[str, Builder] = {
    "GPT-2": lambda: causal(gpt2()),
    "Llama": lambda: causal(llama()),
    "BERT": lambda: masked(bert()),
    "T5": lambda: translates(t5()),
    "Mistral": lambda: causal(hf.MistralConfig(**SIZES, **LONG, num_key_value_heads=1, sliding_window=4, **MARKS)),
    "Gemma 2": lambda: causal(hf.Gemma2Config(**SIZES, **LONG, num_key_value_heads=1, head_dim=8, **MARKS), padding=0),
    "Mixtral": mixtral,
    "Mamba": lambda: causal(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "RWKV": rwkv,
    "GPT-NeoX": lambda: causal(hf.GPTNeoXConfig(**SIZES, **LONG, **MARKS)),
    "BLOOM": lambda: causal(
        hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, **MARKS), padding=0
    ),
    "Falcon": lambda: causal(hf.FalconConfig(**SIZES, **MARKS)),
    "OPT": lambda: causal(hf.OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16)),
    "Phi": lambda: causal(hf.PhiConfig(**SIZES, **LONG, **MARKS)),
    "Qwen 3": lambda: causal(hf.Qwen3Config(**SIZES, **LONG, num_key_value_heads=1, head_dim=8, **MARKS)),
    "DistilBERT": lambda: masked(
        hf.DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    ),
    "RoBERTa": lambda: masked(hf.RobertaConfig(**SIZES, **LONG, pad_token_id=1)),
    "ALBERT": lambda: masked(hf.AlbertConfig(**SIZES, **LONG, embedding_size=8)),
    "DeBERTa v2": lambda: masked(
        hf.DebertaV2Config(**SIZES, **LONG, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
    ),
    "Longformer": lambda: masked(hf.LongformerConfig(**SIZES, **LONG, attention_window=4, pad_token_id=1)),
    "FNet": lambda: masked(hf.FNetConfig(**SIZES, **LONG)),
    "XLNet": xlnet,
    "BART": lambda: translates(hf.BartConfig(**ENCODER_DECODER, encoder_layerdrop=0.2)),
    "Whisper": whisper,
    "wav2vec 2": speech,
    "CLIP": clip,
    "ViT of transformers": lambda: image_transformer(hf.ViTConfig),
    "DINOv2": lambda: image_transformer(hf.Dinov2Config, drop_path_rate=0.2),
    "ViT-MAE": masked_autoencoder,
    "SegFormer": segformer,
    "Time series transformer": time_series,
    "LoRA": lora,
    "DoRA": partial(lora, use_dora=True),
    "IA3": lambda: adapted(
        peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True)
    ),
    "Prompt tuning": lambda: adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}
