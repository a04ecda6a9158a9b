"""Texts that a student writes: what they answer, how they are drawn, who decides, and what is kept of them."""

import pytest
import torch

from hf_distill.curricula.collators import loss_rows
from hf_distill.curricula.onpolicy import (
    DATA,
    REPLAY,
    STUDENT,
    Policy,
    ReplayBuffer,
    Sampling,
    Text,
    prompts_of,
    sample,
)
from hf_distill.teachers import EnsembleTeacher, FrozenTeacher, Teacher
from hf_distill.teachers.base import WrappedTeacher
from tests.helpers import tiny_llama

EOS, PAD = 1, 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def sampling(**changes) -> Sampling:
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=0, ends=(EOS,), padding=PAD)
    return Sampling(**settings | changes)


def batch_of(rows: list[tuple[list[int], list[int]]]) -> dict:
    """Right-padded ids, mask and labels of (ids, labels)."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


# ---- prompts ---------------------------------------------------------------------------------------------------------
def test_the_prompt_is_cut_elsewhere_than_before_the_last_answer():
    one = ([5, 6, 7, 8], [-100, -100, 7, 8])
    two_turns = ([5, 20, 6, 21, 22], [-100, 20, -100, 21, 22])
    assert prompts_of(batch_of([one, two_turns])) == [[5, 6], [5, 20, 6]]


def test_a_row_whose_answer_was_cut_off_has_no_prompt():
    assert prompts_of(batch_of([([5, 6], [-100, -100]), ([5, 6, 7], [-100, -100, 7])]))[0] == [5, 6]


def test_a_text_without_a_prompt_is_answered():
    with pytest.raises(ValueError, match="row 1.*no prompt.*completion_only_loss.*assistant_only_loss"):
        prompts_of(batch_of([([5, 6], [-100, 6]), ([5, 6], [5, 6])]))


# ---- samples ---------------------------------------------------------------------------------------------------------
def greedy_loop(model, prompt: list[int], steps: int) -> list[int]:
    """One row, no padding, no cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def test_padded_greedy_texts_differ_from_a_loop_without_padding_or_cache():
    model = tiny_llama(seed=3).eval()
    texts = sample(model, PROMPTS, sampling(temperature=0), (0,))
    assert texts == [greedy_loop(model, prompt, 12) for prompt in PROMPTS]


def test_samples_do_not_follow_the_students_distribution():
    """Frequencies of the first token against its probabilities, at temperature 2: four standard errors."""
    model, n = tiny_llama(seed=3).eval(), 6000
    texts = sample(model, [PROMPTS[0]] * n, sampling(max_new_tokens=1, temperature=2.0), (0,))
    found = torch.bincount(torch.tensor([text[0] for text in texts]), minlength=64) / n
    expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 2).softmax(-1)
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


def test_top_k_is_what_the_checkpoint_says_instead_of_all_tokens():
    model = tiny_llama(seed=3)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    texts = sample(model, [PROMPTS[0]] * 200, sampling(max_new_tokens=1, temperature=5.0), (0,))
    assert len({text[0] for text in texts}) > 20
    assert model.generation_config.top_k == 1, "the checkpoint's settings are put back"


def test_a_key_does_not_decide_the_draws_or_touches_the_global_ones():
    model = tiny_llama(seed=3, attention_dropout=0.5).train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sample(model, PROMPTS, sampling(), (0, 4, 1, 0))
    assert torch.equal(torch.rand(3), expected), "the global generator was moved"
    torch.manual_seed(8)
    assert sample(model, PROMPTS, sampling(), (0, 4, 1, 0)) == first
    for other in ((1, 4, 1, 0), (0, 5, 1, 0), (0, 4, 0, 0), (0, 4, 1, 1)):
        assert sample(model, PROMPTS, sampling(), other) != first


def test_dropout_and_checkpointing_are_on_while_sampling_or_off_after():
    model = tiny_llama(seed=3, attention_dropout=0.9).train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()  # a part that its owner keeps in eval mode
    lengths, modes = [], []

    def seen(module, args, kwargs, *_):
        lengths.append(kwargs["input_ids"].shape[1])
        modes.append(module.training)

    handle = model.register_forward_pre_hook(seen, with_kwargs=True)
    texts = sample(model, PROMPTS, sampling(temperature=0), (0,))
    handle.remove()
    assert lengths[0] == 5 and set(lengths[1:]) == {1}, "every step reads the whole text again: no cache"
    assert not any(modes)
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert model.is_gradient_checkpointing
    plain = tiny_llama(seed=3).eval()
    assert texts == [greedy_loop(plain, prompt, 12) for prompt in PROMPTS]


def test_tokens_that_the_teacher_lacks_are_drawn():
    texts = sample(tiny_llama(seed=3), PROMPTS * 20, sampling(temperature=5.0, vocabulary=40), (0,))
    assert max(max(text) for text in texts) < 40


