"""Learned weights of several teachers: the gate, its loss, and what trains it."""

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, DataCollatorWithPadding

from hf_distill import (
    DistillTrainer,
    EnsembleTeacher,
    GatedKD,
    LogitKD,
)
from hf_distill.signals import HeadLogits, MixtureLogits, Rows, Signals
from hf_distill.teachers.gates import gate_loss, sample_features
from tests.helpers import (
    SGD,
    plain_arguments,
    relative_difference,
    tiny_llama,
    tiny_tokenizer,
)
from tests.teachers.test_ensemble import (
    classifier,
    llamas,
    trained,
)


def test_the_gate_s_gradient_is_not_prior_minus_posterior():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    label_log_probs = torch.randn(4, 3, dtype=torch.float64) - 1
    gate_loss(logits.log_softmax(-1), label_log_probs).sum().backward()
    g = logits.detach().softmax(-1)
    posterior = g * label_log_probs.exp() / (g * label_log_probs.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, g - posterior)
    equal = torch.full((1, 3), -2.0)
    z = torch.randn(1, 3, requires_grad=True)
    gate_loss(z.log_softmax(-1), equal).sum().backward()
    assert z.grad.abs().max() < 1e-7


def language_signals(hidden, head, documents, parts=None, labels=None):
    rows = Rows(torch.arange(len(hidden)), labels, documents, torch.arange(int(documents.max()) + 1))
    logits = HeadLogits(hidden, head) if parts is None else MixtureLogits(parts, torch.full((len(parts),), 1 / 2))
    return Signals(logits=logits, labels=labels, rows=rows)


def test_a_gated_loss_of_a_language_model_is_not_the_slow_one():
    """All three terms, their gradients and who gets them, against dense float64 written out per row."""
    torch.manual_seed(1)
    documents, labels = torch.tensor([0, 0, 0, 1, 2, 2]), torch.randint(0, 7, (6,))
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    parts = tuple(HeadLogits(torch.randn(6, h).double(), torch.randn(7, h).double()) for h in (3, 5))
    objective = GatedKD(label_weight=0.5, kd_weight=2.0, gate_weight=0.3)
    objective.names = ["a", "b"]
    objective.gate = torch.nn.Linear(4, 2).double()
    student = language_signals(hidden, head, documents, labels=labels)
    teacher = language_signals(torch.zeros(6, 1), None, documents, parts, labels)
    terms = objective(student, teacher, 0.0)
    sum(term.value * term.weight for term in terms.values()).backward()

    h, w = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in objective.gate.parameters())
    label = kd = gate = 0.0
    for i in range(6):
        own = h.detach()[documents == documents[i]].sum(0)
        own = (own - own.mean()) / (own.var(unbiased=False) + 1e-5).sqrt()
        g = (weight @ own + bias).softmax(0)
        p = [part.dense()[i].softmax(0) for part in parts]
        log_q = (w @ h[i]).log_softmax(0)
        mixed = sum(g[m].detach() * p[m] for m in range(2))
        label = label - log_q[labels[i]] / 6
        kd = kd + (mixed * (mixed.log() - log_q)).sum() / 6
        gate = gate - (g[0] * p[0][labels[i]] + g[1] * p[1][labels[i]]).log() / 6
    for name, value in (("label", label), ("kd", kd), ("gate", gate)):
        torch.testing.assert_close(terms[name].value, value)
    (0.5 * label + 2.0 * kd + 0.3 * gate).backward()
    for ours, slow in ((hidden, h), (head, w), (objective.gate.weight, weight), (objective.gate.bias, bias)):
        torch.testing.assert_close(ours.grad, slow.grad)
    assert set(objective.logs()) == {"gate/a", "gate/b"}


def test_a_gate_does_not_find_who_is_right():
    """Each teacher knows two of the four classes and swaps, as surely, the other two; no label term."""
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    labels = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    right, swapped = (6.0 * torch.nn.functional.one_hot(y, 4) for y in (labels, labels ^ 1))
    first = (labels < 2)[:, None]
    parts = (torch.where(first, right, swapped), torch.where(first, swapped, right))
    accuracy = {}
    for name, objective in (("gated", GatedKD()), ("static", LogitKD())):
        torch.manual_seed(1)
        student = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        student.config = BertConfig(num_labels=4)
        student.get_output_embeddings = lambda: None
        objective.setup(student, EnsembleTeacher([classifier(0), classifier(1)]))
        optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], 0.02)
        train, test = slice(400), slice(400, None)
        mixture = MixtureLogits(tuple(part[train] for part in parts), torch.full((2,), 0.5))
        for _ in range(150):
            optimizer.zero_grad()
            ours = Signals(logits=student(x[train]), labels=labels[train])
            terms = objective(ours, Signals(logits=mixture), 0.0)
            sum(term.value * term.weight for term in terms.values()).backward()
            optimizer.step()
        accuracy[name] = (student(x[test]).argmax(-1) == labels[test]).float().mean().item()
    assert accuracy["gated"] > 0.9 and accuracy["static"] < 0.75


def test_a_split_of_the_batch_changes_what_student_or_gate_learn(tmp_path):
    states = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = trained(
            tmp_path / str(size), EnsembleTeacher(llamas(2)), GatedKD(label_weight=0.5, gate_weight=0.3),
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, **SGD,
        )  # fmt: skip
        states.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert any("gate" in name for name in states[0])
    for state in states[1:]:
        assert relative_difference(state, states[0]) < 1e-5


def test_a_gate_is_trained_with_the_student(tmp_path):
    a, b = llamas(2)
    trainer = trained(tmp_path, EnsembleTeacher([a, b]), GatedKD(label_weight=0.5))
    gate = trainer.objective.gate
    assert gate.weight.shape == (2, 16) and gate.weight.abs().max() > 0
    logs = [log for log in trainer.state.log_history if "gate/t0" in log]
    assert all(log["gate/t0"] + log["gate/t1"] == pytest.approx(1.0) for log in logs) and len(logs) == 3
    assert "distill_objective" not in " ".join(trainer.student().state_dict())

    model = DistillTrainer(
        classifier(5),
        teacher=EnsembleTeacher({"a": classifier(0), "b": classifier(1)}),
        objective=GatedKD(),
        args=plain_arguments(tmp_path / "classes", max_steps=2, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list([{"input_ids": [3 + i, 5], "label": i % 3} for i in range(8)]),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    )
    model.train()
    assert model.objective.gate.weight.abs().max() > 0
    with pytest.raises(ValueError, match="GatedKD weighs the members of an EnsembleTeacher, got FrozenTeacher"):
        GatedKD().setup(tiny_llama(), a)
    with pytest.raises(ValueError, match="hidden rows: set dense_logits=False"):
        sample_features(Signals(logits=torch.zeros(3, 7), rows=Rows(*[torch.zeros(3)] * 4)))
