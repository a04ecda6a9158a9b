"""Whether what is read of a model as its head times its hidden states really is its logits, family by family."""

import logging

import pytest
import torch
import transformers as tf
from torch import nn

from hf_distill.heads import check_head, collect, head_logits, runs_dense
from hf_distill.signals import HeadLogits, Rows
from tests.helpers import tiny_llama

SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=1)
T5 = dict(vocab_size=48, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, **IDS)
BART = dict(
    vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, decoder_start_token_id=2, **IDS,
)  # fmt: skip


def llava():
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = tf.LlamaConfig(**SMALL, **IDS)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=40)
    )


FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **IDS)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **IDS, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, **IDS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, **IDS, head_dim=4, final_logit_softcapping=0.5)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**SMALL, **IDS, head_dim=4, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, **IDS, logit_scale=0.25)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, **IDS, logits_scaling=8.0)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, **IDS)),
    "phi (bias)": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL, **IDS)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, **IDS)),
    "falcon-h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(
            **SMALL, **IDS, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8, lm_head_multiplier=0.5
        )
    ),
    "qwen3 moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, **IDS, head_dim=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    ),
    "t5 tied": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5 untied": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, tie_word_embeddings=False)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**BART)),
    "llava": llava,
}  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """Weights, biases and BART's final_logits_bias far from 0, so that leaving one out shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif "bias" in "".join(n for n, p in model.named_parameters() if p is parameter):
                parameter.normal_(std=0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def batch_of(model) -> tuple[dict, Rows]:
    ids = torch.tensor([[5, 9, 13, 21, 1, 0], [7, 30, 2, 11, 12, 1]])
    batch = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    index = torch.tensor([0, 2, 3, 6, 9, 11])
    documents = torch.tensor([0, 0, 0, 1, 1, 1])
    return batch, Rows(index, ids.flatten()[index], documents, torch.arange(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_logits_are_not_its_head_on_its_backbone(family):
    model = spread(FAMILIES[family]()).eval()
    check_head(model, "student")
    batch, rows = batch_of(model)
    needs = frozenset({"logits"})
    lazy, dense = (collect(model, batch, needs, rows, dense=d).logits for d in (False, True))
    assert isinstance(lazy, HeadLogits) and torch.is_tensor(dense) and lazy.shape == dense.shape == (6, 48)
    assert dense.abs().max() > 0.1
    torch.testing.assert_close(lazy.dense(), dense, rtol=1e-4, atol=1e-5)


class Louder(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out


def test_logits_that_are_more_than_the_head_pass_the_check():
    model = Louder(tiny_llama().config)
    with pytest.raises(
        ValueError, match=r"the teacher's logits are not its head .* Louder differs by .*dense_logits=True"
    ):
        check_head(model, "teacher")
    assert model.training  # and its mode is put back
    model.bfloat16()
    with pytest.raises(ValueError, match="Louder differs"):
        check_head(model, "teacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_taken_for_another_head(dtype):
    check_head(tiny_llama(32, 4).to(dtype), "student")


def test_a_masked_language_model_runs_dense_in_silence(caplog):
    model = tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        check_head(model, "student")
    assert "student BertForMaskedLM runs with dense logits" in caplog.text
    assert runs_dense(model)
    batch, rows = batch_of(model)
    got = collect(model, batch, frozenset({"logits"}), rows).logits
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(got, model(**inputs).logits.flatten(0, 1)[rows.index])


def test_a_head_without_weights_in_memory_gives_an_empty_answer():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ValueError, match="no weights in memory .meta device."):
        head_logits(model, torch.zeros(2, 16))


def test_a_head_that_zero_3_holds_is_refused_before_anything_runs():
    model = tiny_llama()
    model.lm_head.weight.ds_id = 7  # what deepspeed.zero.Init puts on every parameter
    with pytest.raises(ValueError, match="ZeRO-3 gathers the teacher's head only for its own"):
        check_head(model, "teacher")
