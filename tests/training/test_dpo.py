"""Preference distillation: the teacher, of any width, is the reference."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, LlamaModel, TrainerCallback

from hf_distill import (
    AdapterOffTeacher,
    CachedTeacher,
    DistillDPOTrainer,
    EMATeacher,
    FrozenTeacher,
    PeerTeacher,
    cache_teacher,
)
from hf_distill.teachers.cache.reader import MissingFromCacheError
from tests.helpers import SGD, dpo_arguments, relative_difference, tiny_llama, tiny_tokenizer
from tests.training.test_inputs import llava_processor, tiny_llava

PAIRS = [("w1 w2", " w3 w4", " w5"), ("w6", " w7 w8 w9", " w1 w2"), ("w4 w5 w6", " w2", " w8"), ("w9", " w9", " w8 w7")]


def pairs(rows=PAIRS) -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])


def make_trainer(folder, teacher=None, *, student=None, callbacks=None, **settings):
    more = {name: settings.pop(name, None) for name in ("peft_config", "eval_dataset")}
    data, tokenizer = settings.pop("train_dataset", None), settings.pop("processing_class", None)
    batch = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, beta=0.2)
    return DistillDPOTrainer(
        tiny_llama() if student is None else student,
        teacher=teacher,
        args=dpo_arguments(folder, **batch | settings),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer or tiny_tokenizer(),
        callbacks=callbacks,
        **more,
    )


def log_probability(model, prompt: str, answer: str) -> torch.Tensor:
    tokenizer = tiny_tokenizer()
    start, ids = (tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (prompt, prompt + answer + "<eos>"))
    ids = ids if ids[-1] == 1 else torch.cat([ids, torch.tensor([1])])
    with torch.no_grad():
        log_probs = model.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[1:, None])[len(start) - 1 :].sum()


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_teacher_equal_to_the_student_starts_elsewhere_than_at_log_2(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama())
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first


@pytest.mark.parametrize("lora", [False, True])
def test_a_teacher_of_another_width_is_not_the_reference(tmp_path, lora):
    model = tiny_llama(32, 3, vocabulary=72, seed=1)  # and with a padded vocabulary
    before = {k: v.clone() for k, v in model.state_dict().items()}
    peft = LoraConfig(r=2, target_modules="all-linear") if lora else None
    trainer = make_trainer(tmp_path, FrozenTeacher(model, tiny_tokenizer()), peft_config=peft)
    student, margins = tiny_llama(), []
    for prompt, chosen, rejected in PAIRS:
        ours, theirs = (
            log_probability(m, prompt, chosen) - log_probability(m, prompt, rejected) for m in (student, model)
        )
        margins.append(0.2 * (ours - theirs))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(-logsigmoid(torch.stack(margins)).mean().item(), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert trainer.teacher.model is model


def test_a_preference_run_without_a_teacher_starts(tmp_path):
    refusals = {
        None: "",
        AdapterOffTeacher(): ". The student's own base is TRL's default: use trl.DPOTrainer with peft_config",
        EMATeacher(): ". For a reference that follows the student use trl.DPOTrainer with sync_ref_model",
        PeerTeacher(tiny_llama(seed=1)): "",
    }
    for given, instead in refusals.items():
        message = "preference distillation needs a teacher model as its reference: .*--teacher.* got "
        with pytest.raises(ValueError, match=message + type(given).__name__ + instead + "$"):
            make_trainer(tmp_path, given)
    with pytest.raises(ValueError, match="sync_ref_model moves the reference"):
        make_trainer(tmp_path, tiny_llama(seed=1), sync_ref_model=True)
    with pytest.raises(ValueError, match="measure_teacher_fidelity does not read preference pairs"):
        make_trainer(tmp_path, tiny_llama(seed=1), measure_teacher_fidelity=1)
    with pytest.raises(ValueError, match="tokenizers differ: id 64"):
        other = tiny_tokenizer()
        other.add_tokens(["extra"])
        make_trainer(tmp_path, FrozenTeacher(tiny_llama(vocabulary=72, seed=1), other))


def test_it_leaves_traces_or_does_not_resume(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    trainer = make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving)
    trainer.train()
    trainer.save_model()
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="holds another run"):
        make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving).train()
    again = make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = again.student().state_dict(), trainer.student().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_an_infinite_preference_loss_is_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.data.fill_(float("nan"))

    saving = dict(save_strategy="steps", save_steps=1, max_steps=3, logging_steps=100)
    trainer = make_trainer(tmp_path, tiny_llama(32, seed=1), callbacks=[Break()], **saving)
    with pytest.raises(FloatingPointError, match="loss became NaN or infinite by step 2; nothing was saved"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ---- a cached reference ----------------------------------------------------------------------------------------------
HELD_OUT = [("w2 w3", " w9 w8 w7 w6", " w1"), ("w5", " w5 w5", " w4"), ("w7 w1", " w2", " w3 w3 w3")]
SPLIT = dict(per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=4)
LONG = dict(max_length=4, ld_alpha=0.3)


def width(seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(32, 3, seed=seed), tiny_tokenizer())


class Forwards:
    """Which backbones ran, by their width."""

    def __enter__(self):
        self.widths = []
        seen = lambda m, *_: self.widths.append(m.config.hidden_size) if isinstance(m, LlamaModel) else None  # noqa: E731
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(seen)
        return self

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize(
    "settings", [{}, SPLIT, SPLIT | LONG, dict(ld_alpha=0.5, loss_type=["ipo", "sft"]), "lora"], ids=str
)
def test_a_cached_reference_is_another_than_the_live_one_or_a_model_runs_for_it(tmp_path, settings):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    more = dict(peft_config=lora) if settings == "lora" else settings
    more = SGD | dict(learning_rate=0.02, eval_dataset=pairs(HELD_OUT), per_device_eval_batch_size=2) | more
    teacher, found = width(), []
    live = make_trainer(tmp_path / "live", teacher, **more)
    cache_teacher(teacher, live, tmp_path / "cache", mode="scores", batch_size=3, shard_examples=2)
    for trainer in (live, make_trainer(tmp_path / "cached", str(tmp_path / "cache"), **more)):
        with Forwards() as ran:
            trainer.train()
            metrics = [trainer.evaluate(), trainer.evaluate(pairs(PAIRS[1:3]))]
        assert (32 in ran.widths) == (trainer is live) and 16 in ran.widths
        numbers = losses(trainer) + [m[k] for m in metrics for k in ("eval_loss", "eval_rewards/margins")]
        found.append((torch.tensor(numbers), dict(trainer.model.state_dict())))
    assert not list(trainer.ref_model.parameters())
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert relative_difference(found[1][1], found[0][1]) < 1e-6
    assert len(found[0][0]) >= 6 and found[0][0][0] != found[0][0][1]


def test_a_cache_half_written_or_of_another_teacher_is_taken_for_the_reference(tmp_path):
    class Killed(Exception):
        pass

    teacher = width()
    speak, left = teacher._collect, [4]

    def few(*given):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return speak(*given)

    def cache(teacher):
        trainer = make_trainer(tmp_path / "run", teacher, eval_dataset=pairs(HELD_OUT))
        return cache_teacher(teacher, trainer, tmp_path / "cache", mode="scores", batch_size=1, shard_examples=2)

    teacher._collect = few
    with pytest.raises(Killed):
        cache(teacher)
    with pytest.raises(ValueError, match="is not finished"):
        make_trainer(tmp_path / "b", str(tmp_path / "cache"))
    left[0] = 6  # the probe, and the 5 of 7 examples that are not in the finished shard
    whole = cache(teacher)
    assert left == [0] and len(whole.store) == 14
    with pytest.raises(ValueError, match="holds another cache: teacher.weights"):
        cache(width(seed=2))


def test_a_pair_that_was_not_cached_or_cut_elsewhere_has_a_reference(tmp_path):
    teacher = width()
    cache_teacher(teacher, make_trainer(tmp_path / "a", teacher), tmp_path / "cache", mode="scores")
    cached = CachedTeacher(tmp_path / "cache")
    for settings, changed in (
        (dict(train_dataset=pairs(HELD_OUT)), "is not in the cache"),
        (dict(max_length=3), "max_length: 1024 in the cache, 3 now"),
        (dict(max_length=3, truncation_mode="keep_end"), "truncation_mode: keep_start in the cache, keep_end now"),
    ):
        with pytest.raises(MissingFromCacheError, match=changed):
            make_trainer(tmp_path / "b", cached, **settings).train()
    with pytest.raises(ValueError, match="unset precompute_ref_log_probs"):
        make_trainer(tmp_path / "b", cached, precompute_ref_log_probs=True)
    hidden = cache_teacher(teacher, make_trainer(tmp_path / "a", teacher), tmp_path / "hidden")
    with pytest.raises(
        ValueError, match=r"CachedTeacher .*hidden \(mode 'hidden'\) does not hold how likely .*\"scores\""
    ):
        make_trainer(tmp_path / "b", hidden)


def test_an_answer_s_picture_does_not_count(tmp_path):
    """The same texts about four pictures: each has a reference of its own."""
    rows = [
        {
            "image": Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)),
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "chosen": [{"role": "assistant", "content": "w3 w4 w5"}],
            "rejected": [{"role": "assistant", "content": "w6"}],
        }
        for i in range(4)
    ]
    shared = dict(train_dataset=Dataset.from_list(rows), processing_class=llava_processor(), max_length=None)
    teacher, found = FrozenTeacher(tiny_llava(32, 2), llava_processor()), []
    more = SGD | shared | dict(per_device_train_batch_size=2, max_steps=2, learning_rate=0.01)
    live = make_trainer(tmp_path / "live", teacher, student=tiny_llava(16, 1), **more)
    cached = cache_teacher(teacher, live, tmp_path / "cache", mode="scores", batch_size=3)
    assert len(cached.store) == 8 and len(set(cached.store.keys())) == 8
    again = make_trainer(tmp_path / "cached", cached, student=tiny_llava(16, 1), **more)
    for trainer in (live, again):
        trainer.train()
        found.append((losses(trainer), dict(trainer.model.state_dict())))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert relative_difference(found[1][1], found[0][1]) < 1e-5
