"""DistillSFTTrainer with a teacher that has a tokenizer of its own."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_distill import ULD, DistillSFTTrainer, FrozenTeacher, LogitKD, NextToken, cache_teacher
from hf_distill.curricula.alignment import align_answers
from hf_distill.losses import uld_loss
from hf_distill.methods.logit_kd import LogitKDConfig, build_objective
from hf_distill.training import compat
from tests.helpers import SGD, relative_difference, sft_arguments, tiny_llama

TEXTS = [f"{a} {b} of the {c}, café {i} 🙂" for i, (a, b, c) in enumerate(zip(
    ["king", "a queen", "thou", "lords", "the sea", "mine"] * 2, ["hath", "was", "is"] * 4, ["night", "hour"] * 6,
    strict=True,
))]  # fmt: skip


def made(model, trainer, pre, decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers():
    """(the student's Unigram, the teacher's byte-level BPE)."""
    special = ["<pad>", "<end>", "<unk>"]
    unigram = made(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>"),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = made(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return unigram, bpe


def data(rows: int = 8) -> Dataset:
    asked = [{"prompt": text[:6], "completion": text[6 : 12 + 3 * (i % 5)]} for i, text in enumerate(TEXTS)]
    return Dataset.from_list(asked[:rows])


def trainer_of(folder, tokenizers, objective=None, teacher=None, rows=8, train=None, student=None, **settings):
    ours, theirs = tokenizers
    teacher = teacher or FrozenTeacher(tiny_llama(24, vocabulary=len(theirs), seed=1), theirs)
    settings = SGD | dict(max_length=64, max_steps=1, gradient_checkpointing=False) | settings
    return DistillSFTTrainer(
        student or tiny_llama(vocabulary=len(ours)),
        teacher=teacher,
        objective=objective or ULD(),
        args=sft_arguments(folder, **settings),
        train_dataset=data(rows) if train is None else train,
        eval_dataset=data(rows) if train is None else None,
        processing_class=ours,
    )


def moved(trainer) -> dict:
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    return {k: v - before[k] for k, v in trainer.model.state_dict().items()}


def dense_reference(student, teacher, tokenizers) -> torch.Tensor:
    """uld_loss of every example alone, with offsets taken from the aligned tokens' own texts."""
    values = []
    for row in align_answers(data(), *tokenizers):
        groups = torch.tensor(row["teacher_alignment"]).reshape(-1, 4).tolist()
        s_offsets, t_offsets = ([[0, 0] for _ in row[k]] for k in ("input_ids", "teacher_input_ids"))
        for number, (a, b, c, d) in enumerate(groups):
            for offsets, first, last, side in ((s_offsets, a, b, 0.25), (t_offsets, c, d, 0.5)):
                for k in range(first, last):
                    inner = 100 * number + 1 + 2 * (k - first) + (side > 0.3)
                    offsets[k] = [0, 100 * (number + 1) if k == last - 1 else inner]
        ids = [torch.tensor(row[k])[None] for k in ("input_ids", "teacher_input_ids")]
        labels = [torch.tensor(row[k])[None] for k in ("labels", "teacher_labels")]
        with torch.no_grad():
            theirs = teacher(ids[1]).logits
        values.append(
            uld_loss(
                student(ids[0]).logits, theirs, *labels, *ids, student_offsets=[s_offsets], teacher_offsets=[t_offsets]
            )
        )
    return torch.stack(values).mean()


