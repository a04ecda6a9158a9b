"""A peer that learns beside the student: against two hand-written losses, saved, resumed, and on two ranks."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import DataCollatorWithPadding, LlamaForCausalLM, TrainerCallback

from hf_distill import (
    DistillSFTTrainer,
    DistillTrainer,
    EMATeacher,
    FrozenTeacher,
    LogitKD,
    MutualKD,
    Objective,
    PeerTeacher,
)
from hf_distill.losses import LabelCrossEntropy
from hf_distill.training.saving import FILE, KEY
from tests.helpers import (
    SGD,
    plain_arguments,
    relative_difference,
    sft_arguments,
    text_dataset,
    tiny_llama,
    tiny_tokenizer,
)
from tests.launching import run_worker
from tests.teachers.test_frozen import batch_of
from tests.training.scaling_cases import Case, Recorder, examples, models
from tests.training.test_no_dense_logits import LargestTensor


def make_trainer(folder, teacher, objective=None, *, student=None, lora=False, callbacks=(), rows=8, **settings):
    settings = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=3e-2) | settings
    return DistillSFTTrainer(
        student or tiny_llama(seed=1),
        teacher=teacher,
        objective=objective or LogitKD(label_weight=1.0),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(rows, seed=4),
        eval_dataset=text_dataset(5, seed=5),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2) if lora else None,
    )


# ---- the peer --------------------------------------------------------------------------------------------------------
OPTIONS = dict(temperature=2.0, t_squared=True, label_weight=0.7, kd_weight=0.4)


def by_hand(case: Case, steps: int = 2) -> dict[str, torch.Tensor]:
    """Gradients of both models in each step and their weights after the last: whole batch, full logits, plain SGD."""
    student, peer = models(case)
    out = {}
    both = {f"student.{n}": p for n, p in student.named_parameters() if p.requires_grad}
    both |= {f"peer.{n}": p for n, p in peer.named_parameters()}
    for step in range(steps):
        logits, labels = ([], []), []
        for example in examples(case):
            ids = torch.tensor([example["input_ids"]])
            target = torch.tensor([example["labels"]]) if case.kind == "bert" else ids[0, 1:]
            for model, rows in zip((student, peer), logits, strict=True):
                z = model(input_ids=ids).logits
                rows.append(z if case.kind == "bert" else z[0, :-1])
            labels.append(target)
        (s, p), y = (torch.cat(rows) for rows in logits), torch.cat(labels)
        loss = 0.0
        for ours, theirs in ((s, p.detach()), (p, s.detach())):
            soft = [(z / 2.0).log_softmax(-1) for z in (ours, theirs)]
            kd = kl_div(*soft, log_target=True, reduction="batchmean")
            loss = loss + 0.7 * cross_entropy(ours, y) + 0.4 * 4.0 * kd
        out[f"loss.{step}"] = loss.detach()
        for name, gradient in zip(both, torch.autograd.grad(loss, list(both.values())), strict=True):
            out[f"gradient.{step}.{name}"] = gradient
            both[name].data.add_(gradient, alpha=-SGD["learning_rate"])
    return out | {f"weight.{name}": p.detach().clone() for name, p in both.items()}


def mutual_trainer(case: Case, folder, recorder, **settings):
    student, peer = models(case)
    settings = SGD | dict(
        num_train_epochs=2,
        per_device_train_batch_size=case.per_device,
        gradient_accumulation_steps=case.accumulation,
        per_device_eval_batch_size=4,
    ) | settings  # fmt: skip
    more = dict(teacher=PeerTeacher(peer), objective=MutualKD(**OPTIONS), callbacks=[recorder])
    if case.kind == "llama":
        data = text_dataset(case.rows, seed=4)
        args = sft_arguments(folder, **settings)
        return DistillSFTTrainer(
            student, args=args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer(), **more
        )
    data = Dataset.from_list(examples(case))
    collator = DataCollatorWithPadding(tiny_tokenizer())
    args = plain_arguments(folder, **settings)
    return DistillTrainer(student, args=args, train_dataset=data, eval_dataset=data, data_collator=collator, **more)


def own_names(seen: dict) -> dict:
    """`gradient.0.distill_objective.distill_peer.x` as `gradient.0.peer.x`, the student's as `gradient.0.student.x`."""
    renamed = {}
    for name, value in seen.items():
        kind, *step, rest = name.split(".", 2 if name.startswith("gradient") else 1)
        if kind != "loss":
            mark = f"{KEY}.distill_peer."
            rest = rest.replace(mark, "peer.") if mark in rest else f"student.{rest}"
        renamed[".".join([kind, *step, rest])] = value
    return renamed


