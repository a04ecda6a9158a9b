"""A student learns the same from a cache as from the teacher itself, and a cache that does not fit is refused."""

import json
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import (
    CachedTeacher,
    DataCollatorForDistillation,
    DistillSFTTrainer,
    FeatureKD,
    FrozenTeacher,
    LogitKD,
    Objective,
    TeacherAgreementCallback,
    cache_teacher,
)
from hf_distill.methods.taid import TAID
from hf_distill.teachers import load_teacher
from hf_distill.teachers.cache.reader import MissingFromCacheError
from hf_distill.teachers.cache.store import CorruptCacheError
from tests.helpers import SGD, relative_difference, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

DATA, HELD_OUT = text_dataset(24), text_dataset(6, seed=7)


def live_teacher(seed=1, **config) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(32, seed=seed, **config), tiny_tokenizer(), name="tiny")


def make_trainer(folder, teacher, *, objective=None, data=DATA, processing_class=None, eval_dataset=None, **settings):
    settings = SGD | dict(max_steps=4, per_device_train_batch_size=4, train_sampling_strategy="sequential") | settings
    return DistillSFTTrainer(
        tiny_llama(),
        teacher=teacher,
        objective=objective or LogitKD(label_weight=0.5),
        args=sft_arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=processing_class or tiny_tokenizer(),
    )


def trained(folder, teacher, **settings) -> dict:
    trainer = make_trainer(folder, teacher, **settings)
    trainer.train()
    losses = {"losses": torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])}
    return {k: v.clone() for k, v in trainer.student().state_dict().items()} | losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Caches of one teacher in every mode, made from a trainer's data, training and evaluation."""
    root = tmp_path_factory.mktemp("caches")
    teacher = live_teacher()
    trainer = make_trainer(root / "run", teacher, eval_dataset=HELD_OUT)
    for name, options in {
        "hidden": {},
        "int8": {"dtype": "int8"},
        "all": {"positions": "all"},
        "topk": {"mode": "topk", "k": 64},
        "warm": {"mode": "topk", "k": 64, "temperature": 2.0},
        "sampled": {"mode": "sampled", "draws": 16},
        "scores": {"mode": "scores"},
    }.items():
        options = {"mode": "hidden"} | options
        cache_teacher(teacher, trainer, root / name, batch_size=4, shard_examples=8, **options)
    return root


# ---- the same training ----------------------------------------------------------------------------------------------
def test_the_same_batches_train_another_student_from_a_cache(folder, tmp_path):
    live = trained(tmp_path / "live", live_teacher(), report_to="none")
    cached = trained(tmp_path / "cached", str(folder / "hidden"))
    assert all(torch.equal(cached[k], live[k]) for k in live)


@pytest.mark.parametrize(
    "settings",
    [
        dict(train_sampling_strategy="random", per_device_train_batch_size=3, num_train_epochs=2, max_steps=-1),
        dict(packing=True, max_length=24, per_device_train_batch_size=2),
        dict(padding_free=True, max_length=None, train_sampling_strategy="random"),
        dict(dataloader_num_workers=2, train_sampling_strategy="random"),
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=3),
    ],
    ids=["shuffled", "packed", "padding_free", "workers", "accumulated"],
)
def test_other_batches_train_another_student_from_a_cache(folder, tmp_path, settings):
    live = trained(tmp_path / "live", live_teacher(), **settings)
    cached = trained(tmp_path / "cached", CachedTeacher(folder / "hidden"), **settings)
    assert relative_difference(cached, live) < 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_all_ids_of_a_topk_cache_train_another_student(folder, tmp_path, divergence):
    live = trained(tmp_path / "live", live_teacher(), objective=LogitKD(divergence))
    cached = trained(tmp_path / "cached", CachedTeacher(folder / "topk"), objective=LogitKD(divergence))
    assert relative_difference(cached, live) < 1e-5


