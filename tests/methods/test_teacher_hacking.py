"""Teacher hacking: what is measured in a run, that it lasts and is the same everywhere, and what answers are learnt."""

import importlib.util
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_distill import CachedTeacher, DistillSFTTrainer, FrozenTeacher, LogitKD, cache_teacher
from hf_distill.curricula.responses import answered, prompts_of, writer_of
from hf_distill.embedded.hacking_chain import Shape
from hf_distill.evaluation.hacking import check_reaction
from hf_distill.methods.teacher_hacking import TeacherHackingConfig, build_trainer, distill, sequence_divergence
from hf_distill.training.hacking import TeacherHackingCallback, student_distance
from tests.helpers import plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def teacher(seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(24, 1, seed=seed), TOKENIZER)


def sequences(n: int, seed: int = 0) -> Dataset:
    """Prompts of 2 tokens and answers of 1 to 8."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(3, 64, (int(k),), generator=draw).tolist() for k in torch.randint(3, 11, (n,), generator=draw)
    ]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})


def prompts(n: int, seed: int = 0) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    words = [[f"w{int(i)}" for i in torch.randint(61, (4,), generator=draw)] for _ in range(n)]
    columns = {"prompt": [" ".join(w[:2]) for w in words], "completion": [" " + " ".join(w[2:]) for w in words]}
    return Dataset.from_dict(columns)


def trainer_of(folder, objective=None, *, the_teacher=None, student=None, callbacks=None, **settings):
    return DistillSFTTrainer(
        student or tiny_llama(16, 1),
        teacher=the_teacher or teacher(),
        objective=objective or LogitKD(per="sample"),
        args=sft_arguments(folder, **dict(max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2) | settings),
        train_dataset=text_dataset(8),
        eval_dataset=text_dataset(4, seed=5),
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )


# ---- what is measured ------------------------------------------------------------------------------------------------
def by_hand(student, reference, rows: Dataset, divergence: str) -> tuple[float, float]:
    """Both means from the models' own logits, sequence by sequence."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        mask = (torch.tensor([row["labels"]])[:, 1:] != -100).long()
        with torch.no_grad():
            theirs, ours = reference(ids).logits[:, :-1], student(ids).logits[:, :-1]
        total += sequence_divergence(theirs, ours, mask, divergence)["per_sequence"].item()
        tokens += int(mask.sum())
    return total / tokens, total / len(rows)


@pytest.mark.parametrize(
    "settings", [{}, {"padding_free": True, "max_length": None}, {"per_device_eval_batch_size": 3}]
)
def test_distances_in_a_run_depend_on_batches_padding_or_dropout(tmp_path, settings):
    student = tiny_llama(16, 1, attention_dropout=0.5).train()
    trainer = trainer_of(tmp_path, student=student, **settings)
    rows = sequences(7)
    from hf_distill.losses import ForwardKL

    before = torch.get_rng_state()
    found = student_distance(trainer, trainer.teacher, rows, ForwardKL())
    assert torch.equal(torch.get_rng_state(), before) and trainer.model.training
    expected = by_hand(student.eval(), trainer.teacher.model, rows, "forward_kl")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
def test_an_oracle_that_is_the_teacher_gives_another_golden_distance_or_the_teacher_as_student_a_proxy(
    tmp_path, divergence
):
    rows, own = sequences(5), teacher()
    trainer = trainer_of(tmp_path / divergence, the_teacher=own)
    callback = TeacherHackingCallback(
        trainer, rows, oracle=teacher(), oracle_sequences=rows, divergence=divergence, skip_steps=0
    )
    measured = callback._measured()
    assert measured["hacking/golden"] == measured["hacking/proxy"] > 0
    expected = by_hand(trainer.model.eval(), own.model, rows, divergence)
    assert measured["hacking/proxy"] == pytest.approx(expected[0], rel=1e-5)
    same = trainer_of(tmp_path / f"{divergence}-same", student=teacher().model, the_teacher=own)
    measured = TeacherHackingCallback(same, rows, divergence=divergence)._measured()
    assert measured["hacking/proxy"] == pytest.approx(0, abs=1e-6) and "hacking/golden" not in measured


def scripted(callback: TeacherHackingCallback, values: list[dict]) -> None:
    """What each evaluation finds."""
    left = list(values)
    callback._measured = lambda: {f"hacking/{k}": v for k, v in left.pop(0).items()}