def test_a_step_is_that_of_the_dense_loss_however_the_batch_is_split(tmp_path, tokenizers):
    steps = {}
    for batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        settings = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=10.0)
        trainer = trainer_of(tmp_path / str(batch), tokenizers, ULD(label_weight=0.0), **settings)
        evaluated = trainer.evaluate()
        steps[batch] = moved(trainer)
        if batch == 8:
            reference = evaluated
        assert evaluated["eval_uld"] == pytest.approx(reference["eval_uld"], rel=1e-5)
    assert relative_difference(steps[2], steps[8]) < 1e-5 and relative_difference(steps[3], steps[8]) < 1e-5
    ours, theirs = tokenizers
    student, teacher = tiny_llama(vocabulary=len(ours)), tiny_llama(24, vocabulary=len(theirs), seed=1)
    loss = dense_reference(student, teacher.eval(), tokenizers)
    assert reference["eval_uld"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    grads = {name: -10 * p.grad for name, p in student.named_parameters()}
    assert relative_difference({name: steps[8][name] for name in grads}, grads) < 1e-5


def test_one_model_on_both_sides_is_zero(tmp_path, tokenizers):
    _, bpe = tokenizers
    same = tiny_llama(vocabulary=len(bpe))
    for objective in (ULD(), ULD(hybrid=True)):
        trainer = trainer_of(
            tmp_path, (bpe, bpe), objective, FrozenTeacher(copy.deepcopy(same), bpe), student=copy.deepcopy(same)
        )
        found = trainer.evaluate()
        assert found["eval_uld"] == pytest.approx(0, abs=1e-6) and found["eval_cross_entropy"] > 1
        assert "eval_teacher_kl" not in found  # rows of other tokens: nothing compares them one by one


def test_a_cache_of_the_teacher_says_the_same(tmp_path, tokenizers):
    live = trainer_of(tmp_path / "live", tokenizers, per_device_train_batch_size=4)
    teacher = live.teacher.teacher
    cached = cache_teacher(teacher, live, tmp_path / "cache", mode="hidden", dtype="float32")
    reading = trainer_of(tmp_path / "cached", tokenizers, teacher=cached, per_device_train_batch_size=4)
    assert reading.evaluate()["eval_uld"] == pytest.approx(live.evaluate()["eval_uld"], rel=1e-5)
    assert relative_difference(moved(reading), moved(live)) < 1e-5
    topk = cache_teacher(teacher, live, tmp_path / "topk", mode="topk", k=4)
    with pytest.raises(ValueError, match='make it with mode="hidden"'):
        trainer_of(tmp_path, tokenizers, teacher=topk)


def test_it_learns_resumes_and_leaves_a_clean_student(tmp_path, tokenizers):
    settings = dict(optim="adamw_torch", learning_rate=1e-2, max_steps=4, save_strategy="steps", save_steps=2)
    settings |= dict(per_device_train_batch_size=4)
    objective = ULD(hybrid=True, weight=20.0, label_weight=0.0) + 0.1 * NextToken()
    trainer = trainer_of(tmp_path / "run", tokenizers, copy.deepcopy(objective), **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_uld/uld"] < before["eval_uld/uld"]
    again = trainer_of(tmp_path / "run", tokenizers, objective, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert loaded.num_parameters() == tiny_llama(vocabulary=len(own)).num_parameters()
    assert own.get_vocab() == tokenizers[0].get_vocab()


def test_examples_that_were_repeated_for_the_last_batch_do_not_count(tmp_path, tokenizers, monkeypatch):
    trainer = trainer_of(tmp_path, tokenizers)
    features = list(trainer.train_dataset)
    expected = trainer._signals(trainer.model, trainer.data_collator(features[:3]))[2]
    monkeypatch.setattr(compat, "real_samples", lambda accelerator: 3)
    kept = trainer._without_repeats(trainer.data_collator([*features[:3], features[0]]))
    assert trainer._counts(kept)["sample"] == 3 and len(kept["teacher_loss_rows"]) != len(kept["loss_rows"])
    for name, term in trainer._signals(trainer.model, kept)[2].items():
        torch.testing.assert_close(term.value, expected[name].value)
    monkeypatch.setattr(compat, "real_samples", lambda accelerator: 0)
    none = trainer._signals(trainer.model, trainer._without_repeats(trainer.data_collator(features[:2])))[2]
    assert {name: term.value.item() for name, term in none.items()} == {"label": 0.0, "uld": 0.0}


@pytest.mark.parametrize("settings, message", [
    (dict(packing=True), "packing does not go with a teacher of another tokenizer"),
    (dict(lmbda=0.5), "lmbda or seq_kd does not go"),
    (dict(objective=ULD() + LogitKD()), "LogitKD in the student's"),
    (dict(max_length=2), "none of the 8 answers is left"),
    (dict(objective=LogitKD()), "tokenizers differ.*--cross_tokenizer uld"),
    (dict(train=Dataset.from_dict({"input_ids": [[3, 4, 5]]})), "row 0 cannot be aligned: it has the columns"),
])  # fmt: skip
def test_what_cannot_work_is_said_before_training(tmp_path, tokenizers, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizers, **settings)


def test_the_objective_and_the_flag_check_their_arguments(tokenizers):
    for wrong in (
        dict(weight=-1.0), dict(weight=float("nan")), dict(weight=0.0, label_weight=0.0), dict(beta=2.0),
        dict(student_temperature=0.0), dict(matched_weight=1.0), dict(matched_weight=1.0, unmatched_weight=1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must|zero|together|belong"):
            ULD(**wrong)
    with pytest.raises(ValueError, match="use hybrid=False"):
        ULD(hybrid=True).match({"a": 0}, {"b": 0}, (1, 1))
    found = build_objective(LogitKDConfig(cross_tokenizer="hybrid_uld", kd_weight=0.5, temperature=2.0))
    assert isinstance(found, ULD) and found.hybrid and found.weights(0.0) == {"label": 1.0, "uld": 0.5}
    assert found.temperatures == {"student_temperature": 2.0, "teacher_temperature": 2.0}
    assert build_objective(LogitKDConfig(cross_tokenizer="uld", label_weight=0.0)).label_weight == 0
    assert build_objective(LogitKDConfig()).label_weight == 0
    with pytest.raises(ValueError, match="cross_tokenizer must be one of none, uld, hybrid_uld, got 'gold'"):
        LogitKDConfig(cross_tokenizer="gold")
    with pytest.raises(ValueError, match="divergence, t_squared do not apply"):
        LogitKDConfig(cross_tokenizer="uld", divergence="reverse_kl", t_squared=True)
