"""One small training run of each kind, and the same run written out by hand: whole batch, full logits, plain SGD.

Every run sees all its examples in each step, so its numbers must not depend on how they were split.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_distill import AdapterOffTeacher, DistillSFTTrainer, DistillTrainer, FeatureKD, FrozenTeacher, LogitKD
from hf_distill.training.saving import KEY
from tests.helpers import SGD, plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

STEPS = 2
TEMPERATURE = 2.0
VOCABULARY = 64


@dataclass(frozen=True)
class Case:
    """A run. `kind` of model, `part` of it that is trained, rows of data, and how the trainer splits them."""

    kind: str = "llama"
    part: str = "full"
    rows: int = 8
    per_device: int = 8
    accumulation: int = 1
    packing: bool = False
    adapter_off: bool = False
    eval_size: int = 8
    evaluate_first: bool = False
    strategy: str = "ddp"
    settings: dict = field(default_factory=dict)

    def split(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


def mixed_objective(narrow: int = 16, wide: int = 32):
    """Terms per token, per sample and on features, with a projector."""
    features = FeatureKD(per="sample")
    torch.manual_seed(3)
    features.projectors.append(nn.Linear(narrow, wide, bias=False))
    token = LogitKD("forward_kl", temperature=TEMPERATURE, label_weight=0.5)
    return token + 0.7 * LogitKD("reverse_kl", per="sample") + 0.3 * features


def classifier_objective():
    features = FeatureKD(per="sample")
    torch.manual_seed(3)
    features.projectors.append(nn.Linear(16, 32, bias=False))
    return LogitKD("forward_kl", temperature=TEMPERATURE, label_weight=0.5, per="sample") + 0.3 * features


def models(case: Case) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, the same weights each time."""
    if case.kind == "llama":
        student, teacher = tiny_llama(16, 2, seed=1), tiny_llama(32, 3, seed=2)
        if case.adapter_off:
            teacher = tiny_llama(16, 2, seed=1)
        lora = dict(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
        torch.manual_seed(5)
        if case.part == "lora":
            student = get_peft_model(student, LoraConfig(**lora))
        if case.part == "head":
            student = get_peft_model(student, LoraConfig(**lora, modules_to_save=["lm_head"]))
        if case.part == "tied":
            student = tiny_llama(16, 2, seed=1, tie_word_embeddings=True)
        return student, teacher
    built = []
    for seed, width, layers in ((1, 16, 1), (2, 32, 2)):
        torch.manual_seed(seed)
        built.append(_MODELS[case.kind](width, layers))
    return tuple(built)


def _bert(width: int, layers: int) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )


def _t5(width: int, layers: int) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=width,
            d_kv=4,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def _bart(width: int, layers: int) -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            dropout=0.0,
            init_std=0.2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=1,
        )
    )


_MODELS = {"bert": _bert, "t5": _t5, "bart": _bart}


