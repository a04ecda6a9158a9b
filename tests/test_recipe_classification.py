"""Classification recipes: defaults, the user's own data, models that read other inputs, and what is refused."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, ViTImageProcessorPil

from hf_distill import LogitKD
from hf_distill.baselines import FitNet, HintonKD
from hf_distill.recipe import EMBEDDED
from hf_distill.recipe_classification import load_classification_setup, parse, table, teacher_scores, weigh_labels
from hf_distill.recipe_data import labelled
from hf_distill.recipe_objectives import CHOICES, ObjectiveConfig, build_trainer, options_of
from hf_distill.teachers import PrivilegedTeacher, RelabelledTeacher
from hf_distill.testing import TinyImage
from tests.helpers import tiny_tokenizer
from tests.test_recipes import classifies, recipe

NAMES = TinyImage.labels


def named(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def saved_vit(folder, names=NAMES, *, teacher=False, mean=0.5, processor=True, **config) -> str:
    setup = TinyImage()
    (setup.teacher if teacher else setup.student)(**named(names), **config).save_pretrained(folder)
    size = config.get("image_size", 8)
    if processor:
        ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3).save_pretrained(folder)
    return str(folder)


def pictures(folder, n: int = 20, names=NAMES) -> str:
    """A folder of pictures per class, as users have them."""
    from PIL import Image as Pictures

    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(n):
            place = folder / split / names[i % len(names)]
            place.mkdir(parents=True, exist_ok=True)
            Pictures.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return str(folder)


def texts(folder, labels=None, pair=False, n: int = 12) -> str:
    rows = [
        {"text": f"w{i} w{i + 1}", "label": i % 3 if labels is None else labels[i % len(labels)]}
        | ({"other": f"w{i + 2}"} if pair else {})
        for i in range(n)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def saved_bert(folder, tokenizer, classes: int = 3, hidden: int = 16, **config) -> str:
    torch.manual_seed(hidden)
    shape = dict(hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    own = BertConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=64, num_labels=classes, **config)
    BertForSequenceClassification(own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def loaded(tmp_path, *argv: str, task=None, run="run"):
    argv = [*argv, "--output_dir", str(tmp_path / run), "--report_to", "none", "--disable_tqdm", "true"]
    script, flags, args, model, config = parse(ObjectiveConfig, "test", argv, task=task)
    return load_classification_setup(script, flags, args, model), args, config


def two_vits(tmp_path, *argv: str, **teacher) -> list[str]:
    student = saved_vit(tmp_path / "student")
    own = saved_vit(tmp_path / "teacher", teacher.pop("names", NAMES), teacher=True, **teacher)
    data = pictures(tmp_path / "data")
    return ["--model_name_or_path", student, "--teacher_model_name_or_path", own, "--dataset_name", data, *argv]


# ---- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_recipe_without_flags_does_not_run_or_says_nothing(kind, tmp_path, capsys):
    argv = ["--max_steps", "2", "--disable_tqdm", "true", "--objective", "dkd", "--output_dir", str(tmp_path / "out")]
    recipe(f"{kind}_classification").main(argv)
    said = capsys.readouterr().out
    for measure in ("accuracy", "macro F1", "cross-entropy", "calibration error", "agreement with the teacher"):
        assert measure in said
    teacher = float(next(line for line in said.splitlines() if line.startswith("accuracy")).split()[-1])
    assert teacher > 0.6, "the teacher on the spot has learnt its task"
    classifies(tmp_path / "out", kind)
    classes = (tmp_path / "out" / "classes.txt").read_text().splitlines()[1:]
    counted = sum(int(line.split()[-1]) for line in classes)
    assert counted == {"image": 450, "text": 1026}[kind], "the table of classes leaves examples out"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>reliability</h2>" in page and page.count("data:image/png") == 2


def test_a_teacher_with_classes_in_another_order_and_other_pixels_teaches_something_else(tmp_path, capsys):
    """The same teacher, its classes permuted and its pixels prepared its own way, gives the same student."""
    plain = two_vits(tmp_path / "a")
    setup, args, config = loaded(tmp_path / "a", *plain)
    assert setup.names == sorted(NAMES) and not isinstance(setup.teacher, (RelabelledTeacher, PrivilegedTeacher))
    order = [3, 1, 4, 0, 2]
    other = two_vits(tmp_path / "b", names=[NAMES[i] for i in order], mean=0.3)
    permuted, _, _ = loaded(tmp_path / "b", *other)
    assert isinstance(permuted.teacher, PrivilegedTeacher) and isinstance(permuted.teacher.teacher, RelabelledTeacher)
    trainer = build_trainer(
        permuted.student, permuted.teacher, permuted.train, config, args, **permuted.trainer_arguments
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    logits = trainer.teacher(batch).logits
    again = setup.teacher.model(pixel_values=batch["teacher_pixel_values"]).logits
    torch.testing.assert_close(logits, again[:, [order.index(i) for i in range(5)]])
    assert not torch.equal(batch["pixel_values"], batch["teacher_pixel_values"])
    trainer.train()
    assert "accuracy" in table(permuted, {}, trainer.evaluate())


def test_a_teacher_with_another_tokenizer_reads_the_students_tokens(tmp_path):
    words = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    student = saved_bert(tmp_path / "student", tiny_tokenizer())
    teacher = saved_bert(tmp_path / "teacher", words, hidden=24)
    argv = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--dataset_name"]
    setup, args, config = loaded(tmp_path, *argv, texts(tmp_path, pair=True), "--text_pair_column", "other")
    row = setup.train[0]
    assert row["teacher_input_ids"] == words("w0 w1", "w2")["input_ids"] != row["input_ids"]
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    own = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
    torch.testing.assert_close(trainer.teacher(batch).logits, setup.teacher.teacher.model(**own).logits)
    same, _, _ = loaded(tmp_path, *argv[:3], student, "--dataset_name", texts(tmp_path))
    assert "teacher_input_ids" not in same.train.column_names and same.names == [f"LABEL_{i}" for i in range(3)]


def test_lora_leaves_the_new_head_out(tmp_path):
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    setup, args, config = loaded(tmp_path, *two_vits(tmp_path, *lora))
    assert setup.peft_config.task_type is None and setup.peft_config.modules_to_save == ["classifier"]
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in trained) and all("lora" in n or "classifier" in n for n in trained)


# ---- labels ----------------------------------------------------------------------------------------------------------
def test_labels_of_minus_100_are_trained_on_and_a_class_goes_missing_unsaid(tmp_path, caplog):
    student = saved_bert(tmp_path / "student", tiny_tokenizer())
    argv = ["--model_name_or_path", student, "--dataset_name", texts(tmp_path, labels=[0, 2, -100])]
    with caplog.at_level(logging.WARNING):
        setup, _, _ = loaded(tmp_path, *argv, "--class_names", "bad", "fair", "good")
    assert sorted(set(setup.train["labels"])) == [0, 2] and len(setup.train) == 8
    assert "4 of 12 examples have no label" in caplog.text and "no training example of the class 'fair'" in caplog.text
    assert setup.student.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    with pytest.raises(ValueError, match="balancing classes by weights needs examples of every class.*fair"):
        loaded(tmp_path, *argv, "--class_names", "bad", "fair", "good", "--class_weights", "balanced")


def test_labels_by_name_are_numbered_by_chance(tmp_path):
    student = saved_bert(tmp_path / "student", tiny_tokenizer(), classes=2)
    argv = ["--model_name_or_path", student, "--dataset_name", texts(tmp_path, labels=["no", "yes", "maybe"])]
    setup, _, _ = loaded(tmp_path, *argv)
    assert setup.names == ["maybe", "no", "yes"] and list(setup.train["labels"][:3]) == [1, 2, 0]
    assert setup.student.config.num_labels == 3, "a head of other classes is made anew"
    with pytest.raises(ValueError, match="labels maybe of 'label' are none of the 2 classes"):
        loaded(tmp_path, *argv, "--class_names", "no", "yes")


def test_the_label_loss_ignores_weights_and_smoothing():
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 2])
    objective, weights = HintonKD(), torch.tensor([0.5, 2.0, 1.0])
    plain = objective.label_loss(logits, labels)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, labels))
    objective.weigh_labels(weights, 0.1)
    log_p, expected = logits.log_softmax(-1), 0.0
    for row, y in zip(log_p, labels.tolist(), strict=True):
        target = [0.1 / 3 + 0.9 * (c == y) for c in range(3)]
        expected -= sum(t * w * p for t, w, p in zip(target, weights.tolist(), row.tolist(), strict=True)) / 6
    torch.testing.assert_close(objective.label_loss(logits, labels), torch.tensor(expected, dtype=torch.float64))
    halves = [objective.label_loss(logits[a:b], labels[a:b]) * (b - a) / 6 for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(sum(halves), objective.label_loss(logits, labels))


def test_weights_for_an_objective_without_a_label_loss_vanish(tmp_path):
    student = saved_bert(tmp_path / "student", tiny_tokenizer())
    argv = ["--model_name_or_path", student, "--dataset_name", texts(tmp_path), "--label_smoothing", "0.1"]
    setup, _, _ = loaded(tmp_path, *argv)
    with pytest.raises(ValueError, match="LogitKD has no label loss"):
        weigh_labels(setup, LogitKD())
    objective = HintonKD() + FitNet()
    weigh_labels(setup, objective)
    assert [leaf.label_smoothing for leaf in objective.parts] == [0.1, 0.1]


# ---- refused before any long work ------------------------------------------------------------------------------------
def test_classes_of_other_names_meet(tmp_path):
    argv = two_vits(tmp_path, names=["ant", "bee", "cow", "dog", "eel"])
    with pytest.raises(ValueError, match="Dataset: ant, bee, cat.*Teacher: ant, bee, cow.*--same_label_order"):
        loaded(tmp_path, *argv)
    setup, _, _ = loaded(tmp_path, *argv, "--same_label_order")
    assert not isinstance(setup.teacher, RelabelledTeacher)


def test_a_student_of_another_order_is_relabelled_silently(tmp_path):
    saved_vit(tmp_path / "other", NAMES[::-1])
    argv = two_vits(tmp_path)
    argv[1] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="classes in another order. Student: eel, dog.*Dataset: ant, bee"):
        loaded(tmp_path, *argv)


def test_pictures_of_another_size_and_no_processor_reach_the_teacher(tmp_path):
    argv = two_vits(tmp_path, image_size=16, processor=False)
    with pytest.raises(ValueError, match="pictures of size 16, the student of size 8.*no image processor beside"):
        loaded(tmp_path, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objective", "kdd"], "unknown objective 'kdd'; choose of none, kd, dkd"),
        (["--objective_options", '{"temprature": 2}'], "objective_options of kd are temperature=None.*temprature"),
        (["--objective_options", "{2"], "must be JSON"),
        (["--objective_options", "[2]"], "objective_options of kd are"),
        (["--task", "sound"], "task must be one of auto, image, text"),
        (["--augmentation", "blur"], "augmentation must be one of none, crop_flip"),
        (["--label_smoothing", "1"], "label_smoothing must lie between 0 and 1"),
        (["--dataset_streaming", "--dataset_name", "x"], "leave out --dataset_streaming"),
        (["--image_column", "photo"], "photo"),
    ],
)
def test_a_wrong_flag_is_taken(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, *two_vits(tmp_path), *argv)


def test_a_dataset_without_pictures_texts_or_labels_is_taken(tmp_path):
    student = saved_vit(tmp_path / "student")
    for columns, message in (({"x": [1, 2]}, "no column of pictures or texts among x"),):
        Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
        with pytest.raises(ValueError, match=message):
            loaded(tmp_path, "--model_name_or_path", student, "--dataset_name", str(tmp_path / "data"))
    Dataset.from_dict({"text": ["a", "b"], "score": [0.5, 1.0]}).save_to_disk(tmp_path / "texts")
    argv = ["--model_name_or_path", student, "--dataset_name", str(tmp_path / "texts")]
    with pytest.raises(ValueError, match="no column of labels among text, score: name it with --label_column"):
        loaded(tmp_path, *argv)
    with pytest.raises(ValueError, match="labels must be classes.*0.5"):
        loaded(tmp_path, *argv, "--label_column", "score")


def test_a_teacher_that_is_no_classifier_is_taken(tmp_path):
    from tests.helpers import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "llama")
    argv = two_vits(tmp_path)
    argv[3] = str(tmp_path / "llama")
    with pytest.raises(ValueError, match="cannot load the teacher"):
        loaded(tmp_path, *argv)


def test_a_timm_teacher_fails_without_saying_what_to_install(tmp_path):
    try:
        import timm  # noqa: F401

        pytest.skip("timm is installed")
    except ImportError:
        pass
    (tmp_path / "timm").mkdir()
    config = {"architecture": "resnet18", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 8, 8], "tag": "x"}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    argv = two_vits(tmp_path)
    argv[3] = str(tmp_path / "timm")
    with pytest.raises(ImportError, match="timm"):
        loaded(tmp_path, *argv)


def test_options_of_a_base_are_refused():
    assert {"alpha", "beta", "temperature", "weight", "label_weight", "warmup", "standardize"} == set(
        options_of(CHOICES["dkd"])
    )
    assert {"layers", "projector", "weight", "label_weight", "warmup", "shapes"} == set(options_of(CHOICES["fitnet"]))
    assert options_of(CHOICES["none"]) == {}
    assert json.loads(ObjectiveConfig("dkd", {"beta": 2.0}).objective_options) == {"beta": 2.0}, "from YAML"


def test_a_cached_teacher_meets_pictures_that_it_was_not_asked_about(tmp_path):
    from hf_distill.teachers import cache_teacher

    fixed = ["--augmentation", "crop_flip", "--fixed_augmentation", "--objective", "kd", "--max_steps", "2"]
    argv = two_vits(tmp_path, *fixed)
    setup, args, config = loaded(tmp_path, *argv)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    cache_teacher(trainer.teacher, trainer, tmp_path / "cache", mode="logits")
    argv[3] = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="is cached, and --augmentation crop_flip draws other pictures"):
        loaded(tmp_path, *[flag for flag in argv if flag != "--fixed_augmentation"])
    setup, args, config = loaded(tmp_path, *argv)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    trainer.train()
    assert teacher_scores(trainer)[0].keys() == {"accuracy", "macro_f1", "cross_entropy", "ece"}
    setup, args, config = loaded(tmp_path, *argv, "--seed", "7", "--save_strategy", "no", run="other")  # other draws
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    with pytest.raises(ValueError, match="an augmentation draws something else: seed it per example"):
        trainer.train()


def test_a_held_out_split_that_numbers_its_classes_otherwise_is_measured_wrongly():
    def rows(names):
        kind = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["a", "b"], "label": ["no", "yes"]}, features=kind)

    train, held_out, names = labelled(rows(["no", "yes"]), rows(["yes", "no"]))
    assert names == ["no", "yes"] and list(train["labels"]) == list(held_out["labels"]) == [0, 1]
