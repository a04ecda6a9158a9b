"""Caches of every kind of model and input: encoder-decoders, token tasks, classifiers, images, pairs, own inputs."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    ViTConfig,
    ViTForImageClassification,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import (
    CachedTeacher,
    DataCollatorForDistillation,
    DistillTrainer,
    FrozenTeacher,
    LogitKD,
    Teacher,
    cache_teacher,
)
from hf_distill.curricula import SeededAugmentation
from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.cache.keys import documents_of
from hf_distill.teachers.cache.reader import MissingFromCacheError
from hf_distill.training import compat
from tests.helpers import SGD, plain_arguments, relative_difference, tiny_llama, tiny_tokenizer

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BATCH = dict(per_device_train_batch_size=3, max_steps=4)


def bart(seed):
    torch.manual_seed(seed)
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    ffn = dict(encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, init_std=0.2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None)
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **sizes, **ffn, **special))


def bert(kind, seed):
    torch.manual_seed(seed)
    return kind(BertConfig(**SIZES, num_labels=3, initializer_range=0.2, max_position_embeddings=32))


def vit(seed):
    torch.manual_seed(seed)
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def ids(n) -> list[int]:
    return [random.randrange(3, 64) for _ in range(n)]


def seq2seq():
    data = [{"input_ids": ids(3 + i % 4), "labels": ids(2 + i % 5)} for i in range(12)]
    return bart, data, lambda: DataCollatorForSeq2Seq(tiny_tokenizer(), label_pad_token_id=-100), "hidden"


def tokens():
    data = [{"input_ids": ids(n), "labels": [-100] + [random.randrange(3) for _ in range(n - 1)]} for n in range(2, 14)]
    make = lambda seed: bert(BertForTokenClassification, seed)  # noqa: E731
    return make, data, lambda: DataCollatorForTokenClassification(tiny_tokenizer()), "logits"


def sentences():
    data = [{"input_ids": ids(2 + i % 5), "labels": i % 3} for i in range(12)]
    make = lambda seed: bert(BertForSequenceClassification, seed)  # noqa: E731
    return make, data, lambda: DataCollatorWithPadding(tiny_tokenizer()), "logits"


def images():
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(12)]
    return vit, data, lambda: stack, "logits"


def stack(features):
    return {
        "pixel_values": torch.stack([f["pixel_values"] for f in features]),
        "labels": torch.tensor([f["labels"] for f in features]),
    }


def trained(folder, make, teacher, data, collator, **settings) -> dict:
    trainer = DistillTrainer(
        make(0),
        teacher=teacher,
        objective=LogitKD(kd_weight=1.0, label_weight=0.5, temperature=2.0),
        args=plain_arguments(folder, **SGD | BATCH | settings),
        train_dataset=data,
        data_collator=collator,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return {k: v.clone() for k, v in trainer.student().state_dict().items()}


@pytest.mark.parametrize("task", [seq2seq, tokens, sentences, images])
def test_a_task_s_student_learns_something_else_from_a_cache(tmp_path, task):
    make, data, collator, mode = task()
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    cache_teacher(teacher, data, tmp_path / "cache", mode=mode, collator=collator(), batch_size=5, shard_examples=4)
    dataset = Dataset.from_list([{k: np.asarray(v).tolist() for k, v in e.items()} for e in data])
    dataset = data if task is images else dataset
    live = trained(tmp_path / "live", make, teacher, dataset, collator())
    cached = trained(tmp_path / "cached", make, str(tmp_path / "cache"), dataset, collator())
    assert relative_difference(cached, live) < 1e-5
    with pytest.raises(ValueError, match='use mode="logits"|few classes' if mode == "logits" else "holds another"):
        cache_teacher(teacher, data, tmp_path / ("other" if mode == "logits" else "cache"), collator=collator(), seed=1,
                      mode="hidden" if mode == "logits" else "logits")  # fmt: skip


def test_labels_of_a_classifier_matter(tmp_path):
    make, data, collator, _ = sentences()
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    cached = cache_teacher(teacher, data, tmp_path / "cache", mode="logits", collator=collator())
    relabelled = [e | {"labels": 0} for e in data[:4]]
    collate = DataCollatorForDistillation(collator(), labels_of="samples", readers=cached.readers)
    batch = collate(relabelled)
    torch.testing.assert_close(cached(batch).logits, teacher(batch).logits)
    with pytest.raises(ValueError, match='positions="all" is for causal'):
        cache_teacher(teacher, data, tmp_path / "b", mode="logits", collator=collator(), positions="all")


def test_several_labels_of_a_sample_are_taken_for_positions(tmp_path):
    make, data, collator, _ = sentences()
    data = [e | {"labels": [0.0, 1.0, 1.0]} for e in data]
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    teacher.model.config.problem_type = "multi_label_classification"
    cached = cache_teacher(teacher, data, tmp_path / "cache", mode="logits", collator=collator())
    batch = DataCollatorForDistillation(collator(), labels_of="samples", readers=cached.readers)(data[:5])
    assert "loss_rows" not in batch and cached(batch).logits.shape == (5, 3)


def test_an_answer_of_a_decoder_is_read_for_another(tmp_path):
    make, data, collator, _ = seq2seq()
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    cached = cache_teacher(teacher, data, tmp_path / "cache", collator=collator())
    collate = DataCollatorForDistillation(collator(), shift=False, labels_of="decoder", readers=cached.readers)
    collate(data[:2])
    with pytest.raises(MissingFromCacheError, match="is not in the cache"):
        collate([data[0], data[1] | {"labels": [token % 60 + 3 for token in data[1]["labels"]]}])


def test_columns_that_training_drops_are_part_of_the_key(tmp_path):
    make, data, collator, _ = sentences()
    data = Dataset.from_list([e | {"domain": i} for i, e in enumerate(data)])
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    arguments = dict(train_dataset=data, data_collator=collator(), processing_class=tiny_tokenizer())
    trainer = DistillTrainer(make(0), teacher=teacher, args=plain_arguments(tmp_path / "t"), **arguments)
    cache_teacher(teacher, trainer, tmp_path / "cache", mode="logits")
    shared = DataCollatorForDistillation(collator(), labels_of="samples")
    cached = trained(tmp_path / "cached", make, str(tmp_path / "cache"), data, shared)
    live = trained(tmp_path / "live", make, teacher, data, shared)
    assert relative_difference(cached, live) < 1e-5
    assert shared.readers == (), "the next trainer would read this one's cache"


# ---- images ----------------------------------------------------------------------------------------------------------
def noisy(example: dict) -> dict:
    return example | {"pixel_values": example["pixel_values"] + random.random() + np.random.rand() + torch.randn(1)}


def test_an_augmentation_that_draws_something_else_passes(tmp_path):
    make, data, _, _ = images()
    teacher = FrozenTeacher(make(1))
    seeded = SeededAugmentation(data, noisy, seed=3)
    run = dict(num_train_epochs=2, max_steps=-1)
    live = trained(tmp_path / "live", make, teacher, seeded, stack, **run)
    trainer = DistillTrainer(
        make(0), teacher=teacher, args=plain_arguments(tmp_path / "t"), train_dataset=seeded, data_collator=stack
    )
    cache_teacher(teacher, trainer, tmp_path / "cache", mode="logits")
    assert CachedTeacher(tmp_path / "cache").manifest["prepared"] == {"augmentation_seed": 3}
    cached = trained(tmp_path / "cached", make, str(tmp_path / "cache"), seeded, stack, **run)
    assert relative_difference(cached, live) < 1e-5
    other = SeededAugmentation(data, noisy, seed=4)
    message = "an augmentation draws something else.*augmentation_seed: 3 in the cache, 4 now"
    with pytest.raises(MissingFromCacheError, match=message):
        trained(tmp_path / "other", make, str(tmp_path / "cache"), other, stack)
    with pytest.raises(ValueError, match="data.sample"):
        cache_teacher(teacher, other, tmp_path / "cache", mode="logits", collator=stack)


def test_a_seeded_augmentation_changes_the_run_s_random_numbers():
    seeded = SeededAugmentation([{"pixel_values": torch.zeros(1)}] * 2, noisy, seed=1)
    draws = []
    for touch in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if touch:
            first, second = seeded[0], seeded[1]
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and len(seeded) == 2
    assert first != second and torch.equal(first["pixel_values"], seeded[0]["pixel_values"])


def vision_language(features):
    """Like a Qwen-VL processor: the patches of all images stand in one tensor."""
    batch = DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": f["input_ids"]} for f in features])
    patches = [torch.from_numpy(np.asarray(i)).float().reshape(-1, 3) for f in features for i in f["images"]]
    return batch | {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor([[1, 2, 2]] * len(patches))}


def test_pictures_of_one_text_are_one_document():
    pictures = [Image.fromarray(np.full((2, 2, 3), i, np.uint8)) for i in range(3)]
    texts = [[5, 6, 7], [5, 6, 7], [5, 6, 7, 8]]
    shown = [[pictures[0]], [pictures[1], pictures[2]], []]
    features = [{"input_ids": t, "images": s} for t, s in zip(texts, shown, strict=True)]
    collate = DataCollatorForDistillation(vision_language)
    together = [d.key for d in documents_of(collate(features), features)]
    alone = [documents_of(collate([f]), [f])[0].key for f in features[:2]]
    assert together[:2] == alone and len(set(together)) == 3
    for feature in features:
        del feature["images"]
    batch = collate.base([f | {"images": s} for f, s in zip(features, shown, strict=True)])
    batch |= {k: v for k, v in DataCollatorForDistillation(lambda _: dict(batch))(features).items()}
    batch["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values"]])
    with pytest.raises(ValueError, match="cannot tell which example of the batch each part of pixel_values"):
        documents_of(batch, features)


# ---- scores ----------------------------------------------------------------------------------------------------------
def margins(signals):
    return {"margin": signals.logits[:, 0] - signals.logits[:, 1], "embedding": signals.hidden_states[-1][:, 0]}


def test_scores_of_samples_arrive_at_other_samples(tmp_path):
    make, data, collator, _ = sentences()
    teacher = FrozenTeacher(make(1), tiny_tokenizer())
    needs = frozenset({"logits", "hidden_states"})
    cached = cache_teacher(
        teacher, data, tmp_path / "c", mode="scores", scores=margins, needs=needs, per="sample", collator=collator()
    )
    assert cached.gives == frozenset()
    chosen = [data[i] for i in (7, 2, 11)]
    collate = DataCollatorForDistillation(collator(), labels_of="samples", readers=cached.readers)
    batch = collate(chosen)
    expected = margins(teacher(batch, needs))
    assert batch["cached_margin"].shape == (3,) and batch["cached_embedding"].shape == (3, 16)
    features = cached(batch, frozenset()).features
    for name, value in expected.items():
        torch.testing.assert_close(features[name], value, rtol=1e-5, atol=1e-5)


class Ranks(Teacher):
    """Scores queries against passages; each block is padded by itself."""

    gives = frozenset()

    def __call__(self, batch, needs=frozenset()):
        sums = [(batch[k + "input_ids"] * batch[k + "attention_mask"]).sum(-1) for k in ("query_", "passage_")]
        return Signals(features={"score": (sums[0] * 100 + sums[1]).float()})


def pad_blocks(features):
    batch = {}
    for block in ("query_", "passage_"):
        padded = tiny_tokenizer().pad([{"input_ids": f[block]} for f in features], return_tensors="pt")
        batch |= {block + name: padded[name] for name in ("input_ids", "attention_mask")}
    return batch


def test_blocks_that_are_padded_apart_are_found_at_one_width_only(tmp_path):
    data = [{"query_": ids(2 + i % 4), "passage_": ids(3 + i % 5)} for i in range(9)]
    options = dict(mode="scores", scores=lambda s: s.features, per="sample", batch_size=4)
    collate = DataCollatorForDistillation(pad_blocks, labels_of="samples")
    cached = cache_teacher(Ranks(), data, tmp_path / "c", collator=collate, needs=frozenset(), **options)
    collate = DataCollatorForDistillation(pad_blocks, labels_of="samples", readers=cached.readers)
    for chosen in ([8, 1], [3], [5, 4, 0]):
        batch = collate([data[i] for i in chosen])
        assert torch.equal(batch["cached_score"], Ranks()(batch).features["score"])
    swapped = {"query_": data[0]["passage_"], "passage_": data[0]["query_"]}
    with pytest.raises(MissingFromCacheError):
        collate([swapped])


def likelihoods(signals):
    log_probs = signals.logits.dense().log_softmax(-1).gather(-1, signals.labels[:, None])[:, 0]
    count = len(signals.rows.example)
    return {"likelihood": log_probs.new_zeros(count).index_add_(0, signals.rows.document, log_probs)}


def test_repeated_examples_of_a_ragged_end_keep_what_was_cached_for_them(tmp_path, monkeypatch):
    data = [{"input_ids": ids(3 + i)} for i in range(6)]
    plain = DataCollatorForLanguageModeling(pad_token_id=0)
    teacher = FrozenTeacher(tiny_llama(seed=1), tiny_tokenizer())
    rows = cache_teacher(teacher, data, tmp_path / "rows", collator=plain)
    sums = cache_teacher(
        teacher, data, tmp_path / "sums", mode="scores", scores=likelihoods, per="sample", collator=plain
    )
    collate = DataCollatorForDistillation(plain, readers=rows.readers + sums.readers)

    class Run:
        data_collator, accelerator = collate, None

    monkeypatch.setattr(compat, "real_samples", lambda _: 2)
    cut, expected = DistillTrainer._without_repeats(Run, collate(data[:4])), collate(data[:2])
    for key in ("loss_rows", "document_example", *collate.row_keys, *collate.document_keys):
        assert len(cut[key]) == len(expected[key]), key
    torch.testing.assert_close(cut["cached_likelihood"], likelihoods(teacher(expected))["likelihood"])
    assert torch.equal(rows(cut).logits.hidden, rows(expected).logits.hidden)


def test_a_batch_without_loss_rows_is_an_error(tmp_path):
    data = [{"input_ids": ids(4), "labels": [-100] * 2 + ids(2)} for _ in range(4)]
    plain = DataCollatorForLanguageModeling(pad_token_id=0)
    teacher = FrozenTeacher(tiny_llama(seed=1), tiny_tokenizer())
    masked = [e | {"labels": [-100] * 4} for e in data]
    for mode in ("hidden", "topk", "sampled", "logits", "scores"):
        cached = cache_teacher(teacher, data + masked, tmp_path / mode, mode=mode, collator=plain, batch_size=4, k=4)
        batch = DataCollatorForDistillation(plain, readers=cached.readers)(masked)
        signals = cached(batch, cached.gives)
        assert len(signals.labels) == 0
        if mode != "scores":
            logits = signals.logits
            assert (logits.hidden if isinstance(logits, HeadLogits) else logits).shape[0] == 0


# ---- inputs of its own -----------------------------------------------------------------------------------------------
def test_a_teacher_with_inputs_of_its_own_is_keyed_by_the_student_s(tmp_path):
    def row(prompt, hint, answer):
        return {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "teacher_input_ids": hint + prompt + answer,
            "teacher_labels": [-100] * len(hint + prompt) + answer,
        }

    data = [row([5, 6], [9, 8], [7, 7]), row([5, 6], [10], [7, 7]), row([4], [3, 3, 3], [8])]
    plain = DataCollatorForLanguageModeling(pad_token_id=0)
    teacher = FrozenTeacher(tiny_llama(seed=1), tiny_tokenizer())
    for positions in ("loss", "all"):
        cached = cache_teacher(teacher, data, tmp_path / positions, collator=plain, positions=positions)
        batch = DataCollatorForDistillation(plain, readers=cached.readers)(data[::-1])
        torch.testing.assert_close(cached(batch).logits.hidden, teacher(batch).logits.hidden, rtol=1e-5, atol=1e-5)
        assert len(cached.store) == 3
