"""DDK: its formulas, and training in rounds."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from hf_distill import CachedTeacher, FrozenTeacher
from hf_distill.methods import ddk
from hf_distill.methods.ddk import DDKConfig, ddk_loss, initial_domain_weights, update_domain_weights
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

PPL = torch.tensor([30.0, 12.0, 50.0]), torch.tensor([10.0, 10.0, 40.0])


# ---- formulas --------------------------------------------------------------------------------------------------------
def test_weights_are_not_those_of_the_equations():
    ratios = [3.0, 1.2, 1.25]
    first = [math.exp(r) / sum(map(math.exp, ratios)) for r in ratios]
    torch.testing.assert_close(initial_domain_weights(*PPL), torch.tensor(first))
    psi = [w * math.exp(r) for w, r in zip(first, ratios, strict=True)]
    for alpha in (0.0, 0.3, 1.0):
        expected = [alpha * x / sum(psi) + (1 - alpha) / 3 for x in psi]
        for dtype in (torch.float32, torch.float64):
            ours = update_domain_weights(*(torch.as_tensor(x, dtype=dtype) for x in (first, *PPL)), alpha)
            torch.testing.assert_close(ours, torch.tensor(expected, dtype=dtype))
    low = update_domain_weights(torch.tensor(first).bfloat16(), PPL[0].bfloat16(), PPL[1].bfloat16())
    assert low.dtype == torch.float32


def test_equal_models_are_not_mixed_evenly():
    same = torch.tensor([7.0, 900.0, 1.5])
    torch.testing.assert_close(initial_domain_weights(same, same), torch.full((3,), 1 / 3))
    torch.testing.assert_close(update_domain_weights(torch.tensor([0.7, 0.2, 0.1]), *PPL, alpha=0.0), torch.ones(3) / 3)


def test_weights_overflow_leave_the_simplex_or_forget():
    huge = torch.tensor([1e6, 3.0, 2.0]), torch.tensor([1e3, 3.0, 2.0])  # a ratio of 1000
    weights = initial_domain_weights(*huge)
    for _ in range(4):
        weights = update_domain_weights(weights, *huge, alpha=0.5)
        assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1)
        assert weights.min() >= 0.5 / 3 - 1e-7 and weights.argmax() == 0
    once = update_domain_weights(torch.ones(3) / 3, *PPL, alpha=0.9)
    twice = update_domain_weights(once, *PPL, alpha=0.9)
    assert twice[0] > once[0] + 0.01, "an update does not multiply what was there before"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (torch.tensor([1.0, float("nan"), 2.0]), "positive and finite"),
        (torch.tensor([1.0, float("inf"), 2.0]), "positive and finite"),
        (torch.tensor([1.0, 0.0, 2.0]), "positive and finite"),
        (torch.ones(2), r"two \(N,\) tensors, got \(2,\) and \(3,\)"),
    ],
)
def test_perplexities_that_are_none_pass(student, message):
    with pytest.raises(ValueError, match=message):
        initial_domain_weights(student, PPL[1])
    with pytest.raises(ValueError, match="alpha must lie"):
        update_domain_weights(torch.ones(3), *PPL, alpha=float("nan"))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_not_the_labels_plus_gamma_times_the_divergence(direction):
    student, teacher = (2 * torch.randn(2, 5, 7, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(7, (2, 5))
    labels[0, :2] = -100
    total, count = 0.0, 0
    for b, s in (labels >= 0).nonzero().tolist():
        q, p = (x[b, s].div(2.0).softmax(-1) for x in (student, teacher))
        first, second = (p, q) if direction == "forward" else (q, p)
        total += -student[b, s].log_softmax(-1)[labels[b, s]] + 0.3 * (first * (first / second).log()).sum()
        count += 1
    ours = ddk_loss(student, teacher, labels, gamma=0.3, temperature=2.0, direction=direction)
    torch.testing.assert_close(ours, total / count)
    assert torch.autograd.gradcheck(
        lambda z: ddk_loss(z, teacher, labels, direction=direction), student.requires_grad_()
    )
    assert ddk_loss(student, teacher, torch.full_like(labels, -100)) == 0
    with pytest.raises(ValueError, match="direction must be one of forward, reverse"):
        ddk_loss(student, teacher, labels, direction="both")


@pytest.mark.parametrize(
    "setting",
    [
        {"ddk_interval": 0},
        {"ddk_alpha": 1.5},
        {"distil_gamma": -1.0},
        {"temperature": float("nan")},
        {"ddk_eval_samples": 0},
        {"ddk_init": "eq2"},
        {"ddk_direction": "both"},
    ],
)
def test_a_wrong_setting_passes(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        DDKConfig(**setting)


# ---- training --------------------------------------------------------------------------------------------------------
def texts(n: int = 24) -> Dataset:
    return text_dataset(n).add_column("domain", [("even", "odd", "prime")[i % 3] for i in range(n)])


def trainer_of(folder, config=None, *, train=None, teacher=None, student=None, arguments=None, **settings):
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5) | settings
    return ddk.build_trainer(
        student or tiny_llama(),
        teacher or FrozenTeacher(tiny_llama(32, 2, seed=1), tiny_tokenizer()),
        texts() if train is None else train,
        config or DDKConfig(ddk_interval=2, ddk_eval_samples=2),
        sft_arguments(folder, learning_rate=1e-2, **settings),
        processing_class=tiny_tokenizer(),
        **arguments or {},
    )


def watched(trainer) -> list[list[int]]:
    """The token ids of each micro-batch that the student sees in training, as one list per window."""
    seen, real = [], trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, count = real(*args)
        seen.append([batch["input_ids"].tolist() for batch in batches])
        return batches, count

    trainer.get_batch_samples = get_batch_samples
    return seen


def rounds_of(trainer) -> list[list[int]]:
    """The row numbers of each round, by the state at its start."""
    drawn, real = [list(trainer.sampler)], trainer.next_round

    def next_round():
        real()
        drawn.append(list(trainer.sampler))

    trainer.next_round = next_round
    return drawn


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_has_read_beyond_the_update(workers, tmp_path):
    trainer = trainer_of(tmp_path, dataloader_num_workers=workers, dataloader_prefetch_factor=4 if workers else None)
    seen, drawn = watched(trainer), rounds_of(trainer)
    trainer.train()
    data = trainer.train_dataset
    longest = [[len(data[i]["input_ids"]) for i in rows] for rows in drawn[:3]]
    expected = [max(pair) for rows in longest for pair in zip(rows[::2], rows[1::2], strict=True)]
    assert [len(batch[0]) for window in seen for batch in window] == expected[:10]
    first = [ids for window in seen for batch in window for ids in batch]
    for step, rows in ((0, drawn[0]), (8, drawn[1]), (16, drawn[2][:4])):
        for ids, row in zip(first[step : step + len(rows)], rows, strict=True):
            own = data[row]["input_ids"]
            assert ids[: len(own)] == own
    state = trainer.objective.state
    assert state["interval"] == 2 and trainer.state.global_step == 5 and state["cursors"].sum() == 16
    assert len(drawn) == 3 and len({tuple(rows) for rows in drawn}) == 3


def test_perplexities_are_not_those_of_a_plain_loop(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=3)
    held = trainer.eval_dataset
    random_state = torch.get_rng_state()
    found = trainer.perplexities(teacher=True)
    assert torch.equal(random_state, torch.get_rng_state())
    again = trainer.perplexities()
    assert torch.equal(found[0], again) and list(held) == ["even", "odd", "prime"]
    for model, values in ((trainer.model, found[0]), (trainer.teacher.model, found[1])):
        model.eval()
        for name, value in zip(held, values, strict=True):
            losses = []
            for row in held[name]:
                ids = torch.tensor([row["input_ids"]])
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
                losses += (-log_p[torch.arange(len(log_p)), ids[0, 1:]]).tolist()
            assert value.item() == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_validation_rows_are_trained_on(tmp_path):
    trainer = trainer_of(tmp_path)
    held = {tuple(row["input_ids"]) for part in trainer.eval_dataset.values() for row in part}
    assert len(trainer.train_dataset) == 18 and not held & {tuple(ids) for ids in trainer.train_dataset["input_ids"]}
    given = trainer_of(tmp_path, arguments={"eval_dataset": texts(12)})
    assert len(given.train_dataset) == 24 and [len(d) for d in given.eval_dataset.values()] == [2, 2, 2]
    parts = {name: texts(24).filter(lambda row, own=name: row["domain"] == own) for name in ("even", "odd", "prime")}
    named = trainer_of(tmp_path, arguments={"eval_dataset": parts})
    assert [len(d) for d in named.eval_dataset.values()] == [8, 8, 8]


def test_factors_do_not_follow_what_was_measured(tmp_path, monkeypatch):
    trainer, measured = trainer_of(tmp_path, max_steps=4, logging_steps=1), []
    real = trainer.perplexities
    monkeypatch.setattr(trainer, "perplexities", lambda **kw: measured.append(real(**kw)) or measured[-1])
    trainer.train()
    assert [tuple(found.shape) for found in measured] == [(2, 3), (3,), (3,)]  # the teacher's only once
    (student, teacher), *later = measured
    weights = initial_domain_weights(student, teacher)
    for found in later:
        weights = update_domain_weights(weights, found, teacher)
    state = trainer.objective.state
    torch.testing.assert_close(state["factors"], weights.float())
    assert torch.equal(state["weights"], state["factors"])
    logs = [log for log in trainer.state.log_history if "ddk/r/odd" in log]
    natural = [6 / 18] * 3
    assert [logs[0][f"ddk/r/{n}"] for n in ("even", "odd", "prime")] == pytest.approx(natural)
    assert logs[3]["ddk/r/odd"] == pytest.approx(weights[1].item(), rel=1e-6)
    assert logs[3]["ddk/ppl_ratio/even"] == pytest.approx((later[1] / teacher)[0].item(), rel=1e-5)
    assert sum(logs[1][f"ddk/drawn/{n}"] for n in ("even", "odd", "prime")) == 8 and logs[3]["ddk/interval"] == 2
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert f"| domain odd | {weights[1].item():.3f} of the mixture at the end; perplexity" in text


@pytest.mark.parametrize("init", ["uniform", "natural"])
def test_the_first_update_starts_elsewhere(init, tmp_path):
    train = texts(20)  # 7, 7 and 6 rows
    trainer = trainer_of(tmp_path, DDKConfig(ddk_interval=2, ddk_eval_samples=2, ddk_init=init), train=train)
    trainer.start_mixture()
    expected = torch.tensor([5.0, 5.0, 4.0]) / 14 if init == "natural" else torch.ones(3) / 3
    torch.testing.assert_close(trainer.objective.state["factors"], expected)


def test_epochs_count_rounds(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 9  # 2 x 18 rows in batches of 4


def test_a_packed_row_holds_two_domains(tmp_path):
    words = {"even": "w1", "odd": "w2", "prime": "w3"}
    rows = [(" ".join([words[d]] * (3 + i % 4)), d) for i, d in enumerate(texts(60)["domain"])]
    train = Dataset.from_dict({"text": [t for t, _ in rows], "domain": [d for _, d in rows]})
    trainer = trainer_of(
        tmp_path, DDKConfig(ddk_interval=2, ddk_eval_samples=2), train=train, packing=True, max_length=16
    )
    assert len(trainer.train_dataset) < 54
    for row in trainer.train_dataset:
        assert {*row["input_ids"]} - {1} == {tiny_tokenizer().convert_tokens_to_ids(words[row["domain"]])}
    trainer.train()
    assert trainer.objective.state["interval"] == 2


def test_lora_perplexities_are_the_bases(tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trainer_of(tmp_path, arguments={"peft_config": lora})
    trainer.model.train()
    ours = trainer.perplexities()
    assert trainer.model.training
    trainer.model.eval()
    assert torch.equal(ours, trainer.perplexities()), "dropout was on"
    with trainer.model.disable_adapter():
        assert not torch.allclose(ours, trainer.perplexities(), rtol=1e-3)
    trainer.train()
    assert trainer.objective.state["interval"] == 2


def test_a_cached_teacher_is_another(tmp_path):
    from hf_distill.teachers import cache_teacher

    live = trainer_of(tmp_path / "live", save_strategy="no")
    both = text_dataset(24)
    caches = {}
    for mode in ("hidden", "topk"):
        from hf_distill import DistillSFTTrainer

        plain = DistillSFTTrainer(
            tiny_llama(), teacher=FrozenTeacher(tiny_llama(32, 2, seed=1), tiny_tokenizer()), train_dataset=both,
            args=sft_arguments(tmp_path / "plain"), processing_class=tiny_tokenizer(),
        )  # fmt: skip
        options = {"k": 8} if mode == "topk" else {}
        cache_teacher(plain.teacher, plain, tmp_path / mode, mode=mode, **options)
        caches[mode] = CachedTeacher(tmp_path / mode)
    cached = trainer_of(tmp_path / "cached", teacher=caches["hidden"])
    for trainer in (live, cached):
        trainer.train()
    torch.testing.assert_close(
        cached.objective.state["teacher_ppl"], live.objective.state["teacher_ppl"], rtol=1e-2, atol=0
    )
    with pytest.raises(ValueError, match="topk or sampled does not say how likely every label is"):
        trainer_of(tmp_path / "sparse", teacher=caches["topk"]).train()


def test_a_quantised_teacher_is_not_measured(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(64, 2, seed=1).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    found = []
    for options in ({}, {"load_in_8bit": True}):
        teacher = FrozenTeacher.from_pretrained(str(tmp_path / "teacher"), **options)
        trainer = trainer_of(tmp_path / str(len(options)), teacher=teacher)
        trainer.train()
        found.append(trainer.objective.state["teacher_ppl"])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.1, atol=0)


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_bad_data_are_trained_on(tmp_path):
    with pytest.raises(ValueError, match="no column 'domain'"):
        trainer_of(tmp_path, train=text_dataset(9))
    with pytest.raises(ValueError, match="IterableDataset"):
        trainer_of(tmp_path, train=IterableDataset.from_generator(lambda: iter([{"text": "w1", "domain": "a"}])))
    with pytest.raises(ValueError, match="'prime' has 2 rows, and ddk_eval_samples=2"):
        trainer_of(tmp_path, train=texts(8))
    parts = {"even": text_dataset(2), "odd": text_dataset(2)}
    with pytest.raises(ValueError, match="trained on are even, odd, prime, eval_dataset has even, odd"):
        trainer_of(tmp_path, arguments={"eval_dataset": parts})
    with pytest.raises(ValueError, match="no column 'domain' that names"):
        trainer_of(tmp_path, arguments={"eval_dataset": text_dataset(9)})
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' orders rows itself"):
        trainer_of(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="ignore_data_skip"):
        trainer_of(tmp_path, ignore_data_skip=True)


def masked(rows: int, domains: tuple[str, ...]) -> Dataset:
    ids = [[5, 6, 7, 1]] * rows
    own = [domains[i % len(domains)] for i in range(rows)]
    labels = [[-100] * 4 if name == "silent" else x for name, x in zip(own, ids, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "domain": own})


def test_a_domain_with_nothing_to_learn_or_to_measure_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="domain 'silent' has no row with a label left after preparation"):
        trainer_of(tmp_path, train=masked(12, ("loud", "silent")))
    rows = [{"prompt": "w1 " * 20, "completion": "w2", "domain": name} for name in 4 * ["a", "b"]]
    with pytest.raises(ValueError, match="none of the 4 examples has a label left"):
        trainer_of(tmp_path, train=Dataset.from_list(rows))
    skipped = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="domain 'silent', training rows: all labels"):
        trainer_of(tmp_path, train=masked(12, ("loud", "silent")), **skipped)
    good = masked(12, ("loud", "other"))
    trainer = trainer_of(tmp_path, train=good, **skipped)
    trainer.eval_dataset["other"] = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, -100]]})
    with pytest.raises(ValueError, match="validation set of domain 'other' has no label tokens"):
        trainer.train()


def test_a_run_goes_on_with_other_rounds(tmp_path):
    trainer_of(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    more = trainer_of(tmp_path, DDKConfig(ddk_interval=3, ddk_eval_samples=2))
    with pytest.raises(ValueError, match="checkpoint's rounds are of other data or another size"):
        more.train(resume_from_checkpoint=True)