def test_draws_train_a_student(folder, tmp_path):
    live = trained(tmp_path / "live", live_teacher())
    cached = trained(tmp_path / "cached", CachedTeacher(folder / "sampled"))
    assert 1e-4 < relative_difference(cached, live) < 0.2


def test_int8_rows_train_a_student_that_is_far_off(folder, tmp_path):
    live = trained(tmp_path / "live", live_teacher())
    cached = trained(tmp_path / "cached", CachedTeacher(folder / "int8"))
    assert 0 < relative_difference(cached, live) < 0.01


def test_evaluation_measures_something_else_from_a_cache(folder, tmp_path):
    def evaluated(teacher) -> dict:
        return make_trainer(tmp_path, teacher, eval_dataset=HELD_OUT).evaluate()

    live, cached = evaluated(live_teacher()), evaluated(CachedTeacher(folder / "hidden"))
    assert {k for k in live if "kl" in k} and live["eval_teacher_kl"] > 0
    for key in ("eval_loss", "eval_teacher_kl", "eval_agreement", "eval_cross_entropy"):
        assert cached[key] == pytest.approx(live[key], rel=1e-6)
    for mode in ("topk", "sampled"):
        measured = evaluated(CachedTeacher(folder / mode))
        assert measured["eval_teacher_kl"] == pytest.approx(live["eval_teacher_kl"], rel={"topk": 1e-5}.get(mode, 0.2))
        assert "eval_agreement" not in measured, "its most likely token may not have been drawn"


def test_log_probabilities_at_another_temperature_pass_for_the_teacher_s(folder, tmp_path):
    warm = make_trainer(tmp_path, str(folder / "warm"), objective=LogitKD(temperature=2.0), eval_dataset=HELD_OUT)
    warm.add_callback(TeacherAgreementCallback())
    assert "eval_teacher_kl" not in warm.evaluate()
    warm.train()
    assert not [key for entry in warm.state.log_history for key in entry if key == "teacher_kl"]
    with pytest.raises(ValueError, match="temperature 2.0, term 'taid' of TAID asks for 1.0"):
        make_trainer(tmp_path / "taid", str(folder / "warm"), objective=TAID())


def test_other_temperatures_and_divergences_need_another_cache_of_hidden_rows(folder, tmp_path):
    objective = LogitKD("generalized_jsd", options={"beta": 0.3}, temperature=2.0)
    live = trained(tmp_path / "live", live_teacher(), objective=objective)
    cached = trained(tmp_path / "cached", CachedTeacher(folder / "hidden"), objective=objective)
    assert all(torch.equal(cached[k], live[k]) for k in live)


def test_a_step_from_a_cache_runs_the_teacher_s_trunk(folder, tmp_path):
    def flops_of_step(teacher) -> int:
        trainer = make_trainer(tmp_path / "run", teacher)
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
        trainer._count_window([batch], trainer.args.device)
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, batch).backward()
        return counter.get_total_flops()

    teacher = live_teacher()
    trainer = make_trainer(tmp_path / "run", teacher)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with FlopCounterMode(display=False) as trunk, torch.no_grad():
        teacher.model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert flops_of_step(teacher) - flops_of_step(CachedTeacher(folder / "hidden")) == trunk.get_total_flops() > 0
    for name in ("hidden", "topk"):
        cached = CachedTeacher(folder / name)
        collate = DataCollatorForDistillation(trainer.data_collator.base, readers=cached.readers)
        own = collate([trainer.train_dataset[i] for i in range(4)])
        with FlopCounterMode(display=False) as counter:
            cached(own)
        assert counter.get_total_flops() == 0


