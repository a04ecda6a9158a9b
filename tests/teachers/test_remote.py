"""Log-probabilities from an endpoint: the training of a top-k cache, nothing asked twice, no misbehaviour believed."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_distill import (
    CachedTeacher,
    DistillSFTTrainer,
    FeatureKD,
    FrozenTeacher,
    LogitKD,
    PrivilegedTeacher,
    RemoteTeacher,
    cache_teacher,
)
from hf_distill.methods.taid import TAID, TAIDConfig
from hf_distill.teachers.cache.keys import token_documents
from hf_distill.teachers.endpoint import TeacherProtocolError, TeacherRequestError, TeacherUnavailable
from hf_distill.teachers.usage import TeacherBudgetExceeded
from tests.helpers import SGD, WORDS, relative_difference, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.teachers.local_endpoint import MODEL, local_endpoint

DATA, K = text_dataset(12), 8
QUICK = dict(backoff=0.01, timeout=5.0)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(32, seed=1)


@pytest.fixture
def server(model):
    with local_endpoint(model, tiny_tokenizer()) as endpoint:
        yield endpoint


def remote(server, **settings) -> RemoteTeacher:
    return RemoteTeacher(server.url, settings.pop("model", MODEL), **dict(k=K) | QUICK | settings)


def make_trainer(folder, teacher=None, *, objective=None, student=None, **settings) -> DistillSFTTrainer:
    settings = SGD | dict(max_steps=4, per_device_train_batch_size=4, train_sampling_strategy="sequential") | settings
    return DistillSFTTrainer(
        student or tiny_llama(),
        teacher=teacher,
        objective=objective() if objective else LogitKD(label_weight=0.5),
        args=sft_arguments(folder, **settings),
        train_dataset=DATA,
        processing_class=tiny_tokenizer(),
    )


def trained(folder, teacher, **settings) -> dict:
    trainer = make_trainer(folder, teacher, **settings)
    trainer.train()
    losses = {"losses": torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])}
    return {k: v.clone() for k, v in trainer.student().state_dict().items()} | losses


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model):
    """The top-k of the same model in this process."""
    root = tmp_path_factory.mktemp("cache")
    teacher = FrozenTeacher(model, tiny_tokenizer(), name="tiny")
    cache_teacher(teacher, make_trainer(root / "run", teacher), root / "topk", mode="topk", k=K)
    return root / "topk"


def asked(server) -> list[str]:
    """Prompts of documents that were answered; the probe is a text."""
    return [prompt for prompt in server.succeeded if prompt.startswith("[")]


# ---- the same training -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(objective=lambda: LogitKD("reverse_kl"), train_sampling_strategy="random", per_device_train_batch_size=3),
        dict(objective=lambda: TAID(TAIDConfig()), gradient_accumulation_steps=2),
        dict(packing=True, max_length=24, per_device_train_batch_size=2),
        dict(padding_free=True, max_length=None),
    ],
    ids=["forward_kl", "reverse_kl", "taid", "packed", "padding_free"],
)
def test_a_remote_teacher_trains_another_student_than_its_topk_cache(server, cache, tmp_path, settings):
    """The server sends float32, so what is left is the rounding of a batch of one against a padded one."""
    local = trained(tmp_path / "local", CachedTeacher(cache), **settings)
    there = trained(tmp_path / "there", remote(server), **settings)
    assert relative_difference(there, local) < 1e-5


def test_rows_are_not_those_of_the_model(server, model):
    teacher = remote(server, tokenizer=tiny_tokenizer())
    batch = next(iter(make_trainer("unused", teacher, save_strategy="no").get_train_dataloader()))
    signals = teacher(batch)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, ids = logits.log_softmax(-1).flatten(0, 1)[batch["loss_rows"]].topk(K)
    assert torch.equal(signals.logits.ids, ids) and signals.logits.shape == (len(batch["loss_rows"]), K)
    torch.testing.assert_close(signals.logits.log_probs, expected, atol=1e-5, rtol=0)
    assert signals.logits.temperature == 1.0 and torch.equal(signals.labels, batch["row_labels"])
    empty = batch | {key: batch[key][:0] for key in ("loss_rows", "row_labels", "row_document", "document_example")}
    assert teacher(empty).logits.shape == (0, K)


def test_a_masked_prompt_is_stored_or_another_mask_is_served(server, tmp_path):
    teacher = remote(server, tokenizer=tiny_tokenizer(), store=tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def said(*rows):
        one = torch.tensor([0])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        rows = torch.tensor(rows)
        batch |= {"loss_rows": rows, "row_labels": ids[0, rows + 1], "row_document": 0 * rows, "document_example": one}
        assert [d.tolist() for d in token_documents(batch)[0]] == [ids[0].tolist(), rows.tolist()]
        return teacher(batch).logits.log_probs

    every = said(0, 1, 2, 3)
    assert torch.equal(said(2, 3), every[2:]) and torch.equal(said(0, 3), every[[0, 3]])
    assert teacher.usage.requests == 1 + 3


def test_requests_of_a_batch_wait_for_each_other(server, tmp_path):
    server.delay = 0.03
    trained(tmp_path, remote(server, concurrency=3), max_steps=2)
    assert server.most_at_once == 3


# ---- nothing twice ---------------------------------------------------------------------------------------------------
def test_an_epoch_asks_again(server, tmp_path):
    teacher = remote(server, store=tmp_path / "answers")
    trained(tmp_path / "run", teacher, max_steps=-1, num_train_epochs=3, train_sampling_strategy="random")
    assert len(asked(server)) == len(set(asked(server))) == 12
    assert (teacher.usage.requests, teacher.usage.cache_hits) == (1 + 12, 24)
    assert teacher.describe()["teacher_prompt_tokens"] == teacher.usage.prompt_tokens > 0
    kept = trained(tmp_path / "again", remote(server, store=tmp_path / "answers"), max_steps=2)
    forgotten = trained(tmp_path / "free", remote(server), max_steps=2)
    assert len(asked(server)) == 12 + 8  # a teacher without a store keeps nothing for the next
    assert all(torch.equal(kept[k], forgotten[k]) for k in kept)


def test_a_server_killed_in_mid_run_costs_answers_or_changes_the_student(model, tmp_path):
    settings = dict(per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=2)
    with local_endpoint(model, tiny_tokenizer()) as server:
        whole = trained(tmp_path / "whole", remote(server), **settings)
        port = server.port
    first = []
    with local_endpoint(model, tiny_tokenizer(), port=port, die_after=1 + 7) as server:
        trainer = make_trainer(
            tmp_path / "run", remote(server, store=tmp_path / "answers", max_retries=1, concurrency=1), **settings
        )
        with pytest.raises(
            TeacherUnavailable, match=rf"http://127.0.0.1:{port}/v1 \(model {MODEL}\) cannot be reached"
        ):
            trainer.train()
        first = asked(server)
    assert len(first) == 7 and trainer.state.global_step == 3
    with open(tmp_path / "answers" / "answers-00000.jsonl", "ab") as torn:
        torn.write(b'{"key": "00')
    with local_endpoint(model, tiny_tokenizer(), port=port) as server:
        teacher = remote(server, store=tmp_path / "answers")
        again = make_trainer(tmp_path / "run", teacher, **settings)
        again.train(resume_from_checkpoint=True)
        second = asked(server)
    assert again.state.global_step == 6 and len(second) == 5 and not set(first) & set(second)
    ours = again.student().state_dict()
    assert all(torch.equal(ours[k], whole[k]) for k in ours)


def test_ranks_ask_for_each_others_documents(server, tmp_path, monkeypatch):
    batch = next(iter(make_trainer("unused", remote(server), save_strategy="no").get_train_dataloader()))
    server.succeeded.clear()
    teachers = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        teachers.append(remote(server, tokenizer=tiny_tokenizer(), store=tmp_path))
        teachers[rank].check()
    said = [teacher(batch).logits.log_probs for teacher in teachers]
    assert len(asked(server)) == 4 and torch.equal(*said)
    assert [p.name for p in sorted(tmp_path.glob("answers-*"))] == ["answers-00000.jsonl"]


def test_another_teacher_answers_from_a_store(server, tmp_path, model):
    remote(server, tokenizer=tiny_tokenizer(), store=tmp_path).check()
    remote(server, tokenizer=tiny_tokenizer(), store=tmp_path).check()
    with pytest.raises(ValueError, match="are another teacher's.*\n  k: 8 in the cache, 4 now"):
        remote(server, tokenizer=tiny_tokenizer(), store=tmp_path, k=4).check()
    with local_endpoint(tiny_llama(32, seed=2), tiny_tokenizer()) as other:  # under the same name
        with pytest.raises(TeacherProtocolError, match="total variation .*another model is served under this name"):
            remote(other, tokenizer=tiny_tokenizer(), store=tmp_path).check()
    with local_endpoint(tiny_llama(32, seed=1).bfloat16(), tiny_tokenizer()) as rounded:
        remote(rounded, tokenizer=tiny_tokenizer(), store=tmp_path).check()


# ---- a cache from an endpoint ----------------------------------------------------------------------------------------
def test_a_cache_written_from_an_endpoint_is_another_one(server, cache, tmp_path):
    teacher = remote(server, store=tmp_path / "answers")
    trainer = make_trainer(tmp_path / "run", teacher)
    written = cache_teacher(teacher, trainer, tmp_path / "topk", mode="topk", k=K)
    assert len(asked(server)) == 12 and written.codec == CachedTeacher(cache).codec
    both = [trained(tmp_path / str(i), CachedTeacher(f), max_steps=3) for i, f in enumerate((tmp_path / "topk", cache))]
    assert relative_difference(*both) < 1e-5
    for mode in ("hidden", "sampled", "logits", "scores"):
        with pytest.raises(ValueError, match="topk"):
            cache_teacher(teacher, trainer, tmp_path / mode, mode=mode)
    with pytest.raises(ValueError, match="k must lie between 1 and the 8 that the teacher tells, got 64"):
        cache_teacher(teacher, trainer, tmp_path / "more", mode="topk")
    renamed = remote(server, tokenizer=tiny_tokenizer())
    renamed.endpoint.model = "org/teacher-2"
    with pytest.raises(ValueError, match="does not fit.*served: nothing in the cache, .*org/teacher-2"):
        CachedTeacher(cache, teacher=renamed)


def test_flags_reach_another_teacher(server, tmp_path):
    flags = dict(teacher_model_server_url=server.url, teacher_model_name_or_path=MODEL, teacher_top_k=5)
    trainer = make_trainer(tmp_path, **flags, teacher_model_init_kwargs='{"concurrency": 2, "max_tokens_total": 9999}')
    assert (trainer.teacher.k, trainer.teacher.endpoint.concurrency) == (5, 2)
    assert trainer.teacher.endpoint.account.budget.max_tokens_total == 9999
    trainer.train()
    assert (tmp_path / "teacher_answers" / "answers-00000.jsonl").is_file()
    with pytest.raises(ValueError, match="the name that the server gives"):
        make_trainer(tmp_path, teacher_model_server_url=server.url)
    with pytest.raises(ValueError, match="teacher_load_in_4bit is the server's matter"):
        make_trainer(tmp_path, **flags, teacher_load_in_4bit=True)


# ---- misbehaviour ----------------------------------------------------------------------------------------------------
FATAL = {
    "html": (TeacherProtocolError, r"no JSON \(text/html\)"),
    "error body": (TeacherProtocolError, "no choices.*worker died"),
    "no choices": (TeacherProtocolError, "0 choices came"),
    "cut": (TeacherUnavailable, "cut the connection"),
    "other model": (TeacherProtocolError, "another model answered"),
    "no logprobs": (TeacherProtocolError, "`prompt_logprobs` was dropped.*only vLLM"),
    "fewer logprobs": (
        TeacherProtocolError,
        "[67] log-probabilities came for a token where 8 were asked for|behind it",
    ),
    "fewer tokens": (TeacherProtocolError, r"told of \d+ tokens where the prompt has \d+"),
    "other tokens": (TeacherProtocolError, r"token \d+ of the prompt is \d+ and it told of .*another tokenizer"),
    "tempered": (TeacherProtocolError, "probabilities sum to .*raw_logprobs"),
    400: (TeacherRequestError, "400.*must be at most 20"),
    503: (TeacherUnavailable, "503"),
}


@pytest.mark.parametrize("fault", FATAL)
def test_a_misbehaving_server_is_believed_or_not_named(server, tmp_path, fault):
    kind, message = FATAL[fault]
    server.always = fault
    with pytest.raises(kind, match=message) as error:  # before anything is trained
        make_trainer(tmp_path, remote(server, max_retries=1, store=tmp_path / "answers"))
    assert f"{server.url}/v1 (model {MODEL})" in str(error.value) and len(server.requests) <= 2
    server.always = None
    trainer = make_trainer(tmp_path, remote(server, max_retries=1, store=tmp_path / "answers", concurrency=1))
    server.faults = [None, None, *[fault] * 9]
    with pytest.raises(kind, match=message):
        trainer.train()
    lines = (tmp_path / "answers" / "answers-00000.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(len(json.loads(line)["key"]) == 32 for line in lines)


def shuffled_tokenizer() -> PreTrainedTokenizerFast:
    """As many words, on other ids."""
    ids = {word: i for i, word in enumerate(WORDS[:3] + WORDS[:2:-1])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("other", [shuffled_tokenizer, character_tokenizer])
def test_another_tokenizer_behind_the_server_is_believed(model, tmp_path, other):
    with local_endpoint(model, other()) as server:
        with pytest.raises(TeacherProtocolError, match="another tokenizer stands behind it"):
            make_trainer(tmp_path, remote(server))
        assert len(server.requests) == 1


def test_a_padded_head_gives_ids_that_no_token_has(tmp_path):
    with local_endpoint(tiny_llama(32, seed=1, vocabulary=96), tiny_tokenizer()) as server:
        teacher = remote(server, tokenizer=tiny_tokenizer(), k=40)
        batch = next(iter(make_trainer(tmp_path, teacher).get_train_dataloader()))
        logits = teacher(batch).logits
    assert logits.ids.max() < 64 and (logits.log_probs == -torch.inf).any()
    assert (logits.log_probs[:, 0] > -torch.inf).all()


def test_what_it_cannot_do_is_tried(server, tmp_path):
    with pytest.raises(ValueError, match="RemoteTeacher gives only logits"):
        make_trainer(tmp_path, remote(server), objective=FeatureKD)
    with pytest.raises(ValueError, match="temperature 1.0"):
        make_trainer(tmp_path, remote(server), objective=lambda: LogitKD(temperature=2.0))
    with pytest.raises(ValueError, match="not the student's"):
        make_trainer(tmp_path, remote(server, tokenizer=shuffled_tokenizer()))
    with pytest.raises(ValueError, match="at most the 64 entries"):
        make_trainer(tmp_path, remote(server, k=65))
    with pytest.raises(ValueError, match="needs the tokenizer"):
        make_trainer(tmp_path, PrivilegedTeacher(remote(server)))
    with pytest.raises(ValueError, match="token ids alone, and the batch has pixel_values"):
        batch = next(iter(make_trainer(tmp_path, remote(server)).get_train_dataloader()))
        remote(server, tokenizer=tiny_tokenizer())(batch | {"pixel_values": torch.zeros(1)})
    spender = remote(server, max_tokens_total=100, store=tmp_path / "answers")
    with pytest.raises(TeacherBudgetExceeded, match="max_tokens_total=100"):
        make_trainer(tmp_path, spender).train()
    assert 0 < spender.usage.tokens <= 100