U_SHAPE = [{"proxy": 1.0 / (i + 1), "golden": g} for i, g in enumerate((3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0))]


def watched(folder, values: list[dict], **settings) -> tuple:
    trainer = trainer_of(folder, max_steps=len(values), eval_strategy="steps", eval_steps=1, logging_strategy="no")
    rows = sequences(2)
    golden = {"oracle": teacher(2), "oracle_sequences": rows} if "golden" in values[0] else {}
    callback = TeacherHackingCallback(trainer, rows, skip_steps=0, **golden, **settings)
    scripted(callback, values)
    trainer.add_callback(callback)
    return trainer, callback


def test_hacking_is_found_late_and_the_run_goes_on_with_warn_or_its_files_are_missing(tmp_path, caplog):
    trainer, callback = watched(tmp_path, U_SHAPE)
    with caplog.at_level(logging.WARNING, "hf_distill"):
        trainer.train()
    assert [r.message for r in caplog.records if "teacher hacking found at step 4" in r.message]
    assert callback.flag_step == 4 and trainer.state.global_step == 8
    told = json.loads((tmp_path / "hacking.json").read_text())
    assert told["verdict"] == callback.verdict() and told["verdict"]["first_hacking_step"] == 4
    assert told["history"]["flag"] == [0, 0, 0, 1, 1, 1, 1, 1] and told["flag_step"] == 4
    assert (tmp_path / "hacking.png").stat().st_size > 5000
    assert callback.describe()["teacher hacking"].startswith("found at step 4: the golden distance is 2.0000 at step 2")


def test_stop_goes_on_after_hacking_was_found(tmp_path):
    trainer, callback = watched(tmp_path, U_SHAPE, on_detect="stop")
    trainer.train()
    assert trainer.state.global_step == 4 and callback.flag_step == 4


def test_a_switch_is_asked_of_a_trainer_that_cannot_and_happens_otherwise_than_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(DistillSFTTrainer, "set_lmbda", lambda self, value: asked.append(value), raising=False)
    trainer, _ = watched(tmp_path / "a", U_SHAPE, on_detect="switch_to_on_policy", online_ratio=0.7)
    trainer.train()
    assert asked == [0.7]
    with pytest.raises(ValueError, match="needs a trainer that generates .set_lmbda., and SimpleNamespace does not"):
        check_reaction("switch_to_on_policy", 1.0, SimpleNamespace())


def test_without_an_oracle_a_bend_in_the_proxy_goes_unseen(tmp_path):
    falling = [{"proxy": 2.0 * (i + 1) ** -1.0} for i in range(8)]
    trainer, callback = watched(tmp_path / "healthy", falling)
    trainer.train()
    assert callback.flag_step is None and callback.summary() == "no sign of it in the proxy"
    log = [e for e in trainer.state.log_history if "hacking/proxy" in e]
    assert log[-1]["hacking/powerlaw_exponent"] == pytest.approx(1.0)
    assert "hacking/powerlaw_exponent" not in log[2] and log[3]["hacking/powerlaw_residual"] == pytest.approx(0)
    bent = [{"proxy": 2.0 * min(i + 1, 4) ** -1.0} for i in range(8)]
    trainer, callback = watched(tmp_path / "bent", bent)
    trainer.train()
    assert callback.flag_step == 6 and callback.summary().startswith("suspected from step 6 on")