def examples(case: Case) -> list[dict]:
    """Token ids (and labels) of every example, unpadded."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in text_dataset(case.rows, seed=4)["text"]]
    if case.kind == "llama":
        return [{"input_ids": row + [tokenizer.eos_token_id]} for row in ids]
    if case.kind == "bert":
        return [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]
    return [{"input_ids": row, "labels": row[::-1][: 2 + i % 4] + [1]} for i, row in enumerate(ids)]


# ---- by hand --------------------------------------------------------------------------------------------------------
def dense_terms(case: Case, student: nn.Module, teacher: nn.Module, objective: nn.Module) -> dict[str, tuple]:
    """{name: (mean over all examples, weight)}, one example at a time."""
    per_token, per_sample, project = [], [], objective.parts[-1].projectors[0]
    for example in examples(case):
        ids = torch.tensor([example["input_ids"]])
        inputs = {"input_ids": ids}
        if case.kind in ("t5", "bart"):
            inputs["labels"] = torch.tensor([example["labels"]])
        s, t = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
        with torch.no_grad():
            t = teacher(**inputs, output_hidden_states=True)
        if case.kind == "bert":
            target, a, b = torch.tensor([example["labels"]]), s.logits, t.logits
            hidden = s.hidden_states[-1][0], t.hidden_states[-1][0]
        elif case.kind == "llama":
            target, a, b = ids[0, 1:], s.logits[0, :-1], t.logits[0, :-1]
            hidden = s.hidden_states[-1][0, :-1], t.hidden_states[-1][0, :-1]
        else:
            target, a, b = inputs["labels"][0], s.logits[0], t.logits[0]
            hidden = s.decoder_hidden_states[-1][0], t.decoder_hidden_states[-1][0]
        label = cross_entropy(a, target, reduction="none")
        soft = [(x / TEMPERATURE).log_softmax(-1) for x in (a, b)]
        forward = kl_div(soft[0], soft[1], log_target=True, reduction="none").sum(-1)
        reverse = kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        feature = mse_loss(project(hidden[0]), hidden[1], reduction="none").mean(-1)
        per_token.append(torch.stack([label, forward]))
        per_sample.append(torch.stack([reverse.mean(), feature.mean()]))
    label, forward = torch.cat(per_token, dim=1).mean(1)
    reverse, feature = torch.stack(per_sample).mean(0)
    if case.kind == "bert":
        return {"logitkd/label": (label, 0.5), "logitkd/kd": (forward, 1.0), "featurekd/feature": (feature, 0.3)}
    return {
        "logitkd0/label": (label, 0.5),
        "logitkd0/kd": (forward, 1.0),
        "logitkd1/kd": (reverse, 0.7),
        "featurekd/feature": (feature, 0.3),
    }


def objective_of(case: Case):
    if case.kind == "bert":
        return classifier_objective()
    return mixed_objective(wide=16 if case.adapter_off else 32)


def by_hand(case: Case, rate: float = SGD["learning_rate"]) -> dict[str, Tensor]:
    """Gradients of each step, weights after the last, and all means then."""
    (student, teacher), objective = models(case), objective_of(case)
    student.add_module(KEY, objective)
    out: dict[str, Tensor] = {}
    for step in range(STEPS):
        student.zero_grad()
        terms = dense_terms(case, student, teacher, objective)
        out[f"loss.{step}"] = sum(value * weight for value, weight in terms.values()).detach()
        sum(value * weight for value, weight in terms.values()).backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                out[f"gradient.{step}.{name}"] = parameter.grad.clone()
                parameter.data.add_(parameter.grad, alpha=-rate)
    out |= {f"weight.{n}": p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    with torch.no_grad():
        terms = dense_terms(case, student, teacher, objective)
        if case.kind == "bert":
            right = [
                student(input_ids=torch.tensor([e["input_ids"]])).logits.argmax() == e["labels"] for e in examples(case)
            ]
            out["mean.accuracy"] = torch.stack(right).float().mean()
    out |= {f"mean.{name}": value for name, (value, _) in terms.items()}
    out["mean.loss"] = sum(value * weight for value, weight in terms.values())
    return out


# ---- by the trainer -------------------------------------------------------------------------------------------------
class Recorder(TrainerCallback):
    """Keeps what the optimizer is about to use."""

    def __init__(self):
        self.seen: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.seen[f"gradient.{state.global_step}.{plain(name)}"] = whole(parameter.grad)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.seen[f"loss.{state.global_step - 1}"] = torch.tensor(logs["loss"])


def plain(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, a plain one copied."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def build(case: Case, folder, **more):
    """The trainer of a case; `more` are its own keywords."""
    student, teacher = models(case)
    settings = SGD | dict(
        num_train_epochs=STEPS,
        per_device_train_batch_size=case.per_device,
        gradient_accumulation_steps=case.accumulation,
        per_device_eval_batch_size=case.eval_size,
    )
    more = {"objective": objective_of(case)} | more
    if case.kind == "llama":
        settings |= dict(packing=case.packing, eval_packing=case.packing)
        args = sft_arguments(folder, **settings | case.settings)
        before_trainer(case)
        data = text_dataset(case.rows, seed=4)
        return DistillSFTTrainer(
            student,
            teacher=AdapterOffTeacher() if case.adapter_off else FrozenTeacher(teacher),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny_tokenizer(),
            **more,
        )
    args = plain_arguments(folder, **settings | case.settings)
    collator = DataCollatorWithPadding if case.kind == "bert" else DataCollatorForSeq2Seq
    data = Dataset.from_list(examples(case))
    return DistillTrainer(
        student,
        teacher=FrozenTeacher(teacher),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator(tiny_tokenizer()),
        compute_metrics=accuracy if case.kind == "bert" else None,
        **more,
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def before_trainer(case: Case) -> None:
    """accelerate shards on GPU processes only; the test asks for the same code on the CPU."""
    if case.strategy == "fsdp2":
        from accelerate import DistributedType, PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def by_trainer(case: Case, folder, trainer=None) -> tuple[dict[str, Tensor], dict]:
    """The numbers of `by_hand` as a trainer finds them, and what ran."""
    trainer = trainer or build(case, folder)
    recorder = Recorder()
    trainer.add_callback(recorder)
    if case.evaluate_first:
        trainer.evaluate()
    trainer.train()
    out = recorder.seen
    out |= {f"weight.{plain(n)}": whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    metrics = trainer.evaluate()
    out |= {f"mean.{k.removeprefix('eval_')}": torch.tensor(v) for k, v in metrics.items() if isinstance(v, float)}
    facts = {
        "processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "steps": trainer.state.global_step,
        "teacher": type(getattr(trainer.teacher, "model", trainer.teacher)).__name__,
        "terms_logged": sorted(
            {tuple(sorted(k for k in line if "/" in k)) for line in trainer.state.log_history if "loss" in line}
        ),
    }
    return out, facts


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor], floor: float = 1e-7) -> dict[str, float]:
    """Largest relative difference per group of numbers: each loss, gradient, weight and mean."""
    worst: dict[str, float] = {}
    for name, expected in reference.items():
        if expected.norm() <= floor:
            continue
        error = ((ours[name].to(expected) - expected).norm() / expected.norm()).item()
        group = name.split(".")[0]
        worst[group] = max(worst.get(group, 0.0), error)
    return worst
