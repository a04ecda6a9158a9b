"""Several teachers as one: the mixture is the mixture, in memory and in training."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from hf_distill import (
    DataCollatorForDistillation,
    DistillSFTTrainer,
    EMATeacher,
    EnsembleTeacher,
    FeatureKD,
    FrozenTeacher,
    LogitKD,
    PeerTeacher,
    RoutedTeacher,
    Teacher,
)
from hf_distill.losses import ForwardKL, run_terms
from hf_distill.objectives import Objective
from hf_distill.signals import HeadLogits, MixtureLogits, Signals, SparseLogits
from hf_distill.teachers import cache_teacher
from hf_distill.teachers.ensemble import on_device
from hf_distill.teachers.mixing import mix, mix_sparse
from tests.helpers import (
    sft_arguments,
    text_dataset,
    tiny_llama,
    tiny_tokenizer,
)
from tests.teachers.test_frozen import batch_of

TEXTS = ("w1 w2 w3 w4", "w5 w6 w7 w8 w9 w1", "w3", "w2 w2 w8", "w9 w4 w4 w1 w0")


def llamas(n: int, **config) -> list[FrozenTeacher]:
    """Teachers of different widths."""
    return [FrozenTeacher(tiny_llama(8 * (m + 1), seed=m, **config), tiny_tokenizer(), name=f"t{m}") for m in range(n)]


def dense(logits: MixtureLogits) -> torch.Tensor:
    """The mixture's probabilities, slowly."""
    parts = [part if isinstance(part, torch.Tensor) else part.dense() for part in logits.parts]
    weights = logits.weights.expand(*parts[0].shape[:-1], len(parts))
    if logits.space == "logit":
        return sum(weights[..., m, None] * part for m, part in enumerate(parts)).softmax(-1)
    return sum(weights[..., m, None] * part.softmax(-1) for m, part in enumerate(parts))


def routed_batch(route, texts=TEXTS) -> dict:
    return batch_of(texts) | {"cached_teacher": torch.tensor(route)}


def classifier(seed: int, labels: int = 3, hidden: int = 16) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=labels, pad_token_id=0, initializer_range=0.5, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def class_batch(texts=TEXTS) -> dict:
    tokenizer = tiny_tokenizer()
    batch = tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
    return dict(batch) | {"labels": torch.arange(len(texts)) % 3}


# ---- the mixture -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_ensemble_s_value_or_gradient_is_not_that_of_a_slow_mixture(space, temperature):
    """float64, against a sum over teachers, rows and tokens written out."""
    weights, batch = [0.2, 0.5, 0.3], batch_of()
    models = [tiny_llama(8 * (m + 1), seed=m).double() for m in range(3)]
    said = EnsembleTeacher([FrozenTeacher(m) for m in models], weights, space)(batch)
    assert isinstance(said.logits, MixtureLogits) and all(isinstance(p, HeadLogits) for p in said.logits.parts)
    hidden = torch.randn(len(said.labels), 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(64, 6, dtype=torch.float64)
    value = run_terms(HeadLogits(hidden, head), said.logits, {"kl": (ForwardKL(temperature), 1.0)})["kl"]
    (gradient,) = torch.autograd.grad(value, hidden)

    rows = []
    for model in models:
        with torch.no_grad():
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        rows.append(out[batch["loss_rows"]] / temperature)
    slow = hidden.detach().clone().requires_grad_()
    total = 0.0
    for i in range(len(hidden)):
        log_q = (slow[i] @ head.T / temperature).log_softmax(0)
        if space == "probability":
            p = sum(w * r[i].softmax(0) for w, r in zip(weights, rows, strict=True))
        else:
            p = sum(w * r[i] for w, r in zip(weights, rows, strict=True)).softmax(0)
        total = total + sum(p[v] * (p[v].log() - log_q[v]) for v in range(64)) / len(hidden)
    torch.testing.assert_close(value, total)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, slow)[0])


def test_one_teacher_is_not_itself():
    teachers, batch = llamas(2), batch_of()
    for weights, expected in (([1.0, 0.0], teachers[0]), ([0.0, 1.0], teachers[1])):
        said = EnsembleTeacher(teachers, weights)(batch).logits
        torch.testing.assert_close(dense(said), expected(batch).logits.dense().softmax(-1))
    same = EnsembleTeacher([teachers[0]] * 3)(batch).logits
    torch.testing.assert_close(dense(same), teachers[0](batch).logits.dense().softmax(-1))


