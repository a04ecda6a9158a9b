"""Teachers that write: what they say depends on the request alone, is paid for once, and labels are scored exactly."""

import random

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from hf_distill import FrozenTeacher, LocalTextTeacher
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers.decoding import sample_token
from tests.helpers import tiny_llama, tiny_tokenizer

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w2", "w9 w9 w3 w4", "w7"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w60{% endif %}"


def tiny_teacher(seed: int = 0, *, tokenizer=None, store=None, batch_size: int = 4, **config) -> LocalTextTeacher:
    model = tiny_llama(seed=seed, max_position_embeddings=64, **config)
    return LocalTextTeacher(model, tokenizer or tiny_tokenizer(), batch_size=batch_size, store=store)


def token_ids(teacher: LocalTextTeacher, prompt: str) -> list[int]:
    return teacher.tokenizer(prompt)["input_ids"]


def slow_log_probs(model, ids: list[int], label: list[int]) -> torch.Tensor:
    """Of one label after one prompt, with a forward of its own and no padding."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids + label])).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return sum(log_probs[len(ids) - 1 + j, token] for j, token in enumerate(label))


@pytest.fixture(scope="module")
def embedded() -> LocalTextTeacher:
    return LocalTextTeacher(EMBEDDED / "teacher", batch_size=3)


# ---- writing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_texts_are_not_those_of_generate_one_by_one(batch_size):
    teacher = tiny_teacher(batch_size=batch_size)
    texts = teacher.generate(PROMPTS, max_new_tokens=12, temperature=0, log_probs=True)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = token_ids(teacher, prompt)
        out = teacher.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert text.token_ids == out and text.completion_tokens == len(out) and text.prompt_tokens == len(ids)
        assert text.finish_reason == ("stop" if out[-1] == 1 else "length")
        assert text.text == teacher.tokenizer.decode([t for t in out if t != 1])
        each = [slow_log_probs(teacher.model, ids + out[:j], out[j : j + 1]).item() for j in range(len(out))]
        assert text.log_probs == pytest.approx(each, abs=1e-5)


def test_the_end_of_sequence_is_not_seen():
    teacher = tiny_teacher()
    teacher.model.lm_head.weight.data[1] = 0.3 * teacher.model.lm_head.weight.data.sum(0)  # <eos> is likely at times
    texts = teacher.generate(PROMPTS, max_new_tokens=20, num_return_sequences=3, seed=1)
    ended = [t for t in texts if t.finish_reason == "stop"]
    assert 0 < len(ended) < len(texts)
    assert all(t.token_ids[-1] == 1 and 1 not in t.token_ids[:-1] and "<eos>" not in t.text for t in ended)
    assert all(len(t.token_ids) == 20 and 1 not in t.token_ids for t in texts if t.finish_reason == "length")


def test_a_text_depends_on_its_batch_or_its_place():
    settings = dict(max_new_tokens=10, num_return_sequences=3, temperature=0.9, top_p=0.95, seed=5)
    together = tiny_teacher(batch_size=18).generate(PROMPTS, **settings)
    assert len({tuple(t.token_ids) for t in together}) == 18
    single = tiny_teacher(batch_size=1)
    backwards = single.generate(PROMPTS[::-1], **settings)
    for i in range(len(PROMPTS)):
        assert together[3 * i : 3 * i + 3] == backwards[15 - 3 * i : 18 - 3 * i]
        assert single.generate(PROMPTS[i : i + 1], **settings) == together[3 * i : 3 * i + 3]
    fewer = single.generate(PROMPTS, **settings | {"num_return_sequences": 1, "max_new_tokens": 4})
    assert [t.token_ids for t in fewer] == [t.token_ids[:4] for t in together[::3]]


def test_seeds_are_not_reproduced_or_not_used():
    texts = {}
    teacher = tiny_teacher()
    for seed in (0, 1):
        torch.manual_seed(seed + 7)  # the global generators have no say
        state = torch.random.get_rng_state(), random.getstate()
        texts[seed] = teacher.generate(PROMPTS, max_new_tokens=8, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state[0]) and random.getstate() == state[1]
        assert texts[seed] == tiny_teacher().generate(PROMPTS, max_new_tokens=8, seed=seed)
    assert all(a.token_ids != b.token_ids for a, b in zip(texts[0], texts[1], strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (1.0, 0.05)])
def test_draws_have_another_distribution_than_transformers(temperature, top_p):
    """A fine grid of draws against the warped softmax."""
    logits = torch.randn(1, 9) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    expected = (warped if top_p == 1 else TopPLogitsWarper(top_p)(None, warped)).softmax(-1)[0]
    grid = (torch.arange(20_000) + 0.5) / 20_000
    drawn = sample_token(logits.expand(20_000, 9) / temperature, grid, top_p)
    torch.testing.assert_close(torch.bincount(drawn, minlength=9) / 20_000, expected, atol=2e-4, rtol=0)
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert (expected[sample_token(logits.expand(2, 9) / temperature, edge, top_p)] > 0).all()


def test_temperature_or_top_p_is_not_applied():
    """First words of 4000 texts against the model's own probabilities."""
    teacher = tiny_teacher(batch_size=1000)
    texts = teacher.generate(["w1 w2"], max_new_tokens=1, temperature=0.5, top_p=0.9, num_return_sequences=4000)
    with torch.no_grad():
        logits = teacher.model(torch.tensor([token_ids(teacher, "w1 w2")])).logits[0, -1:] / 0.5
    expected = TopPLogitsWarper(0.9)(None, logits).softmax(-1)[0]
    found = torch.bincount(torch.tensor([t.token_ids[0] for t in texts]), minlength=64) / 4000
    assert (found - expected).abs().max() < 0.03 and (expected > 0).sum() > 3
    assert (found - logits.mul(0.5).softmax(-1)[0]).abs().max() > 0.06