def test_a_callback_takes_what_it_cannot_measure(tmp_path):
    trainer, rows = trainer_of(tmp_path), sequences(2)
    for arguments, message in (
        (dict(oracle=teacher()), "go together"),
        (dict(divergence="tvd"), "divergence must be one of"),
        (dict(on_detect="shout"), "on_detect must be one of"),
        (dict(tolerance=math.nan), "tolerance"),
        (dict(online_ratio=0.0), "online_ratio"),
        (dict(oracle=tiny_llama(16, 1, vocabulary=70), oracle_sequences=rows), "70"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherHackingCallback(trainer, rows, **arguments)
    with pytest.raises(ValueError, match="with input_ids and labels, got .'text'"):
        TeacherHackingCallback(trainer, text_dataset(2))
    silent = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="no token|masked|label"):
        TeacherHackingCallback(trainer, silent)


def test_a_cached_teacher_measures_other_than_its_live_one_and_the_oracle_is_looked_up_in_its_cache(tmp_path):
    live, rows, other = teacher(), sequences(6), sequences(4, seed=9)
    args = sft_arguments(tmp_path / "writer", max_length=16, dataset_kwargs={"skip_prepare_dataset": True})

    def trainer_on(train, own):
        return DistillSFTTrainer(
            tiny_llama(16, 1), teacher=own, objective=LogitKD(), args=args, train_dataset=train,
            processing_class=TOKENIZER,
        )  # fmt: skip

    cache_teacher(live, trainer_on(concatenate_datasets([sequences(6, seed=3), rows]), live), tmp_path / "cache")
    cached = CachedTeacher(tmp_path / "cache")
    found = {}
    for name, own in (("live", live), ("cached", cached)):
        trainer = trainer_on(sequences(6, seed=3), own)
        found[name] = TeacherHackingCallback(trainer, rows, oracle=teacher(2), oracle_sequences=other)._measured()
    assert found["cached"] == pytest.approx(found["live"], rel=2e-2)
    assert found["cached"]["hacking/golden"] == found["live"]["hacking/golden"]
    with pytest.raises(ValueError, match="is a cache: give the model itself"):
        TeacherHackingCallback(trainer_on(rows, live), rows, oracle=cached, oracle_sequences=rows)


# ---- answers ---------------------------------------------------------------------------------------------------------
class Seen:
    """Collects what every epoch is trained on."""

    def __init__(self, trainer):
        self.rows: list[set] = []
        real = trainer._replaced if hasattr(trainer, "_replaced") else None
        self.real, self.trainer = real, trainer
        trainer._without_repeats_real = trainer._without_repeats
        trainer._without_repeats = self

    def __call__(self, batch):
        if self.trainer.model.training:
            epoch = int(self.trainer.state.epoch or 0)
            while len(self.rows) <= epoch:
                self.rows.append(set())
            self.rows[epoch] |= {tuple(ids[mask.bool()].tolist()) for ids, mask in
                                 zip(batch["input_ids"], batch["attention_mask"], strict=True)}  # fmt: skip
        return self.trainer._without_repeats_real(batch)


def trained_on(folder, **config) -> list[set]:
    trainer = build_trainer(
        tiny_llama(16, 1),
        teacher(),
        prompts(4),
        TeacherHackingConfig(answer_tokens=5, eval_sequences=3, **config),
        sft_arguments(folder, num_train_epochs=3, per_device_train_batch_size=2),
        processing_class=TOKENIZER,
    )
    seen = Seen(trainer)
    trainer.train()
    return seen.rows


def test_offline_answers_change_or_online_ones_do_not(tmp_path):
    data = trained_on(tmp_path / "data")
    assert data[0] == data[1] == data[2]
    fixed = trained_on(tmp_path / "fixed", num_generations_per_prompt=2)
    assert fixed[0] == fixed[1] == fixed[2] != data[0] and len(fixed[0]) == 8
    fresh = trained_on(tmp_path / "fresh", data_source="online_teacher")
    assert fresh[0] != fresh[1] != fresh[2] != fresh[0] and len(fresh[0]) == 4
    assert {row[:2] for row in fresh[0]} == {row[:2] for row in fresh[2]}, "prompts must stay"
    middle = trained_on(tmp_path / "middle", num_generations_per_prompt=1, refresh_every_epochs=2)
    assert middle[0] == middle[1] != middle[2]


def test_a_student_that_should_learn_from_itself_does_not(tmp_path):
    config = TeacherHackingConfig(data_source="online_student")
    args = sft_arguments(tmp_path, max_steps=2, max_completion_length=4)
    trainer = build_trainer(tiny_llama(16, 1), teacher(), prompts(4), config, args, processing_class=TOKENIZER)
    assert trainer.lmbda == 1.0
    trainer.train()
    assert trainer.state.global_step == 2
    plain = plain_arguments(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a trainer that generates .lmbda., which DistillTrainer is not"):
        build_trainer(tiny_llama(16, 1), teacher(), prompts(4), config, plain, processing_class=TOKENIZER)


def test_distances_are_not_measured_along_answers_of_their_own_references(tmp_path):
    tiny_llama(24, 1, seed=7).save_pretrained(tmp_path / "oracle")
    TOKENIZER.save_pretrained(tmp_path / "oracle")
    config = TeacherHackingConfig(
        oracle_model_name_or_path=str(tmp_path / "oracle"), eval_answers=True, eval_sequences=3, answer_tokens=5,
        skip_steps=0,
    )  # fmt: skip
    args = sft_arguments(tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = build_trainer(
        tiny_llama(16, 1), teacher(), prompts(4), config, args, eval_dataset=prompts(5, seed=8),
        processing_class=TOKENIZER,
    )  # fmt: skip
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TeacherHackingCallback))
    asked = prompts_of(prompts(5, seed=8))[:3]
    for name, reference in (("proxy", teacher()), ("golden", teacher(7))):
        expected = answered(
            writer_of(reference, TOKENIZER, args.device), asked, max_new_tokens=5, seed=args.seed + 7_919
        )
        assert callback.references[name][1][:] == expected[:]
    trainer.train()
    assert callback.history["step"] == [1, 2]
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| teacher hacking | not found" in card and "| data source | offline |" in card


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(data_source="everywhere"), "data_source must be one of"),
        (dict(divergence="x"), "divergence must be one of"),
        (dict(answer_tokens=0), "answer_tokens must be at least 1"),
        (dict(tolerance=math.nan), "tolerance"),
        (dict(min_rel_increase=math.inf), "min_rel_increase"),
        (dict(online_ratio=math.nan), "online_ratio"),
        (dict(patience=0), "patience"),
        (dict(fit_points=1), "fit_points"),
        (dict(refresh_every_epochs=1), "refresh_every_epochs needs answers that the teacher writes"),
        (dict(on_detect="x"), "on_detect"),
    ],
)
def test_a_config_takes_settings_that_cannot_be_meant(config, message):
    with pytest.raises(ValueError, match=message):
        TeacherHackingConfig(**config)