def test_scores_arrive_at_other_rows(folder, tmp_path):
    seen = []

    class Reads(Objective):
        needs = frozenset({"student.logits"})

        def other_terms(self, student, teacher, progress):
            seen.append((student, teacher.features["log_probs"]))
            return {"zero": 0.0 * student.logits.hidden.sum()}

    trainer = make_trainer(
        tmp_path, CachedTeacher(folder / "scores"), objective=Reads(), max_steps=2, train_sampling_strategy="random"
    )
    trainer.train()
    teacher = live_teacher()
    for student, log_probs in seen:
        expected = teacher(student.batch).logits.dense().log_softmax(-1).gather(-1, student.labels[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected)
    with pytest.raises(ValueError, match="LogitKD needs logits of its teacher, CachedTeacher gives only"):
        make_trainer(tmp_path, CachedTeacher(folder / "scores"))


def test_two_caches_of_one_ensemble_are_mixed_up(folder, tmp_path):
    from hf_distill import EnsembleTeacher

    other = live_teacher(seed=2)
    cache_teacher(other, make_trainer(tmp_path / "run", other), tmp_path / "other")
    live = EnsembleTeacher({"a": live_teacher(), "b": other})
    cached = EnsembleTeacher({"a": CachedTeacher(folder / "hidden"), "b": CachedTeacher(tmp_path / "other")})
    ours, theirs = trained(tmp_path / "cached", cached), trained(tmp_path / "live", live)
    assert relative_difference(ours, theirs) < 1e-5
    copy = shutil.copytree(folder / "hidden", tmp_path / "copy")
    twice = EnsembleTeacher({"a": CachedTeacher(folder / "hidden"), "b": CachedTeacher(copy)})
    with pytest.raises(ValueError, match="two caches give cached_[0-9a-f]+_hidden"):
        make_trainer(tmp_path / "twice", twice)


# ---- which positions ------------------------------------------------------------------------------------------------
PAIRS = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3} w{i}"} for i in range(12)]


def test_all_positions_serve_every_mask(tmp_path):
    from datasets import Dataset

    data, teacher = Dataset.from_list(PAIRS), live_teacher()
    answers = make_trainer(tmp_path / "a", teacher, data=data, completion_only_loss=True)
    cache_teacher(teacher, answers, tmp_path / "loss")
    cache_teacher(teacher, answers, tmp_path / "all", positions="all")
    live = trained(tmp_path / "b", teacher, data=data, completion_only_loss=False)
    cached = trained(tmp_path / "c", str(tmp_path / "all"), data=data, completion_only_loss=False)
    assert relative_difference(cached, live) < 1e-5
    trainer = make_trainer(tmp_path / "d", str(tmp_path / "loss"), data=data, completion_only_loss=False)
    with pytest.raises(MissingFromCacheError, match="not all of its loss positions.*completion_only_loss: True in the"):
        trainer.train()
    settings = dict(data=data, completion_only_loss=True, padding_free=True, max_length=None)
    live = trained(tmp_path / "e", teacher, **settings)
    cached = trained(tmp_path / "f", str(tmp_path / "loss"), **settings)
    assert relative_difference(cached, live) < 1e-5


def test_left_padding_shifts_positions(folder):
    cached = CachedTeacher(folder / "hidden")
    tokenizer = tiny_tokenizer()
    features = [{"input_ids": [*tokenizer(text)["input_ids"], 1]} for text in DATA["text"][:5]]
    plain = DataCollatorForLanguageModeling(pad_token_id=0)

    def left(examples):
        batch = plain(examples)
        for i, example in enumerate(examples):
            shift = batch["input_ids"].shape[1] - len(example["input_ids"])
            for value in batch.values():
                value[i] = value[i].roll(shift)
            batch["labels"][i, shift] = -100  # nothing stands before the first token that could predict it
        return batch

    right = DataCollatorForDistillation(plain, readers=cached.readers)(features)
    shifted = DataCollatorForDistillation(left, readers=cached.readers)(features)
    (key,) = cached.reader.keys.values()
    assert shifted["attention_mask"][:, 0].sum() < 5 and torch.equal(right[key], shifted[key])