def test_weights_of_an_example_reach_another_s_rows():
    teachers, batch = llamas(2), batch_of(TEXTS)
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    ensemble = EnsembleTeacher(teachers, "mix")
    said = dense(ensemble(batch | {"cached_mix": weights}).logits)
    a, b = (t(batch).logits.dense().softmax(-1) for t in teachers)
    for row, position in enumerate(batch["loss_rows"].tolist()):
        w = weights[position // batch["input_ids"].shape[1]]
        torch.testing.assert_close(said[row], w[0] * a[row] + w[1] * b[row])
    with pytest.raises(RuntimeError, match="column 'mix' must not be negative and sum to 1"):
        ensemble(batch | {"cached_mix": 2 * weights})
    with pytest.raises(ValueError, match=r"column 'mix' must hold 2 weights per example.*shape \(5, 1\)"):
        ensemble(batch | {"cached_mix": weights[:, :1]})
    with pytest.raises(ValueError, match=r"no column 'mix'.*example_columns=\('mix',\)"):
        ensemble(batch)


def test_classifiers_are_mixed_otherwise():
    models, batch = [classifier(0), classifier(1, hidden=8)], class_batch()
    said = EnsembleTeacher(models, [0.9, 0.1])(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        expected = 0.9 * models[0](**inputs).logits.softmax(-1) + 0.1 * models[1](**inputs).logits.softmax(-1)
    torch.testing.assert_close(dense(said.logits), expected)
    assert torch.equal(said.labels, batch["labels"])


def test_ensembles_of_ensembles_count_a_teacher_twice_or_not_at_all():
    a, b, c = llamas(3)
    batch = batch_of()
    for space in ("probability", "logit"):
        inner = EnsembleTeacher([a, b], [0.25, 0.75], space)
        nested = EnsembleTeacher({"inner": inner, "c": c}, [0.4, 0.6], space)(batch).logits
        flat = EnsembleTeacher([a, b, c], [0.1, 0.3, 0.6], space)(batch).logits
        assert len(nested.parts) == 3
        torch.testing.assert_close(dense(nested), dense(flat))
    with pytest.raises(ValueError, match="'logit' mixture cannot hold one of 'probability'"):
        EnsembleTeacher({"inner": EnsembleTeacher([a, b]), "c": c}, space="logit")(batch)


class Stored(Teacher):
    """Sparse logits, as a cache gives them."""

    gives = frozenset({"logits"})

    def __init__(self, name, logits):
        self.name, self.logits = name, logits

    def __call__(self, batch, needs=frozenset({"logits"})):
        return Signals(logits=self.logits)


@pytest.mark.parametrize("tail", ["renorm", "bucket", "ignore"])
def test_sparse_teachers_are_merged_otherwise(tail):
    """Against dictionaries; one entry is in both, one teacher has a padding slot that repeats an id."""
    a = SparseLogits(torch.tensor([[3, 7, 1]]), torch.tensor([[0.5, 0.2, 0.1]]).log(), tail)
    b = SparseLogits(torch.tensor([[7, 2, 2]]), torch.tensor([[0.6, 0.3, 0.0]]).log(), tail)
    merged = EnsembleTeacher([Stored("a", a), Stored("b", b)], [0.25, 0.75])({}).logits
    scale_a, scale_b = (0.8, 0.9) if tail == "renorm" else (1.0, 1.0)
    expected = {
        3: 0.25 * 0.5 / scale_a, 7: 0.25 * 0.2 / scale_a + 0.75 * 0.6 / scale_b,
        1: 0.25 * 0.1 / scale_a, 2: 0.75 * 0.3 / scale_b,
    }  # fmt: skip
    found = {}
    for i, log_p in zip(merged.ids[0].tolist(), merged.log_probs[0].tolist(), strict=True):
        if log_p > -torch.inf:
            assert i not in found
            found[i] = torch.tensor(log_p).exp().item()
    assert found == pytest.approx(expected) and merged.tail == tail
    assert set(merged.ids[0].tolist()) <= set(expected)
    per_row = mix_sparse([a, b], torch.tensor([[0.25, 0.75]]))
    assert torch.equal(per_row.log_probs, merged.log_probs)
    with pytest.raises(ValueError, match="sparse teachers mix among themselves"):
        mix([a, torch.zeros(1, 9)], torch.tensor([0.5, 0.5]))


def test_features_come_from_nowhere_or_from_another_member():
    teachers, batch = llamas(2), batch_of()
    plain = EnsembleTeacher(teachers)
    assert plain.gives == {"logits"}
    with pytest.raises(ValueError, match="an ensemble gives logits, not hidden_states: .*features_from="):
        plain(batch, frozenset({"logits", "hidden_states"}))
    for features in ("t1", 1):
        named = EnsembleTeacher(teachers, features_from=features)
        both = named(batch, frozenset({"logits", "hidden_states"}))
        assert named.config.hidden_size == 16 == both.hidden_states[-1].shape[-1]
        torch.testing.assert_close(dense(both.logits), dense(plain(batch).logits))
        with FlopCounterMode(display=False) as counter:
            only = named(batch, frozenset({"hidden_states"}))
        with FlopCounterMode(display=False) as alone:
            teachers[1](batch, frozenset({"hidden_states"}))
        assert only.logits is None and counter.get_total_flops() == alone.get_total_flops()
    with pytest.raises(ValueError, match=r"no teacher 'x': they are t0, t1 \(0 to 1\)"):
        EnsembleTeacher(teachers, features_from="x")


def test_members_that_cannot_be_mixed_are():
    a = llamas(1)[0]
    padded = FrozenTeacher(tiny_llama(seed=1, vocabulary=72), tiny_tokenizer(), name="padded")
    ensemble, batch = EnsembleTeacher([a, padded]), batch_of()
    assert ensemble.vocabulary_size() == 64 == ensemble(batch).logits.shape[-1]
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    foreign = FrozenTeacher(tiny_llama(seed=1, vocabulary=72), other, name="foreign")
    with pytest.raises(ValueError, match="teacher 'foreign' speaks of another vocabulary than 't0'"):
        EnsembleTeacher([a, foreign])
    unknown = FrozenTeacher(tiny_llama(seed=1, vocabulary=72), name="unknown")
    with pytest.raises(ValueError, match="teacher 'unknown' has 72 vocabulary entries, 't0' has 64, and a tokenizer"):
        RoutedTeacher([a, unknown])
    with pytest.raises(ValueError, match="has 4 classes, .* has 3"):
        EnsembleTeacher([classifier(0), classifier(1, labels=4)])
    with pytest.raises(ValueError, match="gives nothing, not logits"):
        silent = Stored("silent", None)
        silent.gives = frozenset()
        EnsembleTeacher([a, silent])
    with pytest.raises(ValueError, match="learns by gradients, which no mixture takes"):
        EnsembleTeacher([a, PeerTeacher(tiny_llama(seed=3))])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], "must not be negative and sum to 1"),
        ([1.5, -0.5], "must not be negative"),
        ([1.0], "2 numbers, one per teacher"),
        (torch.ones(4, 2) / 2, "weights per example come from a dataset column"),
    ],
)
def test_weights_that_are_none_are_taken(weights, message):
    with pytest.raises(ValueError, match=message):
        EnsembleTeacher(llamas(2), weights)