def test_a_stop_string_is_missed_or_left_in_the_text():
    teacher = tiny_teacher()
    whole = teacher.generate(PROMPTS, max_new_tokens=14, num_return_sequences=2, seed=3)
    words = sorted((text.text.split() for text in whole), key=len)
    stops = [words[-1][5], " ".join(words[-2][7:9])]  # a word, and a string of two tokens
    texts = teacher.generate(PROMPTS, max_new_tokens=14, num_return_sequences=2, seed=3, stop_strings=stops)
    assert {t.finish_reason for t in texts} == {"stop", "length"}
    for full, text in zip(whole, texts, strict=True):
        cut, reason, used = full.text, full.finish_reason, len(full.token_ids)
        for n in range(1, len(full.token_ids) + 1):
            here = teacher.tokenizer.decode([t for t in full.token_ids[:n] if t != 1])
            if found := [here.find(s) for s in stops if s in here]:
                cut, reason, used = here[: min(found)], "stop", n
                break
        assert (text.text, text.finish_reason, text.completion_tokens) == (cut, reason, used)
        assert text.token_ids == full.token_ids[:used]


def test_a_stop_string_begins_in_the_prompt():
    teacher = tiny_teacher()
    first = teacher.generate(["w1 w2"], max_new_tokens=3, temperature=0)[0].text.split()
    [text] = teacher.generate(["w1 w2"], max_new_tokens=3, temperature=0, stop_strings=[f"w2 {first[0]}"])
    assert text.text.split() == first and text.finish_reason == "length"


def test_settings_of_the_checkpoint_change_the_text_or_are_changed():
    teacher, plain = tiny_teacher(), tiny_teacher()
    own = teacher.model.generation_config
    own.repetition_penalty, own.top_k, own.do_sample, own.max_new_tokens = 5.0, 1, True, 2
    before = own.to_dict()
    teacher.model.train()
    settings = dict(max_new_tokens=8, seed=1)
    assert teacher.generate(PROMPTS, **settings) == plain.generate(PROMPTS, **settings)
    assert teacher.model.generation_config is own and own.to_dict() == before and teacher.model.training
    assert all(p.requires_grad for p in teacher.model.parameters())