# ---- what does not fit ----------------------------------------------------------------------------------------------
def test_documents_that_no_one_cached_are_made_up(folder, tmp_path):
    trainer = make_trainer(tmp_path / "a", str(folder / "hidden"), data=text_dataset(8, seed=5))
    with pytest.raises(MissingFromCacheError, match="is not in the cache .*: the data changed"):
        trainer.train()
    trainer = make_trainer(tmp_path / "b", str(folder / "hidden"), max_length=6)
    with pytest.raises(MissingFromCacheError, match="max_length.*Different now: max_length: 16 in the cache, 6 now"):
        trainer.train()
    trainer = make_trainer(tmp_path / "c", str(folder / "hidden"), packing=True, packing_strategy="wrapped")
    with pytest.raises(MissingFromCacheError, match="packing: False in the cache, True now"):
        trainer.train()


def test_a_cache_gives_what_it_does_not_have(folder, tmp_path):
    with pytest.raises(ValueError, match="FeatureKD needs hidden_states of its teacher, CachedTeacher gives only"):
        make_trainer(tmp_path, str(folder / "hidden"), objective=FeatureKD())
    with pytest.raises(ValueError, match=r"log-probabilities at temperature 1.0, term 'kd' of LogitKD asks for 2.0"):
        make_trainer(tmp_path, str(folder / "topk"), objective=LogitKD(temperature=2.0))
    with pytest.raises(ValueError, match="known by draws would be biased"):
        trained(tmp_path, str(folder / "sampled"), objective=LogitKD("reverse_kl"))
    with pytest.raises(ValueError, match="has no weights to load with load_in_4bit"):
        make_trainer(tmp_path, str(folder / "hidden"), teacher_load_in_4bit=True)
    with pytest.raises(ValueError, match="the batch has no cached_.*readers=teacher.readers"):
        CachedTeacher(folder / "hidden")({"input_ids": torch.zeros(1, 2)})


def test_another_teacher_or_tokenizer_passes_for_the_cached(folder):
    CachedTeacher(folder / "hidden", teacher=live_teacher(), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="is the cache of tiny and does not fit: weights: [0-9a-f]+ in the cache"):
        CachedTeacher(folder / "hidden", teacher=live_teacher(seed=3))
    bfloat16 = FrozenTeacher(tiny_llama(32, seed=1).bfloat16(), tiny_tokenizer())
    with pytest.raises(ValueError, match="dtype: float32 in the cache, bfloat16 now"):
        CachedTeacher(folder / "hidden", teacher=bfloat16)
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ValueError, match="does not fit: tokenizer: [0-9a-f]+ in the cache, [0-9a-f]+ now$"):
        CachedTeacher(folder / "hidden", processing_class=other)
    other = tiny_tokenizer()
    other.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="does not fit: chat_template: nothing in the cache, [0-9a-f]+ now$"):
        CachedTeacher(folder / "hidden", processing_class=other)


def test_a_student_with_another_tokenizer_learns_from_a_cache(folder, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ValueError, match="student and teacher tokenizers differ"):
        make_trainer(tmp_path, str(folder / "hidden"), processing_class=other)


def test_a_folder_that_is_no_finished_cache_is_read(folder, tmp_path):
    with pytest.raises(ValueError, match="is no teacher's cache"):
        CachedTeacher(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder / "hidden", copy)
    manifest = json.loads((copy / "cache.json").read_text())
    for change, message in (({"shards": None}, "is not finished"), ({"format": 99}, "has cache format 99")):
        (copy / "cache.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            load_teacher(copy)
    (copy / "cache.json").write_text("{")
    with pytest.raises(CorruptCacheError, match="cannot be read"):
        load_teacher(copy)


def test_a_damaged_head_is_used(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "hidden", copy)
    (head,) = copy.glob("head-*.safetensors")
    content = bytearray(head.read_bytes())
    content[-3] ^= 1
    head.write_bytes(content)
    with pytest.raises(CorruptCacheError, match="the teacher's head, is missing or damaged"):
        make_trainer(tmp_path / "run", str(copy))


def test_a_cache_tells_who_speaks(folder):
    cached = CachedTeacher(folder / "topk")
    assert cached.describe() == live_teacher().describe() | {"teacher_cache": "topk"}
    assert cached.vocabulary_size() == 64 and cached.config.hidden_size == 32
    assert cached.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