def test_an_ensemble_of_nothing_or_of_no_space():
    for nothing in ([], {}, llamas(1)[0], "path"):
        with pytest.raises(ValueError, match="teachers must be several"):
            EnsembleTeacher(nothing)
    with pytest.raises(ValueError, match="space must be one of probability, logit, got 'log'"):
        EnsembleTeacher(llamas(1), space="log")


# ---- memory ----------------------------------------------------------------------------------------------------------
class Direct(FrozenTeacher):
    """Without autocast, which the meta device lacks."""

    def __call__(self, batch, needs=frozenset({"logits"})):
        return Signals(logits=self.model(batch["input_ids"]).logits)


def test_an_offloaded_teacher_stays_or_changes():
    """The meta device stands for an accelerator: weights are there during the forward only."""
    models = [tiny_llama(seed=m, tie_word_embeddings=m == 1) for m in range(2)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    places = []
    for model in models:
        model.model.norm.register_forward_hook(
            lambda *_: places.append([{p.device.type for p in m.parameters()} for m in models])
        )
    ensemble = EnsembleTeacher([Direct(m, name=str(i)) for i, m in enumerate(models)], offload=True)
    ensemble.prepare(Accelerator(cpu=True))
    assert ensemble.device == torch.device("cpu")
    ensemble.device = torch.device("meta")
    said = ensemble({"input_ids": torch.ones(2, 5, dtype=torch.long, device="meta")})
    assert {part.device.type for part in said.logits.parts} == {"meta"}
    assert places == [[{"meta"}, {"cpu"}], [{"cpu"}, {"meta"}]]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert models[1].lm_head.weight is models[1].model.embed_tokens.weight


def test_a_head_goes_home_before_the_loss_reads_it():
    teacher = FrozenTeacher(tiny_llama())
    expected, original = teacher(batch_of()).logits.dense(), teacher.model.lm_head.weight
    ensemble = EnsembleTeacher([teacher], offload=True)
    ensemble.device = torch.device("cpu")
    part = ensemble(batch_of()).logits.parts[0]
    assert part.weight is not original and teacher.model.lm_head.weight is original
    torch.testing.assert_close(part.dense(), expected)
    with pytest.raises(RuntimeError, match="stop"), on_device(teacher.model, torch.device("meta")):
        raise RuntimeError("stop")
    assert {p.device.type for p in teacher.model.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="'a' cannot be offloaded"):
        EnsembleTeacher([Stored("a", None)], offload=True)
    with pytest.raises(ValueError, match="no teacher 'b'"):
        EnsembleTeacher({"a": teacher}, offload=("b",))


# ---- in training -----------------------------------------------------------------------------------------------------
def domains(n: int) -> Dataset:
    """Texts with a domain's number."""
    texts = text_dataset(n)
    return texts.add_column("teacher", [i % 2 for i in range(n)])


def padded(features: list[dict]) -> dict:
    batch = DataCollatorWithPadding(tiny_tokenizer())([{"input_ids": f["input_ids"]} for f in features])
    return dict(batch) | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def trained(folder, teacher, objective: Objective | None = None, **settings) -> DistillSFTTrainer:
    settings = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2) | settings
    trainer = DistillSFTTrainer(
        tiny_llama(),
        teacher=teacher,
        objective=objective or LogitKD(label_weight=0.5),
        args=sft_arguments(folder, **settings),
        train_dataset=domains(8),
        processing_class=tiny_tokenizer(),
        data_collator=DataCollatorForDistillation(padded, example_columns=("teacher",)),
    )
    trainer.train()
    return trainer


