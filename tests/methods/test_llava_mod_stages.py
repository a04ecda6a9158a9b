"""What LLaVA-MoD's stages train and read, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_distill import FrozenTeacher, NextToken, PrivilegedTeacher, TeacherInputs, upcycle_to_moe
from hf_distill.methods.llava_mod import (
    STAGES,
    LlavaModConfig,
    build_trainer,
    distill,
    mimic_kd_loss,
    next_token_ce,
)
from hf_distill.testing.vlm import TinyVLM
from tests.helpers import SGD, dpo_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.methods.llava_mod_models import SETUP, named, trainer
from tests.students.moe_models import FAMILIES, dense_model, inputs_of

# ---- what trains ----------------------------------------------------------------------------------------------------
PARTS = {
    "adaptor": ("multi_modal_projector",),
    "dense": ("multi_modal_projector", "language_model", "lm_head"),
    "sparse": ("multi_modal_projector", ".mlp."),
    "preference": ("multi_modal_projector", ".mlp."),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_other_parts_than_the_papers(stage, tmp_path):
    student = SETUP.student() if stage == "preference" else SETUP.dense()
    teacher = SETUP.teacher().train()
    start = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = dict(optim="adamw_torch", learning_rate=1e-2, weight_decay=0.0, per_device_train_batch_size=8)
    run = trainer(tmp_path, stage, student=student, teacher=teacher, **settings)
    before = named(run.model)
    run.train()
    moved = {name for name, value in named(run.model).items() if not torch.equal(value, before[name])}
    expected = {n for n in before if any(part in n for part in PARTS[stage]) and "vision_tower" not in n}
    never = {n for n in expected if "shared_expert" in n}  # Qwen2Moe's, of zeros
    assert moved == expected - never, moved ^ expected
    if stage in ("sparse", "preference"):
        assert any(".gate.weight" in name for name in moved) and any(".experts." in name for name in moved)
    if stage != "adaptor":
        assert all(torch.equal(value, start[name]) for name, value in teacher.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_llama_all", "llava_llama"])
def test_another_family_keeps_its_vision_tower_or_projector_still(name):
    from hf_distill.methods._llava_mod_stages import train_only

    sparse = upcycle_to_moe(dense_model(name), layers=FAMILIES[name].layers)
    for model, stage in ((dense_model(name), "adaptor"), (dense_model(name), "dense"), (sparse, "sparse")):
        train_only(model, stage)
        model.train()
        model(**inputs_of(name), labels=inputs_of(name)["input_ids"]).loss.backward()
        trained = {n for n, p in model.named_parameters() if p.grad is not None}
        projector = {n for n in trained if "projector" in n or "merger" in n}
        tower = {n for n in trained if "vision_tower" in n or "visual" in n} - projector
        assert projector and not tower
        assert bool(trained - projector) == (stage != "adaptor")
        if stage == "sparse":
            assert all(".mlp." in n for n in trained - projector) and any("gate.weight" in n for n in trained)


def test_dropout_stays_on(tmp_path):
    student = SETUP.dense(attention_dropout=0.3)
    student.model.multi_modal_projector.act = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.2))
    run = trainer(tmp_path, "dense", student=student)
    found = {v for m in run.model.modules() for k, v in vars(m).items() if "dropout" in k and isinstance(v, float)}
    assert found <= {0.0} and all(m.p == 0 for m in run.model.modules() if isinstance(m, torch.nn.Dropout))


# ---- other inputs ---------------------------------------------------------------------------------------------------
def fine(patch: int = 2):
    """A teacher that cuts pictures into smaller patches: 16 placeholders instead of 4."""
    setup = TinyVLM()
    setup.patch = patch
    return setup


def test_a_teacher_with_other_placeholders_reads_the_students(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    with pytest.raises(ValueError, match="placeholders per picture: student 4, teacher 16.*PrivilegedTeacher"):
        trainer(tmp_path, teacher=fine().teacher())
    collators = [
        DataCollatorForVisionLanguageModeling(setup.processing_class(), completion_only_loss=True)
        for setup in (SETUP, fine())
    ]
    inputs = ("input_ids", "attention_mask", "pixel_values", "labels")
    settings = dict(data_collator=TeacherInputs(*collators), max_steps=1, per_device_train_batch_size=4, **SGD)
    run = trainer(tmp_path, teacher=PrivilegedTeacher(FrozenTeacher(fine().teacher()), inputs), rows=4, **settings)
    rows = [dict(run.train_dataset[i]) for i in range(4)]
    run.train()
    ours, theirs = collators[0]([dict(row) for row in rows]), collators[1]([dict(row) for row in rows])
    sides = []
    for model, batch in ((upcycle_to_moe(SETUP.dense(), router_std=0.5), ours), (fine().teacher().eval(), theirs)):
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        sides.append(logits[batch["labels"][:, 1:] != -100].log_softmax(-1))
    kl = (sides[1].exp() * (sides[1] - sides[0])).sum(-1).mean()
    assert run.state.log_history[0]["loss/mimic/kd"] == pytest.approx(kl.item(), rel=1e-5)
    config = LlavaModConfig(distill_tokens="all")
    with pytest.raises(ValueError, match="has rows of its own.*needs a live teacher that reads"):
        trainer(tmp_path / "all", config=config, teacher=PrivilegedTeacher(SETUP.teacher(), inputs), **settings)


@pytest.mark.parametrize("stage", ["dense", "preference"])
def test_truncation_cuts_placeholders(stage, tmp_path):
    run = trainer(tmp_path, stage, student=SETUP.student(), max_length=3, per_device_train_batch_size=4)
    with pytest.raises(
        ValueError, match="hold 12 picture placeholders and its pictures need 16|max_length=3 cuts image"
    ):
        run.train()


def test_an_adapter_trains_without_experts(tmp_path):
    from peft import LoraConfig

    student = SETUP.student()
    with pytest.raises(ValueError, match="target_parameters"):
        trainer(tmp_path, student=student, peft_config=LoraConfig(target_modules=r".*language_model.*q_proj"))
    run = trainer(tmp_path, student=SETUP.student(), peft_config=SETUP.peft_config(), learning_rate=1e-2)
    before = named(run.model)
    run.train()
    moved = {name for name, value in named(run.model).items() if not torch.equal(value, before[name])}
    assert any("experts" in n for n in moved) and all("lora" in n for n in moved)


def test_qwen3_vl_trains_another_loss_or_other_parts(tmp_path):
    """Pictures as a grid of patches, and a sparse class of the family's own."""
    batch = inputs_of("qwen3_vl")
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(9) < 7, -100)

    def collate(rows):
        return {key: value.clone() for key, value in batch.items()}

    settings = dict(max_steps=1, per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": True}, **SGD)
    args = sft_arguments(tmp_path, gradient_checkpointing=False, **settings)
    data = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}] * 2)
    student, teacher = dense_model("qwen3_vl"), dense_model("qwen3_vl", seed=7)
    run = build_trainer(
        student, teacher, data, LlavaModConfig(), args, data_collator=collate, processing_class=tiny_tokenizer()
    )
    before = named(run.model)
    assert type(run.model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    run.train()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        ours, theirs = student.eval()(**inputs).logits, teacher(**inputs).logits
    logged = run.state.log_history[0]
    assert logged["loss/mimic/kd"] == pytest.approx(mimic_kd_loss(ours, theirs, batch["labels"]).item(), rel=1e-4)
    assert logged["loss/mimic/lm"] == pytest.approx(next_token_ce(ours, batch["labels"]).item(), rel=1e-4)
    assert logged["loss/balanceloss/balance"] > 0
    moved = {name for name, value in named(run.model).items() if not torch.equal(value, before[name])}
    assert moved and all(".mlp." in n and "language_model" in n or "merger" in n for n in moved), moved


# ---- text students --------------------------------------------------------------------------------------------------
def test_a_text_student_goes_another_way(tmp_path):
    pairs = [{"prompt": f"w{i} w2", "chosen": f" w{i + 1} w4 w5", "rejected": f" w{i + 3} w6"} for i in range(8)]
    student = distill(
        dense_model("qwen3"),
        tiny_llama(hidden=32, seed=7),
        text_dataset(8),
        LlavaModConfig(sparse_learning_rate=1e-2),
        sft_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4),
        preference_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    )
    assert type(student).__name__ == "Qwen3MoeForCausalLM" and not student.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1_dense", "2_sparse", "3_preference"]
    assert all(p.requires_grad for p in student.parameters())


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(stages="dense,adaptor"), "choose some of adaptor,dense,sparse,preference, in this order"),
        (dict(stages=""), "choose some of"),
        (dict(distill_tokens="prompt"), "distill_tokens must be one of response, all"),
        (dict(mask_alignment="shift"), "mask_alignment must be one of"),
        (dict(dense_loss="lm"), "dense_loss must be one of only_kd, kd_lm"),
        (dict(aux_loss_form="switch"), "aux_loss_form must be one of gshard, hf"),
        (dict(aux_loss_coef=-1.0), "aux_loss_coef must be a finite number"),
        (dict(num_experts=2, top_k=3), "top_k=3 active experts of num_experts=2"),
        (dict(num_experts=1, top_k=1), "at least 2 experts"),
        (dict(router_std=0.0), "router_std must be positive"),
        (dict(dense_learning_rate=0.0), "dense_learning_rate must be positive"),
        (dict(sparse_max_steps=0), "sparse_max_steps must be positive, or -1"),
        (dict(common_vocab=0), "common_vocab must be at least 1"),
        (dict(preference_loss_type="ipo"), "preference_loss_type must be one of kto_pair, sigmoid"),
        (dict(preference_label_smoothing=0.1), "kto_pair has none"),
    ],
)
def test_settings_that_cannot_work_are_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        LlavaModConfig(**settings)


