"""How a run is split into batches must not change its loss, gradients, weights or evaluation numbers (one process)."""

import pytest
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import (
    DataCollatorForDistillation,
    DistillSFTTrainer,
    FrozenTeacher,
    LogitKD,
    NextToken,
    Objective,
)
from hf_distill.losses import DIVERGENCES, one_term
from hf_distill.training import compat
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.training.scaling_cases import Case, by_hand, by_trainer, compare, examples

TOLERANCE = 1e-5
SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}
MODELS = {
    "full": Case(),
    "seven_rows": Case(rows=7),
    "lora": Case(part="lora"),
    "head": Case(part="head"),
    "tied": Case(part="tied"),
    "no_checkpointing": Case(settings={"gradient_checkpointing": False}),
    "adapter_off": Case(part="lora", adapter_off=True),
    "packed": Case(packing=True),
    "dense_logits": Case(settings={"dense_logits": True}),
    "bert": Case("bert", rows=7),
    "t5": Case("t5", rows=7),
    "bart": Case("bart", rows=7),
}


def assert_exact(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    worst = compare(ours, reference)
    assert set(worst) == {"loss", "gradient", "weight", "mean"}
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_changes_no_number(split, tmp_path):
    per_device, accumulation = SPLITS[split]
    case = MODELS["full"].split(per_device=per_device, accumulation=accumulation, eval_size=per_device)
    ours, facts = by_trainer(case, tmp_path)
    assert facts["steps"] == 2 and facts["processes"] == 1
    assert_exact(ours, by_hand(case))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "full"])
def test_uneven_micro_batches_change_no_number(kind, tmp_path):
    case = MODELS[kind].split(per_device=3, accumulation=8, eval_size=3)  # the last micro-batch is smaller
    ours, facts = by_trainer(case, tmp_path)
    assert facts["steps"] == 2
    assert_exact(ours, by_hand(case))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_scaled_exactly(name, tmp_path):
    student, teacher = tiny_llama(16, 1, seed=1), tiny_llama(16, 1, seed=2)
    case = Case(rows=5)
    rows = {}
    for which, model in (("student", student), ("teacher", teacher)):
        rows[which] = torch.cat([model(torch.tensor([e["input_ids"]])).logits[0, :-1] for e in examples(case)])
    expected = one_term(rows["student"], rows["teacher"].detach(), DIVERGENCES[name](temperature=1.5))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    args = sft_arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1, optim="sgd"
    )
    trainer = DistillSFTTrainer(
        student,
        teacher=FrozenTeacher(teacher),
        objective=LogitKD(name, temperature=1.5),
        args=args,
        train_dataset=text_dataset(5, seed=4),
        processing_class=tiny_tokenizer(),
    )
    window = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(window, 3, torch.device("cpu"))
    loss = sum(trainer.training_step(trainer.model, batch) for batch in batches)
    torch.testing.assert_close(loss, expected.detach(), rtol=TOLERANCE, atol=0)
    ours = {f"gradient.{n}": p.grad for n, p in student.named_parameters() if "distill" not in n}
    assert compare(ours, {f"gradient.{n}": g for n, g in gradients.items()})["gradient"] <= TOLERANCE


def simple_trainer(folder, objective=None, train=None, **settings):
    options = {k: settings.pop(k) for k in ("eval_dataset", "callbacks") if k in settings}
    return DistillSFTTrainer(
        tiny_llama(16, 2, seed=1),
        teacher=FrozenTeacher(tiny_llama(16, 2, seed=2)),
        objective=objective or LogitKD(label_weight=0.5),
        args=sft_arguments(folder, **settings),
        train_dataset=train or text_dataset(8, seed=4),
        processing_class=tiny_tokenizer(),
        **options,
    )


def test_evaluation_does_not_depend_on_its_batch_size_or_padding(tmp_path):
    trainer = simple_trainer(tmp_path, LogitKD(label_weight=0.5) + LogitKD("tvd", per="sample"))
    data = trainer._prepare_dataset(
        text_dataset(7, seed=8),
        trainer.processing_class,
        trainer.args,
        packing=False,
        formatting_func=None,
        dataset_name="e",
    )
    found = []
    for size in (1, 3, 7):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate(data)
        found.append({k: v for k, v in metrics.items() if not k.endswith("second") and "runtime" not in k})
    assert {"eval_loss", "eval_teacher_kl", "eval_agreement", "eval_cross_entropy", "eval_logitkd1/kd"} <= found[
        0
    ].keys()
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