def test_training_under_several_teachers_fails(tmp_path):
    a, b = llamas(2)
    router = RoutedTeacher({"a": a, "b": b}, offload=("b",))
    trainer = trained(tmp_path / "routed", router)
    metrics = trainer.evaluate(trainer.train_dataset)
    kl = rows = 0
    student = trainer.model.eval()
    for example in trainer.train_dataset:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            log_q = student(ids).logits[0, :-1].log_softmax(-1)
            log_p = (a, b)[example["teacher"]].model(ids).logits[0, :-1].log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        rows += len(log_p)
    assert metrics["eval_teacher_kl"] == pytest.approx(kl / rows, rel=1e-4)
    described = router.describe()
    assert set(described["teachers"]) == {"a", "b"} and described["teacher_column"] == "teacher"

    ensemble = EnsembleTeacher([a, b], features_from=1)
    trained(tmp_path / "ensemble", ensemble, LogitKD() + FeatureKD())
    assert ensemble.describe()["teacher_weights"] == {"t0": 0.5, "t1": 0.5}
    with pytest.raises(ValueError, match="FeatureKD needs hidden_states of its teacher, EnsembleTeacher gives only"):
        trained(tmp_path / "refused", EnsembleTeacher([a, b]), FeatureKD())


def test_caches_or_an_average_cannot_be_members(tmp_path):
    a, b = llamas(2)
    tokenizer = tiny_tokenizer()
    data = [{"input_ids": tokenizer(text)["input_ids"] + [1]} for text in text_dataset(8)["text"]]  # as SFTTrainer
    for mode, options in (("hidden", {}), ("topk", {"k": 64})):
        options |= dict(mode=mode, collator=padded, processing_class=tokenizer)
        caches = [cache_teacher(t, data, tmp_path / f"{mode}-{t.name}", **options) for t in (a, b)]
        ensemble = EnsembleTeacher(caches, [0.3, 0.7])
        batch = DataCollatorForDistillation(padded, readers=ensemble.readers)(data[:4])
        said, live = ensemble(batch).logits, dense(EnsembleTeacher([a, b], [0.3, 0.7])(batch).logits)
        if mode == "hidden":
            torch.testing.assert_close(dense(said), live)
        else:
            found = torch.zeros_like(live).scatter_add(-1, said.ids, said.log_probs.exp())
            torch.testing.assert_close(found, live, atol=1e-5, rtol=1e-3)
            with pytest.raises(ValueError, match="at temperature 1.0, .* asks for 2.0"):
                trained(tmp_path / "hot", ensemble, LogitKD(temperature=2.0))
        routed = RoutedTeacher({"a": caches[0], "b": caches[1]})
        assert routed.readers == ensemble.readers
        routed(batch | {"cached_teacher": torch.tensor([0, 1, 1, 0])})
        trained(tmp_path / mode, ensemble)

    average = EMATeacher(0.5, warmup=False)
    ensemble = EnsembleTeacher({"average": average, "a": a})
    assert ensemble.learns and ensemble.vocabulary_size() == 64
    trainer = trained(tmp_path / "average", ensemble)
    assert len(ensemble.state_tensors()) == len(average.state_tensors()) > 0
    before = tiny_llama().state_dict()
    moved = [n for n, v in average.averages.items() if not torch.equal(v, before[n])]
    assert moved and not torch.equal(average.averages[moved[0]], trainer.model.state_dict()[moved[0]])
