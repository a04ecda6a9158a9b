"""The rows and tables of evidence_vision: what is compared with what, on which data, with which choices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks import cifar, classification_tasks
from benchmarks.classification import Row, Table, Task
from benchmarks.evidence_cards import ALONE, ALONE_TIME, JS, KD, NO_TRANSPORT, REVERSE
from hf_distill.baselines import OBJECTIVES
from hf_distill.objectives import Objective
from hf_distill.teachers import MutualKD, PeerTeacher


def baseline(name: str, settings: dict, train) -> Objective:
    given = {"classes": train.with_format(None)["labels"]} if name == "crd" else {}
    return OBJECTIVES[name](**given, **settings)


def of(name: str, *choices: dict, note: str = "", needs_index: bool = False, **settings) -> Row:
    """A row of a baseline; it may choose among `choices`, too."""
    made = partial(baseline, name)
    return Row(name, made, settings, choices=({}, *choices), note=note, needs_index=needs_index)


def mutual(settings: dict, train) -> Objective:
    return MutualKD(**settings)


def peer(task: Task, seed: int) -> PeerTeacher:
    """A larger untrained network, which learns beside the student."""
    return PeerTeacher(cifar.resnet(100 + seed, width=8, blocks=2), name="ResNet-14, width 8, untrained")


def alphas(trainer, task: Task) -> dict[str, float]:
    """What TGeo-KD's controller gives the teacher on images with right and with wrong labels, after training."""
    from hf_distill.methods.tgeo_kd import tgeo_state

    objective, train = trainer.objective, task.train
    means: dict[bool, list[float]] = {True: [], False: []}
    trainer.model.eval()
    with torch.no_grad():
        for start in range(0, len(train) // classification_tasks.VERSIONS, 100):  # the images as they are
            batch = train[start : start + 100]
            theirs = task.teacher({"pixel_values": batch["pixel_values"]}).logits
            ours = trainer.model(batch["pixel_values"]).logits
            alpha = objective.ratio(tgeo_state(ours, theirs, batch["labels"], objective.state["class_average"]))
            for value, noisy in zip(alpha.tolist(), batch["noisy"].tolist(), strict=True):
                means[noisy].append(value)
    return {
        "alpha, right labels": sum(means[False]) / len(means[False]),
        "alpha, wrong labels": sum(means[True]) / len(means[True]),
    }


ALONE_ROW = of("next_token")
TEMPERATURES = tuple({"temperature": t} for t in (1.0, 2.0, 10.0))
KD_ROW = of(
    "kd",
    *TEMPERATURES,
    note="temperature 4, 1, 2 or 10, chosen like the learning rate",
)
COMMON = {ALONE: ALONE_ROW, KD: KD_ROW}


def longer(stretch: float) -> dict[str, Row]:
    """The student alone for about as much CPU time as the slowest row of its table takes."""
    note = f"{stretch:g} times the steps, about the time of the slowest row"
    return {ALONE_TIME: replace(ALONE_ROW, stretch=stretch, note=note)}


BASELINES = (ALONE, KD, ALONE_TIME)
PLD_ROW = Row("pld", choices=({}, {"pld_temperature": 4.0}))
TRG_ROW = Row(
    "trg", settings={"trg_student_layer": "-1", "trg_teacher_layer": "-1"}, choices=({}, {"trg_tau_max": 0.1})
)
TGEO_ROW = Row(
    "tgeo_kd",
    settings={"tgeo_outer_every": 4},
    choices=({}, {"tgeo_controller_lr": 0.005}),
    note="the controller learns at every fourth step, from 10 % of the training set",
)
TGEO_NOISY_ROW = replace(  # at this size the paper's weight decay lets the controller give every sample the same share
    TGEO_ROW, choices=(*TGEO_ROW.choices, {"tgeo_controller_weight_decay": 0.0}), extra=alphas
)
OFA_CHOICES = ({}, {"ofa_eps": [1.5]}, {"ofa_temperature": 4.0})

# what every row of the main table is given beyond its own defaults, and what it may choose
CIFAR_ROWS = (
    COMMON
    | longer(2.2)
    | {
        "forward KL": of("logit_kd", {"temperature": 4.0, "t_squared": True}),
        "KD, standardised logits": of("kd", standardize=True),
        "DKD": of("dkd", {"beta": 2.0}),
        "DKD, standardised logits": of("dkd", standardize=True),
        "DIST": of("dist", {"temperature": 1.0}),
        "NKD": of("nkd", {"temperature": 4.0}),
        "FitNet": of("fitnet", {"weight": 10.0}),
        "AT": of("at"),
        "RKD": of("rkd", {"weight": 0.1}),
        "SP": of("sp", {"weight": 300.0}),
        "CC": of("cc"),
        "CRD": of("crd", needs_index=True, negatives=512, note="512 negatives instead of 16,384"),
        "ReviewKD": of("review", {"weight": 0.1}),
        "ND": Row("nd_loss", choices=({}, {"nd_weight": 0.5}, {"projector": "linear"})),
        "PLD": PLD_ROW,
        "MIX-KD": Row("mix_kd", choices=({}, {"mixup_fraction": 0.5})),
        "TRG": TRG_ROW,
        "TGeo-KD": TGEO_ROW,
        "OFA-KD": Row(
            "ofa_kd", settings={"ofa_stages": [f"hidden_states.{i}" for i in (1, 2, 3)]}, choices=OFA_CHOICES
        ),
        "MaKD": Row(
            "multi_aspect",
            prepare=classification_tasks.with_aspects,
            note="templated answers by class in place of a vision-language model's; it sees no teacher",
        ),
        "MaKD, shuffled answers": Row(
            "multi_aspect",
            prepare=partial(classification_tasks.with_aspects, shuffled=True),
            note="a control: answers of other images",
        ),
    }
)
OFA_UNIFORM = Row("ofa_kd", settings={"ofa_stages": ["uniform"]}, choices=OFA_CHOICES)
HETEROGENEOUS = COMMON | longer(3.3) | {"DKD": CIFAR_ROWS["DKD"], "DIST": CIFAR_ROWS["DIST"], "OFA-KD": OFA_UNIFORM}
AS_KD = "label weight, T² and temperatures are Hinton KD's"
MIXED = {"kd_weight": 0.9, "label_weight": 0.1, "temperature": 4.0, "t_squared": True}
TEXT = (
    COMMON
    | longer(2.5)
    | {
        "DKD": of("dkd", {"beta": 2.0}),
        "DIST": of("dist", {"temperature": 1.0}),
        "PLD": PLD_ROW,
        "LELP": Row("lelp", choices=({}, {"lelp_num_subclasses": 2}, {"lelp_temperature": 2.0})),
        REVERSE: of("logit_kd", *TEMPERATURES, **MIXED, divergence="reverse_kl", note=AS_KD),
        JS: of("logit_kd", *TEMPERATURES, **MIXED, divergence="generalized_jsd", note=AS_KD),
        "SinKD": Row(
            "sinkd",
            choices=({}, {"kd_temperature": 1.0}, {"kd_temperature": 4.0}, {"sinkhorn_scale": 0.03}),
            note="temperature 2, 1 or 4 of its cross-entropy with the teacher, or thirty times the transport, chosen "
            "like the learning rate",
        ),
        NO_TRANSPORT: Row(
            "sinkd", settings={"sinkhorn_weight": 0.0}, like="SinKD", note="a control: SinKD's choices and nothing else"
        ),
    }
)
CIFAR_RATES, ATTENTION_RATES = (2e-3, 5e-3, 1e-2, 2e-2), (5e-4, 1e-3, 2e-3, 4e-3)
OF_SENTENCES = dict(  # at a third of the steps every row is still at chance, so choices get them all
    rates=(1e-3, 2e-3, 4e-3, 8e-3), batch=32, tune_share=1.0, measures=("accuracy", "macro_f1", "agreement")
)
ONLINE = dict(make_teacher=peer, note="beside an untrained ResNet-14 that learns, too")

TABLES = {
    "cifar10": Table("CIFAR-10, 1,600 images", classification_tasks.cifar10, CIFAR_ROWS, 500, CIFAR_RATES),
    "cifar10_vit": Table(
        "CIFAR-10, a ViT student",
        partial(classification_tasks.cifar10, student="ViT, width 48, 4 layers, patch 4"),
        HETEROGENEOUS,
        500,
        ATTENTION_RATES,
    ),
    "cifar10_mixer": Table(
        "CIFAR-10, an MLP student",
        partial(classification_tasks.cifar10, student="MLP-Mixer, width 48, 4 layers, patch 4"),
        HETEROGENEOUS,
        500,
        ATTENTION_RATES,
    ),
    "cifar10_longtail": Table(
        "CIFAR-10 with a long tail",
        partial(classification_tasks.cifar10, tail=0.1),
        COMMON | longer(2.2) | {"RKD": CIFAR_ROWS["RKD"], "TRG": TRG_ROW},
        300,
        CIFAR_RATES,
    ),
    "cifar10_noisy": Table(
        "CIFAR-10 with wrong labels",
        partial(classification_tasks.cifar10, noise=0.4),
        COMMON | longer(2.2) | {"TGeo-KD": TGEO_NOISY_ROW},
        300,
        CIFAR_RATES,
    ),
    "cifar10_online": Table(
        "CIFAR-10, two networks that learn together",
        classification_tasks.cifar10,
        COMMON
        | longer(2.4)
        | {
            "mutual KD": Row("mutual_kd", mutual, {"temperature": 4.0, "t_squared": True}, **ONLINE),
            "BD-KD": Row("bdkd", **ONLINE),
        },
        300,
        CIFAR_RATES,
        measures=("accuracy", "ece", "macro_f1"),
    ),
    "digits_moved": Table(
        "Digits that move",
        classification_tasks.digits,
        COMMON
        | longer(2.8)
        | {
            "KD, moved by hand": Row(
                "kd",
                partial(baseline, "kd"),
                prepare=classification_tasks.moved_by_hand,
                note="8 random shifts of each image by up to 3 pixels, those of the test: told what HARD must find",
            ),
            "HARD": Row("hard_augment", settings={"hard_grid_steps": 0}),
        },
        400,
        ATTENTION_RATES,
        measures=("accuracy", "centred accuracy", "agreement"),
    ),
    "sst2": Table("SST-2", partial(classification_tasks.sentences, name="sst2"), TEXT, 300, **OF_SENTENCES),
    "trec": Table("TREC", partial(classification_tasks.sentences, name="trec"), TEXT, 300, **OF_SENTENCES),
}