class CountsPairs(Objective):
    """Half the documents, rounded down: a unit of its own, and none in a micro-batch of one document."""

    needs = frozenset({"student.logits"})
    uses_teacher = False
    per = "pairs"

    def count(self, batch):
        return {"pairs": len(batch["document_example"]) // 2}

    def other_terms(self, student, teacher, progress):
        size = student.logits.hidden.float().pow(2).mean(-1)
        sums = torch.zeros(len(student.rows.example)).index_add_(0, student.rows.document, size)
        pairs = len(sums) // 2
        return {"pair": (sums[: 2 * pairs : 2] + sums[1 : 2 * pairs : 2]).mean()}  # nan where there is no pair


def test_own_units_and_empty_micro_batches_count_exactly(tmp_path):
    losses = {}
    for per_device, accumulation in ((8, 1), (3, 3), (2, 4)):
        trainer = simple_trainer(
            tmp_path / str(per_device),
            CountsPairs(),
            train=text_dataset(8 if per_device != 3 else 7, seed=4),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        losses[per_device] = trainer.state.log_history[0]["loss"]
    assert losses[2] == pytest.approx(losses[8], rel=1e-6)
    assert losses[3] == losses[3]  # seven rows in threes: the last holds no pair


class WarmsUp(NextToken):
    """Weighs nothing in the first half."""

    def weights(self, progress):
        return {"label": float(progress >= 0.5)}


def test_names_of_terms_are_the_same_at_every_step_of_a_warm_up(tmp_path):
    trainer = simple_trainer(tmp_path, LogitKD() + WarmsUp(), max_steps=4, per_device_train_batch_size=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        terms = {k for k in line if k.startswith("loss/")}
        assert terms == {"loss/logitkd/kd", "loss/logitkd/label", "loss/warmsup/label"}
        weighed = line["loss/logitkd/kd"] + line["loss/warmsup/label"] * (line["step"] > 2)
        assert line["loss"] == pytest.approx(weighed, rel=1e-5)


def test_the_gradient_of_a_step_ignores_the_micro_batches_of_the_step_before(tmp_path):
    """A window's counts are its own: steps of very different lengths must each be a mean."""
    from datasets import Dataset

    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 2 + ["w1 w2"] * 2
    trainer = simple_trainer(
        tmp_path,
        train=Dataset.from_dict({"text": texts}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-12,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        terms = line["loss/kd"] + 0.5 * line["loss/label"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_of_repeated_examples_leave_with_all_that_describes_them(padding_free, tmp_path, monkeypatch):
    """Two of three examples are real: their rows, cached entries and the teacher's own rows stay, the third's go."""
    base = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    trainer = simple_trainer(tmp_path)
    trainer.data_collator = DataCollatorForDistillation(base, token_columns=("topk",))
    features = []
    for length in (3, 5, 4):
        ids = list(range(3, 3 + length))
        features.append({"input_ids": ids, "labels": ids, "topk": [[i] for i in ids]})
        features[-1] |= {"teacher_input_ids": [1, *ids], "teacher_labels": [-100, -100, *ids[1:]]}
    batch, real = trainer.data_collator(features), trainer.data_collator(features[:2])
    monkeypatch.setattr(compat, "real_samples", lambda accelerator: 2)
    cut = trainer._without_repeats(batch)
    for key in ("row_labels", "row_document", "document_example", "cached_topk"):
        assert torch.equal(cut[key], real[key]), key
    assert torch.equal(cut["teacher_row_labels"], real["teacher_row_labels"])
    at_rows = cut["input_ids"].flatten()[cut["loss_rows"]]
    assert torch.equal(at_rows, cut["cached_topk"].flatten())
    assert trainer._counts(cut) == {"token": 6, "sample": 2, "batch": 1}
    monkeypatch.setattr(compat, "real_samples", lambda accelerator: 0)
    assert trainer._counts(trainer._without_repeats(batch)) == {"token": 0, "sample": 0, "batch": 0}


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        simple_trainer(tmp_path, label_smoothing_factor=0.1)