def test_the_end_token_is_lost_or_padding_is_learnt():
    model = tiny_llama(seed=3)
    texts = sample(model, PROMPTS * 30, sampling(temperature=3.0), (0,))
    ended = [text for text in texts if EOS in text]
    assert ended and all(text.index(EOS) == len(text) - 1 for text in ended)
    assert all(len(text) == 12 for text in texts if EOS not in text)
    text = Text(PROMPTS[0], [20, EOS])
    batch = batch_of([(text.feature["input_ids"], text.feature["labels"]), ([5] * 9, [-100] + [5] * 8)])
    rows = loss_rows(batch["labels"])
    assert rows["row_labels"][rows["row_document"] == 0].tolist() == [20, EOS]


def test_a_prompt_that_fills_the_context_is_answered():
    with pytest.raises(ValueError, match="prompt of 5 tokens fills the 5 positions.*max_length"):
        sample(tiny_llama(), PROMPTS, sampling(context=5), (0,))
    assert all(len(text) <= 2 for text in sample(tiny_llama(), PROMPTS, sampling(context=7), (0,)))


# ---- who decides -----------------------------------------------------------------------------------------------------
def policy(lmbda=0.5, schedule="constant", **changes) -> Policy:
    return Policy(lmbda, schedule, **dict(end=1.0, step=0.1, tolerance=0.1, capacity=4) | changes)


def test_a_constant_or_linear_share_is_another_one():
    assert [policy(0.3).source(draw, 0.9) for draw in (0.0, 0.29, 0.3, 0.9)] == [STUDENT, STUDENT, DATA, DATA]
    linear = policy(0.2, "linear", end=0.6)
    assert [round(linear.chance(progress), 6) for progress in (0.0, 0.5, 1.0)] == [0.2, 0.4, 0.6]
    assert policy(0.0).source(0.0, 0.0) == DATA and policy(1.0).source(1 - 2**-32, 0.0) == STUDENT


def test_an_adaptive_share_moves_otherwise_than_the_validation_loss_says():
    p, seen = policy(0.0, "adaptive"), []
    for loss in (3.0, 2.0, 2.05, 2.15, 2.2, 2.3, 1.0, 1.2):
        p.judge(loss)
        seen.append(round(p.lmbda, 6))
    #          first, falls, in tolerance, raised, since then +.05, raised, falls, raised
    assert seen == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3]
    p.set(0.95)
    for loss in (5.0, 9.0):
        p.judge(loss)
    assert p.lmbda == 1.0
    fixed = policy(0.2)
    for loss in (1.0, 9.0):
        fixed.judge(loss)
    assert fixed.lmbda == 0.2


def test_fresh_samples_and_replays_are_shared_out_otherwise():
    p = policy(0.8, "adaptive")
    assert p.source(0.79, 0.9) == STUDENT, "until the buffer is full"
    p.buffer.add([Text([i], [EOS]) for i in range(4)])
    assert [p.source(draw, 0.75) for draw in (0.19, 0.21, 0.79, 0.81)] == [STUDENT, REPLAY, REPLAY, DATA]


def test_a_buffer_forgets_the_newest_or_draws_twice():
    kept = ReplayBuffer(3)
    kept.add([Text([i], [i + 1, EOS]) for i in range(5)])
    assert [text.prompt for text in kept.texts] == [[2], [3], [4]]
    drawn = kept.draw(3, (0, 1))
    assert sorted(text.prompt[0] for text in drawn) == [2, 3, 4] and kept.draw(3, (0, 1)) == drawn
    assert len({tuple(t.prompt[0] for t in kept.draw(3, (0, i))) for i in range(60)}) == 6
    assert len(kept.draw(7, (0,))) == 7


@pytest.mark.parametrize("texts", [[], [Text([3, 4], [5]), Text([6], [7, 8, EOS])]])
def test_a_policys_state_is_lost(texts):
    a, b = policy(0.3, "adaptive"), policy(0.3, "adaptive")
    a.judge(1.0), a.judge(2.0), a.buffer.add(texts)
    b.load_state_tensors({name: tensor.clone() for name, tensor in a.state_tensors().items()})
    assert (b.lmbda, b.lowest, list(b.buffer.texts)) == (a.lmbda, a.lowest, texts)


def test_a_run_is_resumed_with_another_share_without_a_word():
    state = policy(0.3, "adaptive").state_tensors()
    for other in (policy(0.4, "adaptive"), policy(0.3)):
        with pytest.raises(ValueError, match="started with lmbda 0.3 adaptive.*resumed with 0.[34].*set_lmbda"):
            other.load_state_tensors(state)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_no_probability_is_set(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        policy().set(value)


def test_a_schedule_undoes_what_is_set():
    with pytest.raises(ValueError, match="linear sets lmbda at every step"):
        policy(0.1, "linear").set(0.5)


def test_a_teacher_that_looks_its_answers_up_is_asked_about_new_text():
    class LooksUp(Teacher):
        readers = ("a cache's",)

    live = FrozenTeacher(tiny_llama())
    assert live.answers_new_text and WrappedTeacher(live).answers_new_text
    assert EnsembleTeacher([live, FrozenTeacher(tiny_llama(32))]).answers_new_text
    assert not LooksUp().answers_new_text and not WrappedTeacher(LooksUp()).answers_new_text