def test_what_cannot_be_trained_or_measured_is_found_late(tmp_path):
    def refused(message, train=None, eval_dataset=None, settings=None, the_teacher=None, **config):
        with pytest.raises(ValueError, match=message):
            build_trainer(
                tiny_llama(16, 1), the_teacher or teacher(), train or prompts(4), TeacherHackingConfig(**config),
                sft_arguments(tmp_path, **settings or {}), eval_dataset=eval_dataset, processing_class=TOKENIZER,
            )  # fmt: skip

    refused("a column prompt or messages", text_dataset(4), data_source="online_teacher")
    refused("a column prompt or messages", eval_dataset=text_dataset(4), eval_answers=True)
    refused("cannot be packed", settings={"packing": True}, data_source="online_teacher")
    refused("pass eval_dataset", oracle_model_name_or_path="x")
    refused("do not fit into max_length 16", data_source="online_teacher", answer_tokens=15)


def test_the_recipe_without_flags_makes_no_chain_or_no_picture(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "recipes" / "teacher_hacking.py"
    spec = importlib.util.spec_from_file_location("recipe_teacher_hacking", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    small = dict(oracle=(16, 1), teacher=(16, 1), student=(16, 1), teacher_steps=2, student_steps=1)
    small |= dict(oracle_answers=40, prompts=64, eval_prompts=4, prompt_tokens=3, answer_tokens=4)
    monkeypatch.setattr("hf_distill.embedded.hacking_chain.Shape", lambda oracle_steps: Shape(oracle_steps=2, **small))
    recipe.main(["--max_steps", "4", "--eval_steps", "2", "--output_dir", str(tmp_path)])
    assert (tmp_path / "hacking.png").stat().st_size > 5000
    told = {
        source: json.loads((tmp_path / source / "hacking.json").read_text()) for source in ("offline", "online_teacher")
    }
    assert all(t["history"]["step"] == [2, 4] and t["history"]["golden"][1] > 0 for t in told.values())
    assert told["offline"]["history"]["proxy"][0] == told["online_teacher"]["history"]["proxy"][0], (
        "the same first epoch"
    )
    assert told["offline"]["history"]["proxy"][1] != told["online_teacher"]["history"]["proxy"][1]
    assert "online_teacher: not found" in capsys.readouterr().out


def test_distill_gives_a_student_that_is_not_clean(tmp_path, caplog):
    args = sft_arguments(tmp_path, max_steps=1)
    with caplog.at_level(logging.WARNING, "hf_distill"):
        student = distill(
            tiny_llama(16, 1), teacher(), text_dataset(4), TeacherHackingConfig(), args, processing_class=TOKENIZER
        )
    assert not hasattr(student, "distill_objective") and not student.training
    assert any("teacher hacking is not looked for" in r.message for r in caplog.records)