def test_nan_is_accepted():
    for name, value in vars(LlavaModConfig()).items():
        if isinstance(value, float):
            with pytest.raises(ValueError, match=name):
                LlavaModConfig(**{name: float("nan")})


def test_what_fails_in_a_later_stage_is_found_after_the_first(tmp_path):
    def run(student=None, config=None, teacher=None, folder=tmp_path, **more):
        args = sft_arguments(folder, max_length=None, max_steps=1)
        more = dict(processing_class=SETUP.processing_class(), preference_dataset=SETUP.pairs(2)) | more
        student, teacher = student or SETUP.dense(), teacher or SETUP.teacher()
        return distill(student, teacher, SETUP.dataset(2), config or LlavaModConfig(), args, **more)

    with pytest.raises(ValueError, match="stage preference needs preference_dataset"):
        run(preference_dataset=None)
    with pytest.raises(ValueError, match=r"\[5\] out of range, the model has layers 0 to 1"):
        run(config=LlavaModConfig(layers="0,5"))
    with pytest.raises(ValueError, match="native_only"):
        llamas = dict(student=dense_model("llava_llama"), teacher=dense_model("llava_llama", seed=1))
        run(**llamas, config=LlavaModConfig(native_only=True))
    with pytest.raises(ValueError, match="placeholders per picture: student 4, teacher 16"):
        run(teacher=fine().teacher())
    with pytest.raises(ValueError, match="train one stage with an adapter"):
        run(peft_config=SETUP.peft_config())
    with pytest.raises(ValueError, match="give True, with the same output_dir"):
        run(resume_from_checkpoint="checkpoint-2")
    assert not list(tmp_path.iterdir()), "work was done before the error"
    (tmp_path / "1_dense" / "final").mkdir(parents=True)
    with pytest.raises(ValueError, match="1_dense holds another run: go on with resume_from_checkpoint=True"):
        run()