def test_conversations_are_rendered_otherwise_or_twice_begun():
    """A tokenizer that begins every text with <unk>; the template writes what it wants itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<unk> " + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    teacher = tiny_teacher(tokenizer=tokenizer)
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    plain = "w1 w2 w3 w60"
    texts = teacher.generate([chat, plain], max_new_tokens=5, temperature=0)
    assert texts[0] == texts[1] and texts[0].prompt_tokens == 5
    scores = teacher.label_log_probs([chat, plain], ["w1", "w2 w3"])
    assert scores[0, 1].item() == pytest.approx(
        slow_log_probs(teacher.model, [2, 4, 5, 6, 63], [5, 6]).item(), abs=1e-5
    )
    torch.testing.assert_close(scores[0], scores[1])


# ---- judging ---------------------------------------------------------------------------------------------------------
def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Learned absolute positions: padding on the left moves everything that does not count it."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
                   eos_token_id=1, bos_token_id=1)
    )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: tiny_llama(), gpt2, lambda: tiny_llama().double()])
def test_labels_are_not_scored_as_by_a_loop(make):
    """Multi-token labels, one of them the start of another, prompts of different lengths in one batch."""
    model = make()
    labels = ["w1", "w2 w3", "w2", "w5 w6 w7 w8", "w2 w3 w4"]
    for batch_size in (1, 4):
        teacher = LocalTextTeacher(model, tiny_tokenizer(), batch_size=batch_size)
        scores = teacher.label_log_probs(PROMPTS, labels)
        expected = torch.stack([
            torch.stack([slow_log_probs(model, token_ids(teacher, p), token_ids(teacher, label)) for label in labels])
            for p in PROMPTS
        ])  # fmt: skip
        exact = scores.dtype == torch.float64
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-12 if exact else 1e-5)
        normal = teacher.label_log_probs(PROMPTS, labels, normalize=True)
        torch.testing.assert_close(normal, scores.log_softmax(-1))
        yes = teacher.yes_no(PROMPTS, yes="w1", no="w5 w6 w7 w8")
        torch.testing.assert_close(yes, torch.sigmoid(scores[:, 0] - scores[:, 3]))
    assert teacher.usage.completion_tokens == 0 and teacher.usage.requests == 3 * len(PROMPTS)


def test_a_prompt_runs_once_per_label():
    teacher, lengths = tiny_teacher(batch_size=6), []
    teacher.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    teacher.label_log_probs(PROMPTS, ["w1", "w2", "w3", "w4 w5 w6"])
    assert lengths == [5, 2]


def llava(seed: int = 0):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        initializer_range=0.5,
    )  # fmt: skip
    text = tiny_llama(vocabulary=72).config
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=64, vision_feature_layer=-1)
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
                               image_token="<image>", num_additional_image_tokens=1)  # fmt: skip
    return model, processor


def test_a_vision_model_judges_another_picture():
    model, processor = llava()
    processor.tokenizer.pad_token = None
    teacher = LocalTextTeacher(model, processor, batch_size=2)
    draw = random.Random(0)
    pictures = [Image.effect_noise((8, 8), draw.uniform(20, 90)).convert("RGB") for _ in range(3)]
    prompts = ["<image> w1 w2", "<image> w3", "<image> w4 w5 w6"]
    scores = teacher.label_log_probs(prompts, ["w7", "w8 w9 w10"], images=pictures)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        for j, label in enumerate(("w7", "w8 w9 w10")):
            inputs = processor(text=[f"{prompt} {label}"], images=[picture], return_tensors="pt")
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                log_probs = model.eval()(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            n = len(label.split())
            slow = sum(log_probs[len(ids) - n - 1 + k, ids[len(ids) - n + k]] for k in range(n))
            assert scores[i, j].item() == pytest.approx(slow.item(), abs=1e-4)
    other = teacher.yes_no(prompts[:1], images=[[pictures[1]]], yes="w7", no="w8")
    assert abs(other - teacher.yes_no(prompts[:1], images=pictures[:1], yes="w7", no="w8")) > 1e-4
    assert processor.tokenizer.pad_token is None
    with pytest.raises(ValueError, match="one entry per prompt, got 3 for 1 prompts"):
        teacher.label_log_probs(prompts[:1], ["w1"], images=pictures)
    with pytest.raises(ValueError, match="has no processor to read them"):
        tiny_teacher().label_log_probs(["w1"], ["w1"], images=pictures[:1])


def test_a_trained_teacher_writes_or_judges_nonsense(embedded):
    """3.7 million parameters that have read Python."""
    prompts = ["import os\nimport sys\n\n\ndef add(a, b):\n    return", "for i in range(10):\n   "]
    texts = embedded.generate(prompts, max_new_tokens=12, temperature=0, log_probs=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = embedded.tokenizer(prompt)["input_ids"]
        out = embedded.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert text.token_ids == out
        slow = slow_log_probs(embedded.model, ids, out).item()
        assert sum(text.log_probs) == pytest.approx(slow, abs=1e-3) and slow > -24  # 2 nats a token, of 7.6
    scores = embedded.label_log_probs(
        [prompts[0], "import os\nfrom collections import"], [" a", " zebra", " namedtuple"]
    )
    assert scores.argmax(-1).tolist() == [0, 2]
    assert len(embedded.tokenizer(" namedtuple", add_special_tokens=False)["input_ids"]) > 1
    assert embedded.yes_no(["x = not True  # is", "if x is None:\n    x"], yes=" None", no=" zebra").min() > 0.9
    chat = [{"role": "user", "content": "What does range(3) give?"}]
    assert embedded.generate([chat], max_new_tokens=3)[0].prompt_tokens > len(embedded.tokenizer(chat[0]["content"]))


# ---- what is given ---------------------------------------------------------------------------------------------------
def test_a_model_cannot_be_given_in_all_its_forms(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = LocalTextTeacher(model, tokenizer).generate(["w1"], max_new_tokens=4)
    forms = (str(tmp_path), tmp_path, pipeline("text-generation", model=model, tokenizer=tokenizer),
             FrozenTeacher(model, tokenizer))  # fmt: skip
    for form in forms:
        assert LocalTextTeacher(form).generate(["w1"], max_new_tokens=4) == expected
    assert LocalTextTeacher(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="came without a tokenizer: pass tokenizer="):
        LocalTextTeacher(tiny_llama())
    with pytest.raises(ValueError, match="dtype are for loading a Hub id or folder"):
        LocalTextTeacher(model, tokenizer, dtype="float32")
    small = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="must be a causal language model, got T5ForConditionalGeneration"):
        LocalTextTeacher(T5ForConditionalGeneration(small), tokenizer)
    with pytest.raises(TypeError, match="model must be a model, pipeline, .* got int"):
        LocalTextTeacher(3)


def test_a_missing_pad_or_end_token_matters():
    for gone in (("pad_token",), ("pad_token", "eos_token")):
        tokenizer = tiny_tokenizer()
        for name in gone:
            setattr(tokenizer, name, None)
        eos = None if "eos_token" in gone else 1
        teacher = tiny_teacher(tokenizer=tokenizer, eos_token_id=eos, pad_token_id=None)
        texts = teacher.generate(PROMPTS, max_new_tokens=8, seed=2, stop_strings=["w5"])
        alone = [teacher.generate([p], max_new_tokens=8, seed=2, stop_strings=["w5"])[0] for p in PROMPTS]
        assert texts == alone and tokenizer.pad_token is None
        torch.testing.assert_close(
            teacher.label_log_probs(PROMPTS, ["w1", "w2 w3"]),
            torch.cat([teacher.label_log_probs([p], ["w1", "w2 w3"]) for p in PROMPTS]),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompts=[]), "prompts must be a list of texts or conversations with at least one"),
        (dict(prompts="w1"), "prompts must be a list"),
        (dict(prompts=["w1", ""]), "prompt 1 is empty"),
        (dict(prompts=["w1", " "]), "prompt 1 is no token"),
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[{"role": "user", "content": "w1"}]), r"prompt 0 is one message: .* prompts=\[\[message"),
        (dict(prompts=[[{"text": "w1"}]]), "prompt 0 must be a text or a list of {'role', 'content'}"),
        (dict(prompts=[[{"role": "user", "content": "w1"}]]), "has no chat template, so it cannot read conversations"),
        (dict(prompts=["w1 " * 60]), "prompt 0 has 60 tokens, with 8 more it would exceed the 64 positions"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(temperature=-1), "temperature must be 0 or positive"),
        (dict(temperature=float("nan")), "temperature must be 0 or positive"),
        (dict(top_p=0), "top_p must be above 0"),
        (dict(stop_strings="w1"), "stop_strings must be a list"),
        (dict(stop_strings=[""]), "stop_strings must be a list of texts that are not empty"),
        (
            dict(temperature=0, num_return_sequences=2),
            "num_return_sequences must be at least 1, and 1 at temperature 0",
        ),
        (dict(num_return_sequences=0), "num_return_sequences must be at least 1"),
    ],
)
def test_bad_requests_are_answered(given, message):
    teacher = tiny_teacher()
    teacher._write = None  # nothing may be written before all is checked
    with pytest.raises(ValueError, match=message):
        teacher.generate(**dict(prompts=["w1"], max_new_tokens=8) | given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels must be a list of texts"),
        ("w1", "labels must be a list of texts, got 'w1'"),
        (["w1", " "], "label ' ' is no token"),
        (["w1", "w2", " w1"], "labels 'w1' and ' w1' are the same tokens"),
        (["w1", "w1"], "labels 'w1' and 'w1' are the same tokens"),
        (["w1", "w2 " * 30], "prompt 0 has 40 tokens, with 30 more it would exceed the 64 positions"),
    ],
)
def test_labels_that_are_none_are_scored(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_teacher().label_log_probs(["w1 " * 40], labels)