def found_by(trainer, recorder) -> dict:
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {f"weight.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return own_names(recorder.seen | weights)


CASES = {
    "llama": Case(),
    "llama_split": Case(per_device=2, accumulation=4),
    "lora": Case(part="lora", per_device=4, accumulation=2),
    "bert": Case("bert", per_device=4, accumulation=2),
}


@pytest.mark.parametrize("name", CASES)
def test_student_and_peer_learn_other_than_by_hand(name, tmp_path):
    recorder = Recorder()
    found = found_by(mutual_trainer(CASES[name], tmp_path, recorder), recorder)
    expected = by_hand(CASES[name])
    assert relative_difference(found, expected) < 1e-5
    assert sum("peer" in key for key in expected) > 20


def test_per_sample_weighs_the_peers_documents_as_the_students(tmp_path):
    """With the same two models, both halves are the same numbers."""
    peer = PeerTeacher(tiny_llama(seed=1))
    trainer = make_trainer(tmp_path, peer, MutualKD(per="sample"), learning_rate=0.0, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss/peer_label"] == pytest.approx(logs["loss/label"], rel=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_peer_label"] == pytest.approx(metrics["eval_label"], rel=1e-6)
    per_token = make_trainer(tmp_path, peer, MutualKD(), learning_rate=0.0, max_steps=1).evaluate()
    assert abs(per_token["eval_peer_label"] - metrics["eval_peer_label"]) > 1e-4


def test_the_peers_loss_makes_logits_of_all_rows(tmp_path):
    """4096 entries, 128 rows; a tile of a megabyte holds 32 rows of both."""
    rows = Dataset.from_list([{"text": " ".join(f"w{(i + j) % 61}" for j in range(32))} for i in range(8)])
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1, vocabulary=4096),
        teacher=PeerTeacher(tiny_llama(16, 1, vocabulary=4096, seed=1)),
        objective=MutualKD(),
        args=sft_arguments(tmp_path, per_device_train_batch_size=8, tile_megabytes=1, max_length=64),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with LargestTensor() as found:
        trainer.training_step(trainer.model, batches[0])
    assert found.elements <= 256 * 4096 // 4, (found.elements, found.made_by)
    assert trainer.teacher.model.lm_head.weight.grad.abs().sum() > 0


class Modes(TrainerCallback):
    def __init__(self, peer):
        self.peer, self.training = peer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.training.append(self.peer.model.training)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.training.append(self.peer.model.training)


def test_a_peer_trains_in_eval_mode_or_at_the_students_rate(tmp_path):
    peer = PeerTeacher(tiny_llama(32, seed=2, attention_dropout=0.3), learning_rate=0.02)
    modes = Modes(peer)
    trainer = make_trainer(
        tmp_path, peer, MutualKD(), callbacks=[modes], learning_rate=0.01, lr_scheduler_type="constant", max_steps=1,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert modes.training == [True, False]
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in peer.model.parameters()} == {0.02}
    assert {rates[id(p)] for n, p in trainer.model.named_parameters() if KEY not in n} == {0.01}
    assert len(rates) == len(list(trainer.model.parameters()))
    peer.learning_rate = None  # the student's, also where the objective has one of its own
    trainer = make_trainer(tmp_path / "b", peer, MutualKD(), learning_rate=0.01, objective_learning_rate=0.5)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.01}


def test_an_objective_used_again_keeps_the_peer_of_before(tmp_path):
    objective = PeerFeatures()
    make_trainer(tmp_path / "a", PeerTeacher(tiny_llama(32)), objective)
    assert list(objective.parameters())
    make_trainer(tmp_path / "b", FrozenTeacher(tiny_llama(32)), objective)
    assert not list(objective.parameters())


class PeerFeatures(Objective):
    """A loss of the peer alone that reads no logits."""

    needs = frozenset({"student.logits", "teacher.hidden_states"})

    def logit_terms(self, progress):
        return {"label": LabelCrossEntropy()}

    def other_terms(self, student, teacher, progress):
        return {"peer": teacher.hidden_states[-1].flatten(0, 1)[teacher.rows.index].pow(2).mean(-1).mean()}


# ---- checkpoints and exports -----------------------------------------------------------------------------------------
KINDS = {
    "average": lambda: (EMATeacher(0.9), LogitKD(label_weight=1.0), False),
    "average_of_adapter": lambda: (EMATeacher(0.9), LogitKD(label_weight=1.0), True),
    "peer": lambda: (PeerTeacher(tiny_llama(32, seed=2, attention_dropout=0.1), learning_rate=5e-3), MutualKD(), False),
}


