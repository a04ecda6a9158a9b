"""Preference distillation: its settings, its pairs, and that the teacher makes the difference."""

import math

import pytest
import torch
from datasets import Dataset

from hf_distill import FrozenTeacher, LocalTextTeacher
from hf_distill.losses import preference_loss
from hf_distill.methods import preference_kd
from hf_distill.methods.preference_kd import PreferenceKDConfig
from tests.helpers import dpo_arguments, tiny_llama, tiny_tokenizer
from tests.training.test_dpo import HELD_OUT, PAIRS, log_probability, losses, pairs

OWN = dict(pairs="student", sample_max_new_tokens=4)


def teacher(seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(32, 3, seed=seed), tiny_tokenizer())


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": chosen} for prompt, chosen, _ in PAIRS])


def trainer(folder, config=None, reference=None, data=None, **settings):
    given = {"processing_class": tiny_tokenizer()}
    given |= {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    return preference_kd.build_trainer(
        tiny_llama(),
        reference or teacher(),
        pairs() if data is None else data,
        config or PreferenceKDConfig(),
        dpo_arguments(folder, **dict(per_device_train_batch_size=4, max_steps=4, learning_rate=0.02) | settings),
        **given,
    )


def test_the_reference_is_the_student_or_its_pairs_are_not_told_apart(tmp_path):
    run = trainer(tmp_path, eval_dataset=pairs())
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    ours = torch.tensor([[log_probability(tiny_llama(), p, a) for a in (c, r)] for p, c, r in PAIRS]).T
    theirs = torch.tensor([[log_probability(teacher().model, p, a) for a in (c, r)] for p, c, r in PAIRS]).T
    assert losses(run)[0] == pytest.approx(preference_loss(*ours, *theirs)[0].item(), rel=1e-4)
    assert losses(run)[0] != pytest.approx(math.log(2), abs=1e-3)
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] and after["eval_loss"] < before["eval_loss"]
    assert losses(trainer_after(tmp_path / "other"))[0] != pytest.approx(losses(run)[0], rel=1e-3)


def trainer_after(folder):
    run = trainer(folder, reference=teacher(seed=2), max_steps=1)
    run.train()
    return run


def test_rejected_answers_are_another_student_s(tmp_path):
    run = trainer(tmp_path, PreferenceKDConfig(**OWN), data=questions(), eval_dataset=questions(), seed=3)
    writer = LocalTextTeacher(tiny_llama(), tiny_tokenizer())
    written = writer.generate([p for p, *_ in PAIRS], max_new_tokens=4, seed=3)
    rejected = [tiny_tokenizer().decode(ids[:-1]) for ids in run.train_dataset["rejected_ids"]]
    assert rejected == [generation.text.strip() for generation in written]
    assert run.eval_dataset["rejected_ids"] == run.train_dataset["rejected_ids"]
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_a_teacher_s_answers_are_kept_and_chosen(tmp_path):
    config = PreferenceKDConfig(**OWN, chosen="teacher", answer_store=str(tmp_path / "answers"))
    for _ in range(2):
        run = trainer(tmp_path / "run", config, data=questions(), loss_type="sigmoid_norm")
    written = LocalTextTeacher(teacher()).generate([p for p, *_ in PAIRS], max_new_tokens=4, temperature=0.0)
    chosen = [tiny_tokenizer().decode(ids[:-1]) for ids in run.train_dataset["chosen_ids"]]
    assert chosen == [generation.text.strip() for generation in written]
    stored = [line for path in (tmp_path / "answers").rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(stored) == 2 * len(PAIRS), "written twice"
    run.train()


def test_distill_gives_something_else_than_a_clean_trained_student(tmp_path):
    before = tiny_llama().state_dict()
    args = dpo_arguments(tmp_path, max_steps=1, learning_rate=0.01)
    student = preference_kd.distill(
        tiny_llama(), teacher(), pairs(HELD_OUT), PreferenceKDConfig(), args, processing_class=tiny_tokenizer()
    )
    after = student.state_dict()
    assert after.keys() == before.keys() and any(not torch.equal(after[k], before[k]) for k in before)
    assert "fused" not in str(student.forward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pairs="drawn"), "pairs must be one of given, student"),
        (dict(pairs="student", chosen="best"), "chosen must be one of completion, teacher"),
        (dict(chosen="teacher"), "set pairs=student"),
        (dict(samples_per_prompt=0), "samples_per_prompt must be at least 1"),
        (dict(sample_temperature=float("nan")), "sample_temperature must be 0 or positive"),
        (dict(sample_temperature=0.0, samples_per_prompt=2), "are all the same"),
    ],
)
def test_bad_settings_go_through(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceKDConfig(**settings)


def test_the_recipe_without_flags_shows_no_pairs(tmp_path, capsys, monkeypatch):
    from hf_distill import recipe_preference
    from tests.test_recipes import recipe, reloads

    monkeypatch.setattr(recipe_preference, "MIMIC_STEPS", 1)
    argv = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    recipe("preference_kd").main(argv)
    assert "held-out pairs told rightly" in capsys.readouterr().out
    reloads(tmp_path / "out")
