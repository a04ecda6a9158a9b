"""Each family's student must be the teacher with some layers skipped, and an ordinary saved model."""

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from hf_distill.students import from_teacher
from hf_distill.students.from_teacher import choose_layers

N = 6
TEXT = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=96, num_hidden_layers=N)
GROUPED = dict(num_key_value_heads=2)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=N, image_size=16, patch_size=8
)
SEQ2SEQ = dict(
    d_model=32,
    encoder_layers=N,
    decoder_layers=N,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    vocab_size=96,
    decoder_start_token_id=2,
    **TOKENS,
)
LLAMA = LlamaConfig(**TEXT, **TOKENS, **GROUPED)
# name: (class, config, class that loads the saved folder, path of the layers)
FAMILIES = {
    "llama": ("LlamaForCausalLM", LLAMA, "AutoModelForCausalLM", ["model.layers"]),
    "qwen2": (
        "Qwen2ForCausalLM",
        Qwen2Config(
            **TEXT,
            **TOKENS,
            **GROUPED,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=3,
            tie_word_embeddings=True,
        ),
        "AutoModelForCausalLM",
        ["model.layers"],
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        Qwen2MoeConfig(
            **TEXT,
            **TOKENS,
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[1, 4],
        ),
        "AutoModelForCausalLM",
        ["model.layers"],
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        Gemma3TextConfig(
            **TEXT,
            **TOKENS,
            **GROUPED,
            head_dim=8,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"] * 3,
        ),
        "AutoModelForCausalLM",
        ["model.layers"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2Config(n_embd=32, n_layer=N, n_head=4, vocab_size=96, n_positions=64, **TOKENS),
        "AutoModelForCausalLM",
        ["transformer.h"],
    ),
    "bert": (
        "BertForSequenceClassification",
        BertConfig(**TEXT, num_labels=3),
        "AutoModelForSequenceClassification",
        ["bert.encoder.layer"],
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        DistilBertConfig(dim=32, hidden_dim=48, n_heads=4, n_layers=N, vocab_size=96),
        "AutoModelForSequenceClassification",
        ["distilbert.transformer.layer"],
    ),
    "vit": (
        "ViTForImageClassification",
        ViTConfig(**VISION, num_labels=3),
        "AutoModelForImageClassification",
        ["vit.layers"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5Config(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=N, vocab_size=96, decoder_start_token_id=0),
        "AutoModelForSeq2SeqLM",
        ["encoder.block", "decoder.block"],
    ),
    "bart": (
        "BartForConditionalGeneration",
        BartConfig(**SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=2),
        "AutoModelForSeq2SeqLM",
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        WhisperConfig(
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=64,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        "AutoModelForSpeechSeq2Seq",
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        LlavaConfig(text_config=LLAMA, vision_config=CLIPVisionConfig(**VISION), image_token_id=95, image_seq_length=4),
        "AutoModelForImageTextToText",
        ["model.language_model.layers"],
    ),
}
KEPT = [1, 3, 4]  # layer 0 is dropped, both kinds of attention and of MLP stay


def build(family):
    name, config, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # biases and norms too: a swapped pair of layers must show
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(family):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 95, (2, 7), generator=generator)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    if family == "vit":
        return {"pixel_values": image}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}
    if family == "llava":
        ids[:, 1:5] = 95
        return {"input_ids": ids, "pixel_values": image}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if family in ("t5", "bart") else {"input_ids": ids}


def skip_layers(model, paths, kept):
    """The slow reference: the whole teacher, whose dropped layers hand their input on."""

    def hand_on(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for path in paths:
        for i, layer in enumerate(model.get_submodule(path)):
            if i not in kept:
                layer.register_forward_hook(hand_on, with_kwargs=True)
    return model


@torch.no_grad()
def logits(model, family):
    return model(**inputs(family), use_cache=False).logits if family != "vit" else model(**inputs(family)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_layers_changes_a_logit(family):
    teacher = build(family)
    assert torch.equal(logits(from_teacher(teacher, "all"), family), logits(teacher, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_differs_from_its_teacher_with_the_other_layers_skipped(family):
    teacher = build(family)
    student = logits(from_teacher(teacher, KEPT), family)
    assert not torch.allclose(student, logits(teacher, family), atol=1e-4)
    torch.testing.assert_close(
        student, logits(skip_layers(teacher, FAMILIES[family][3], KEPT), family), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_misses_a_key_or_computes_something_else(family, tmp_path):
    student = from_teacher(build(family), KEPT)
    student.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, FAMILIES[family][2]).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(student) and not any(info.values()), info
    assert torch.equal(logits(loaded, family), logits(student, family))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen2_moe", "gemma3_text", "gpt2", "t5", "bart", "whisper", "llava"]
)
def test_cache_gives_other_tokens_than_no_cache(family):
    student = from_teacher(build(family), KEPT)
    prompt = {key: value for key, value in inputs(family).items() if not key.startswith("decoder")}
    arguments = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[95])
    cached = student.generate(**prompt, **arguments, use_cache=True)
    assert torch.equal(cached, student.generate(**prompt, **arguments, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_teacher_is_changed_or_shares_memory(family):
    teacher = build(family).requires_grad_(False)
    before, config = {k: v.clone() for k, v in teacher.state_dict().items()}, teacher.config.to_dict()
    student = from_teacher(teacher, KEPT)
    assert all(parameter.requires_grad for parameter in student.parameters())
    pointers = {value.untyped_storage().data_ptr() for value in teacher.state_dict().values()}
    assert not pointers & {value.untyped_storage().data_ptr() for value in student.state_dict().values()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_tied_head_comes_apart():
    student = from_teacher(build("qwen2"), KEPT)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    untied = from_teacher(build("llama"), KEPT)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_per_layer_lists_of_the_config_are_not_cut():
    assert from_teacher(build("gemma3_text"), KEPT).config.layer_types == [
        "full_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert from_teacher(build("qwen2_moe"), KEPT).config.mlp_only_layers == [0, 2]
    assert [layer.self_attn.layer_idx for layer in from_teacher(build("llama"), KEPT).model.layers] == [0, 1, 2]


def test_dtype_attention_or_generation_config_gets_lost():
    teacher = build("llama").to(torch.bfloat16)
    teacher.set_attn_implementation("eager")
    teacher.generation_config.max_new_tokens = 17
    student = from_teacher(teacher, 2)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert type(student.model.layers[0].self_attn) is type(teacher.model.layers[0].self_attn)
    assert torch.equal(logits(from_teacher(teacher, "all"), "llama"), logits(teacher, "llama"))
    assert student.generation_config.max_new_tokens == 17
    student.generation_config.max_new_tokens = 3
    assert teacher.generation_config.max_new_tokens == 17


def test_encoder_and_decoder_take_separate_rules():
    student = from_teacher(build("t5"), "all", decoder_layers=2)
    assert (len(student.encoder.block), len(student.decoder.block)) == (N, 2)
    assert (student.config.num_layers, student.config.num_decoder_layers) == (N, 2)
    torch.testing.assert_close(
        logits(student, "t5"), logits(skip_layers(build("t5"), ["decoder.block"], [0, 5]), "t5"), rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="llama.*no encoder-decoder"):
        from_teacher(build("llama"), 2, decoder_layers=2)


def test_whisper_alignment_heads_point_at_layers_that_are_gone():
    teacher = build("whisper")
    teacher.generation_config.alignment_heads = [[0, 1], [3, 2], [4, 0]]
    assert from_teacher(teacher, "all", decoder_layers=KEPT).generation_config.alignment_heads == [[1, 2], [2, 0]]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("every_2", [0, 2, 4]),
        ("every_4", [0, 4]),
        ("first_2", [0, 1]),
        ("last_2", [4, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
        (1, [0]),
        (2, [0, 5]),
        (3, [0, 3, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        ([2, 5], [2, 5]),
    ],
)
def test_rule_means_other_layers(layers, expected):
    assert choose_layers(layers, 6) == expected


def test_evenly_spaced_layers_repeat_or_leave_the_ends_out():
    for count in range(2, 40):
        for number in range(2, count + 1):
            chosen = choose_layers(number, count)
            gaps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
            assert len(chosen) == number and (chosen[0], chosen[-1]) == (0, count - 1)
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "layers, message",
    [
        ([], r"layers=\[\].*empty"),
        ([0, 6], r"\[6\] out of range.*0 to 5"),
        ([-1], r"\[-1\] out of range"),
        ([1, 1], r"\[1, 1\].*twice"),
        ([3, 1], r"\[3, 1\].*ascend.*\[1, 3\]"),
        ([0.5], "integers"),
        (0, "layers=0.*has 6 layers"),
        (7, "layers=7.*has 6 layers"),
        (True, "got True"),
        ("last_7", "last_7.*has 6 layers"),
        ("half", "half.*every_N"),
    ],
)
def test_wrong_layers_are_accepted(layers, message):
    with pytest.raises(ValueError, match=message):
        from_teacher(build("llama"), layers)


def test_layer_that_changes_its_kind_is_cut_silently():
    config = GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=96, scale_attn_by_inverse_layer_idx=True, **TOKENS)
    with pytest.raises(ValueError, match="gpt2.*h.1.attn.scaling"):
        from_teacher(transformers.GPT2LMHeadModel(config), [0, 2])
    albert = transformers.AlbertConfig(**TEXT, embedding_size=16)
    with pytest.raises(ValueError, match="albert.*not a list of modules"):
        from_teacher(transformers.AlbertModel(albert), 2)


def test_quantised_wrapped_or_offloaded_teacher_is_cut_silently(tmp_path):
    build("llama").save_pretrained(tmp_path)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    with pytest.raises(ValueError, match="quantised.*without quantization_config"):
        from_teacher(quantised, 2)
    with pytest.raises(ValueError, match="ReLU"):
        from_teacher(torch.nn.ReLU(), 2)
    with pytest.raises(ValueError, match="without offloading"):
        from_teacher(build("llama").to("meta"), 2)