def state_of(trainer) -> dict:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return dict(model.state_dict()) | {f"average {k}": v for k, v in trainer.teacher.state_tensors().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_not_the_uninterrupted_one(kind, tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        teacher, objective, lora = KINDS[kind]()
        trainer = make_trainer(
            tmp_path, teacher, objective, lora=lora, student=tiny_llama(seed=1, attention_dropout=0.1), max_steps=6,
            save_strategy="steps", save_steps=3, rows=9, gradient_accumulation_steps=2, learning_rate=1e-2,
        )  # fmt: skip
        start = {n: v.clone() for n, v in state_of(trainer).items()}
        trainer.train(resume_from_checkpoint=resume)
        ends.append(state_of(trainer))
        assert any("average" in n or "peer" in n for n in ends[-1])
        moved = {n for n in start if not torch.equal(start[n], ends[-1][n])}
        assert len(moved) >= (16 if lora else 40 if kind == "average" else 39)
    assert ends[0].keys() == ends[1].keys()
    differing = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert not differing, differing


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_or_a_peer_leaves_with_the_student(kind, tmp_path):
    teacher, objective, lora = KINDS[kind]()
    trainer = make_trainer(
        tmp_path, teacher, objective, lora=lora, max_steps=1, save_strategy="steps", save_steps=1
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "out")
    own = ("model.safetensors", "adapter_model.safetensors")[lora]
    for folder in (tmp_path / "out", tmp_path / "checkpoint-1"):
        names = set(load_file(folder / own))
        assert not [name for name in names if "distill" in name or "average" in name or "peer" in name]
        if not lora:
            assert names == set(tiny_llama().state_dict())
            _, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
    assert FILE not in {path.name for path in (tmp_path / "out").iterdir()}
    trainer.create_model_card()
    student = trainer.student()
    assert f"with {sum(p.numel() for p in student.parameters()):,} parameters" in (tmp_path / "README.md").read_text()
    assert not [name for name in student.state_dict() if "distill" in name]


def test_a_checkpoint_of_another_teacher_is_taken(tmp_path):
    def fresh(teacher, objective=None):
        return make_trainer(tmp_path, teacher, objective, max_steps=2, save_strategy="steps", save_steps=1)

    fresh(EMATeacher()).train()
    with pytest.raises(ValueError, match="resume with the teacher and student"):
        fresh(FrozenTeacher(tiny_llama(32))).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume with .* teacher the run was started with"):
        fresh(PeerTeacher(tiny_llama(32)), MutualKD()).train(resume_from_checkpoint=True)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_teacher_that_cannot_learn_is_taken(tmp_path):
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            EMATeacher(decay)
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to average"):
        EMATeacher().attach(frozen)
    with pytest.raises(ValueError, match="averaged teacher has no student"):
        EMATeacher()(batch_of())
    with pytest.raises(TypeError, match="a loaded model, got str"):
        PeerTeacher("some/model")
    with pytest.raises(ValueError, match="no weights that train .*FrozenTeacher"):
        PeerTeacher(frozen)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        PeerTeacher(tiny_llama(), learning_rate=0)
    student = tiny_llama()
    with pytest.raises(ValueError, match="shares weights with the student"):
        make_trainer(tmp_path, PeerTeacher(student), MutualKD(), student=student)
    copied = copy.deepcopy(make_trainer(tmp_path, FrozenTeacher(tiny_llama(32))).model)
    with pytest.raises(ValueError, match="forward .* was replaced, so a copy .* trainer.student"):
        PeerTeacher(copied)
    with pytest.raises(ValueError, match="MutualKD trains both models, FrozenTeacher does not learn"):
        make_trainer(tmp_path, FrozenTeacher(tiny_llama(32)), MutualKD())
    for teacher in (EMATeacher(), PeerTeacher(tiny_llama())):
        for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            with pytest.raises(ValueError, match=f"sharded weights .{kind.value}.: train with plain data"):
                teacher.prepare(SimpleNamespace(distributed_type=kind))


def test_a_peer_that_no_term_trains_goes_unsaid(tmp_path):
    trainer = make_trainer(tmp_path, PeerTeacher(tiny_llama(32)), LogitKD())
    with pytest.raises(ValueError, match="PeerTeacher gets no gradient: .*other_terms .see MutualKD"):
        trainer.train()


# ---- two ranks -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_worker("tests/teachers/peer_worker.py", folder, ranks=2)
    return folder, json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("name", ["average", "features", "llama", "bert"])
def test_two_ranks_find_other_numbers_than_one(name, two_ranks, tmp_path):
    from tests.teachers.peer_worker import RANKS, RUNS

    folder, facts = two_ranks
    steps = 2 if name in RANKS else 3
    assert facts[name] == {"apart": 0.0, "ranks": 2, "wrapper": "DistributedDataParallel", "steps": steps}
    found = load_file(folder / f"{name}.safetensors")
    if name in RANKS:
        assert relative_difference(found, by_hand(RANKS[name])) < 1e-5
    elif name == "average":
        assert relative_difference(found, RUNS[name](tmp_path)[1]) < 1e-5