def test_a_stage_that_cannot_work_is_built(tmp_path):
    with pytest.raises(ValueError, match="stage must be one of adaptor, dense"):
        trainer(tmp_path, "d2s")
    with pytest.raises(ValueError, match=r"sparse already, with \(experts, active\) \[\(4, 2\)\].*num_experts=8"):
        trainer(tmp_path, student=SETUP.student(), config=LlavaModConfig(num_experts=8))
    tied = SETUP.student()
    with torch.no_grad():
        tied.model.language_model.layers[0].mlp.gate.weight.zero_()
    for stage in ("sparse", "preference"):
        with pytest.raises(ValueError, match="gives all 4 experts one score .*goes to the first 2"):
            trainer(tmp_path, stage, student=tied)
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    for stage in ("sparse", "preference"):
        with pytest.raises(ValueError, match="reentrant gradient checkpointing leaves the balance loss"):
            trainer(tmp_path, stage, student=SETUP.student(), **reentrant)
    with pytest.raises(ValueError, match="common_vocab=99: the student has 65 entries and the teacher 65"):
        trainer(tmp_path, config=LlavaModConfig(common_vocab=99))
    with pytest.raises(ValueError, match="has no projector to train"):
        trainer(tmp_path, "adaptor", student=tiny_llama(vocabulary=65))
    run = trainer(tmp_path, config=LlavaModConfig(common_vocab=20))
    with pytest.raises(ValueError, match="lies beyond the 20 entries"):
        run.train()


def test_preference_settings_are_not_the_configs(tmp_path):
    config = LlavaModConfig(
        preference_loss_type="sigmoid", preference_beta=0.3, aux_loss_coef=0.2, preference_label_smoothing=0.1
    )
    run = trainer(tmp_path, "preference", student=SETUP.student(), config=config)
    args = run.args
    assert (args.loss_type, args.beta, args.label_smoothing) == (["sigmoid"], 0.3, 0.1)
    assert (args.aux_loss_coef, args.aux_loss_form) == (0.2, "gshard")
    dense = trainer(tmp_path / "dense", "preference", config=config)
    assert dense.args.aux_loss_coef == 0.0, "a dense student has no routers to balance"
    own = build_trainer(
        SETUP.student(), SETUP.teacher(), SETUP.pairs(2), config, dpo_arguments(tmp_path / "own", beta=0.7),
        stage="preference", processing_class=SETUP.processing_class(),
    )  # fmt: skip
    assert own.args.beta == 0.7


def test_names_that_stay_are_gone():
    from hf_distill.methods import llava_mod

    names = "mimic_kd_loss mimic_objective next_token_ce sequence_logps preference_loss route_top_k balance_loss"
    assert all(callable(getattr(llava_mod, name)) for name in [*names.split(), "routed_ffn"])
    assert isinstance(llava_mod.adaptor_objective(), NextToken)
    with pytest.raises(AttributeError, match="has no attribute 'mimic'"):
        llava_mod.mimic  # noqa: B018
