"""What a user gives wrong is said before any long work: what was given, and what to do."""

import importlib.util
import shutil

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_distill import DistillConfig, DistillSFTTrainer, DistillTrainer, FrozenTeacher, LogitKD, NextToken, Objective
from hf_distill.losses import ForwardKL, LabelCrossEntropy, forward_kl
from tests.helpers import WORDS, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(32, seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    return tokenizer


def sft(folder, **given):
    """A trainer that would work, with something else given."""
    settings = {k: given.pop(k) for k in list(given) if k in sft_arguments(folder).__dict__}
    tokenizer = given.pop("processing_class", tiny_tokenizer())
    defaults = dict(
        model=tiny_llama(),
        teacher=FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer()),
        objective=LogitKD(),
        train_dataset=text_dataset(4),
    )
    args = sft_arguments(folder, max_steps=1, **settings)
    return DistillSFTTrainer(**defaults | given, args=args, processing_class=tokenizer)


def chats(tokenizer_template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer_template
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    return {"processing_class": tokenizer, "train_dataset": Dataset.from_list([{"messages": messages}] * 4)}


# what is given; the kind of error; what its message must hold, in this order
WRONG = {
    "no dataset": (dict(train_dataset=None), ValueError, "no train dataset.*--dataset_name"),
    "an empty dataset": (dict(train_dataset=text_dataset(0)), ValueError, "train dataset is empty.*split"),
    "a dataset that is a name": (dict(train_dataset=3), TypeError, "must be a datasets.Dataset.*got int"),
    "columns of another task": (
        dict(train_dataset=Dataset.from_dict({"sentence": ["w1 w2"], "score": [1]})), ValueError,
        "columns score, sentence.*text.*messages.*prompt.*rename",
    ),
    "labels that are all masked": (
        dict(train_dataset=Dataset.from_dict({"input_ids": [[3, 4, 5]] * 2, "labels": [[-100] * 3] * 2})), ValueError,
        "all labels of all 2 examples are masked",
    ),
    "prompts longer than max_length": (
        dict(max_length=4, train_dataset=Dataset.from_list([{"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}] * 3)),
        ValueError, "none of the 3 examples has a label left.*max_length=4 is shorter than the prompts",
    ),
    "no objective": (dict(objective="forward_kl"), TypeError, "must be an Objective.*LogitKD.*got str"),
    "an objective's class": (dict(objective=LogitKD), TypeError, "must be an Objective.*got type"),
    "no teacher": (
        dict(teacher=None), ValueError, "LogitKD needs a teacher.*--teacher_model_name_or_path.*teacher_adapter_off"
    ),
    "a teacher of a wrong type": (dict(teacher=[1]), TypeError, "a Hub id, a folder, a model or a Teacher, got list"),
    "a teacher that is no path": (
        dict(teacher="no/such-teacher"), ValueError,
        "cannot load the teacher from 'no/such-teacher', taken as a Hub id .*no folder of that name",
    ),
    "two bit widths": (dict(teacher_load_in_8bit=True, teacher_load_in_4bit=True), ValueError, "exclude each other"),
    "bits for a loaded teacher": (
        dict(teacher=tiny_llama(seed=1), teacher_load_in_4bit=True), ValueError, "passed as a model.*pass its path"
    ),
    "both kinds of teacher": (dict(teacher_adapter_off=True), ValueError, "give no other teacher"),
    "another tokenizer": (
        dict(teacher=FrozenTeacher(tiny_llama(vocabulary=72, seed=1), other_tokenizer())), ValueError,
        "tokenizers differ: id 64 is nothing for the student and 'extra' for the teacher",
    ),
    "another vocabulary, no tokenizer": (
        dict(teacher=FrozenTeacher(tiny_llama(vocabulary=72, seed=1))), ValueError,
        "64 vocabulary entries and the teacher 72.*teacher's tokenizer is unknown.*FrozenTeacher\\(model, tok",
    ),
    "a head smaller than its tokenizer": (
        dict(model=tiny_llama(vocabulary=60)), ValueError, "ids up to 63, but the student's head has only 60"
    ),
    "a negative rate": (
        dict(objective_learning_rate=-1.0), ValueError, "objective_learning_rate must be positive, got -1"
    ),
    "arguments of another kind": (dict(args=3), TypeError, "args must be DistillSFTConfig.*got int"),
}  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_a_mistake_is_not_named(tmp_path, given):
    arguments, kind, message = WRONG[given]
    with pytest.raises(kind, match=f"(?s){message}"):
        if "args" in arguments:
            DistillSFTTrainer(tiny_llama(), teacher=tiny_llama(seed=1), args=arguments["args"])
        sft(tmp_path, **arguments)


def test_a_student_alone_must_have_a_teacher(tmp_path):
    sft(tmp_path, teacher=None, objective=NextToken()).train()


def test_a_folder_that_is_no_safetensors_model_is_loaded(teacher_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = tmp_path / "pickled"
    shutil.copytree(teacher_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_llama(32, seed=1).state_dict(), pickled / "pytorch_model.bin")
    for folder in (empty, pickled):
        for given in (dict(teacher=str(folder)), dict(model=str(folder), processing_class=tiny_tokenizer())):
            who = "teacher" if "teacher" in given else "student"
            with pytest.raises(
                ValueError, match=f"cannot load the {who} from .*{folder.name}.*a folder.*safetensors weights"
            ):
                sft(tmp_path / "run", **given)


def test_quantising_without_bitsandbytes_fails_late(teacher_folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a))
    for given in ({"teacher_load_in_8bit": True}, {"teacher_load_in_4bit": True}):
        with pytest.raises(ImportError, match="need bitsandbytes, .*pip install bitsandbytes, or load .* without"):
            sft(tmp_path, teacher=str(teacher_folder), **given)
    with pytest.raises(ValueError, match="in 8 or in 4 bit, not both"):
        FrozenTeacher.from_pretrained(str(teacher_folder), load_in_8bit=True, load_in_4bit=True)


REMOTE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "homemade"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_code_of_a_checkpoint_runs_unasked(teacher_folder, tmp_path, monkeypatch, who):
    import json

    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    shutil.copytree(teacher_folder, folder)
    (folder / "homemade.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    given = {"model" if who == "student" else "teacher": str(folder)}
    with pytest.raises(ValueError, match=f"(?s)cannot load the {who} from .*remote.*trust_remote_code"):
        sft(tmp_path / "run", **given)
    assert not list(tmp_path.rglob("ran"))


def test_templates_that_differ_go_unnoticed(tmp_path):
    same = chats()
    other = tiny_tokenizer()
    other.chat_template = "{% for message in messages %}{{ message['role'] }} w9 {{ message['content'] }} {% endfor %}"
    teacher = FrozenTeacher(tiny_llama(32, seed=1), other)
    with pytest.raises(ValueError, match="(?s)differently.*student: 'w1 w2 w3 w4 '.*teacher: 'user w9 w1 w2 assistant"):
        sft(tmp_path, **same, teacher=teacher)
    sft(tmp_path, **same, teacher=teacher, allow_different_chat_templates=True).train()
    with pytest.raises(ValueError, match="the teacher has no chat template"):
        sft(tmp_path, **same, teacher=FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer()))
    other.chat_template = TEMPLATE
    sft(tmp_path / "same", **same, teacher=teacher).train()


def test_different_numbers_of_classes_are_compared(tmp_path):
    def classifier(classes):
        config = BertConfig(
            vocab_size=64,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=classes,
        )
        return BertForSequenceClassification(config)

    data = Dataset.from_list([{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "label": 1}] * 4)
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    with pytest.raises(ValueError, match="student has 2 classes and the teacher 3: .*num_labels"):
        DistillTrainer(classifier(2), teacher=classifier(3), args=args, train_dataset=data)
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = DistillTrainer(classifier(2), teacher=classifier(2), args=plain, train_dataset=data)
    assert isinstance(trainer.args, DistillConfig) and trainer.args.max_steps == 1  # taken over


def test_two_trainings_run_into_one_folder(tmp_path, monkeypatch):
    args = sft_arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun promises, had no accelerator been found
    with pytest.raises(RuntimeError, match="started 2 processes, but each trains alone.*ACCELERATE_USE_CPU"):
        DistillSFTTrainer(
            tiny_llama(),
            teacher=tiny_llama(seed=1),
            args=args,
            train_dataset=text_dataset(2),
            processing_class=tiny_tokenizer(),
        )


# ---- one tokenizer, heads padded differently -------------------------------------------------------------------------
@pytest.mark.parametrize("student_entries, teacher_entries", [(64, 72), (72, 64)])
def test_padded_vocabularies_are_refused_or_compared_wrongly(tmp_path, student_entries, teacher_entries):
    student = tiny_llama(vocabulary=student_entries)
    model = tiny_llama(32, vocabulary=teacher_entries, seed=1).eval()
    trainer = sft(
        tmp_path,
        model=student,
        teacher=FrozenTeacher(model, tiny_tokenizer()),
        objective=LogitKD(kd_weight=0.7, label_weight=0.3),
        per_device_eval_batch_size=4,
    )
    divergence, crossed, rows = 0.0, 0.0, 0
    student.eval()
    with torch.no_grad():
        for example in trainer.train_dataset:
            ids = torch.tensor([example["input_ids"]])
            ours, theirs = student(ids).logits[0, :-1], model(ids).logits[0, :-1]
            divergence += forward_kl(ours[:, :64], theirs[:, :64], reduction="sum").item()
            crossed += cross_entropy(ours, ids[0, 1:], reduction="sum").item()  # over all of the student's entries
            rows += len(ours)
    got = trainer.evaluate(trainer.train_dataset)
    assert got["eval_kd"] == pytest.approx(divergence / rows, rel=1e-5)
    assert got["eval_label"] == pytest.approx(crossed / rows, rel=1e-5)
    assert got["eval_loss"] == pytest.approx((0.7 * divergence + 0.3 * crossed) / rows, rel=1e-5)
    trainer.train()


def test_an_id_that_the_teacher_cannot_read_is_embedded(tmp_path):
    """68 lies inside the student's padding, and outside the teacher's."""
    data = Dataset.from_dict({"input_ids": [[3, 4, 68, 5]] * 2})
    trainer = sft(
        tmp_path,
        model=tiny_llama(vocabulary=72),
        teacher=FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer()),
        train_dataset=data,
    )
    with pytest.raises(ValueError, match=r"input_ids holds token id 68 \(row 0, position 2.*share only ids 0 to 63"):
        trainer.train()
    assert len(WORDS) == 64


class Forgetful(Objective):
    """Leaves its term out from the second step on, instead of weighing it 0."""

    def logit_terms(self, progress):
        return {"label": LabelCrossEntropy()} | ({"kd": ForwardKL()} if progress == 0 else {})


def test_a_term_may_vanish_between_steps(tmp_path):
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher(tiny_llama(32, 1)),
        objective=Forgetful(),
        args=sft_arguments(tmp_path, max_steps=3),
        train_dataset=text_dataset(16),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(RuntimeError, match="terms changed from kd, label to label: .* weighs 0"):
        trainer.train()


def test_a_loss_type_of_sft_is_ignored_silently(tmp_path):
    with pytest.raises(ValueError, match="loss_type='dft' does not apply, the objective is the loss"):
        DistillSFTTrainer(
            tiny_llama(16, 1),
            teacher=FrozenTeacher(tiny_llama(32, 1)),
            args=sft_arguments(tmp_path, loss_type="dft"),
            train_dataset=text_dataset(4),
            processing_class=tiny_tokenizer(),
        )
