"""MiniPLM: pre-train on what a teacher finds much more likely than a small reference model does.

Both models score every chunk of a corpus once, offline. The fraction with the largest difference is kept, in the
corpus's order, as a data set that any pre-training script reads; students are trained on it by plain next-token
cross-entropy. Easy text is likely under both models and noise under neither, so both go. Only text is handed over: one
scoring serves students of any size, family or tokenizer.

    accelerate launch recipes/miniplm.py --dataset_name ... --teacher_model_name_or_path ... \\
        --reference_model_name_or_path ... --model_name_or_path ... --student_init random

The reference should be trained on text of the same kind that is *not* scored: chunks it has seen look too easy.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save
from torch import Tensor

from hf_distill.curricula.corpus import UNITS, Corpus
from hf_distill.curricula.selection import PER, Scores, score, write_units
from hf_distill.losses import LabelCrossEntropy, SoftCrossEntropy, run_terms
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache.fingerprint import tokenizer_digest
from hf_distill.teachers.cache.store import write_file, write_json
from hf_distill.teachers.frozen import load_teacher
from hf_distill.training import compat

CARD = MethodCard(
    slug="miniplm",
    title="MiniPLM: Knowledge Distillation for Pre-Training Language Models",
    arxiv="2410.17215",
    year=2024,
    kind="data",
    modality="text",
    entry="select",
    citation="""@inproceedings{gu2025miniplm,
  title = {{MiniPLM}: Knowledge Distillation for Pre-Training Language Models},
  author = {Yuxian Gu and Hao Zhou and Fandong Meng and Jie Zhou and Minlie Huang},
  booktitle = {International Conference on Learning Representations}, year = {2025}
}""",
)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SELECTED, FACTS, TENSORS = "selected", "selection.json", "selection.safetensors"
CARD_TEXT = """# A corpus selected by MiniPLM

{kept} of {scored} {unit}, those that {teacher} finds most likely beside {reference}
([arXiv 2410.17215](https://arxiv.org/abs/2410.17215)), in the order of the corpus. Made by hf_distill.
"""
SHOWN = 5  # examples of the highest and lowest scores, with so many characters
CHARACTERS = 300


@dataclass
class MiniPLMConfig:
    """Ratio, score and chunks are those of the paper and its code."""

    miniplm_ratio: float = field(default=0.5, metadata={"help": "Share of the corpus that is kept, in (0, 1]."})
    miniplm_score: str = field(
        default="mean", metadata={"help": "Difference of the mean losses of a unit, or of their sum: mean or sum."}
    )
    miniplm_per: str = field(
        default="token",
        metadata={"help": "Mean per token, or per character (ours): what models of two tokenizers can be compared by."},
    )
    miniplm_unit: str = field(
        default="chunks", metadata={"help": "What is kept or dropped as one: packed chunks, or documents (ours)."}
    )
    miniplm_length: int = field(default=1024, metadata={"help": "Tokens that a model reads at once."})
    miniplm_batch_size: int = field(default=8, metadata={"help": "Chunks, or windows of documents, per forward."})
    miniplm_shard_units: int = field(
        default=512, metadata={"help": "Units per file of scores: what a kill costs each process (ours)."}
    )

    def __post_init__(self):
        if not 0 < self.miniplm_ratio <= 1:
            raise ValueError(f"miniplm_ratio must lie in (0, 1], got {self.miniplm_ratio}")
        choices = {"miniplm_score": ("mean", "sum"), "miniplm_per": PER, "miniplm_unit": UNITS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("miniplm_length", "miniplm_batch_size", "miniplm_shard_units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.miniplm_per == "character" and self.miniplm_unit != "documents":
            raise ValueError('miniplm_per="character" compares texts: set miniplm_unit="documents"')


# ---- pure functions --------------------------------------------------------------------------------------------------
@exactly
def difference_scores(teacher_loss: Tensor, reference_loss: Tensor) -> Tensor:
    """(n,) reference loss minus teacher loss: how much more likely the teacher finds each text.

    Losses may be inf, where a model gives a text probability 0: alone it is the best or the worst score, in both models
    it is the worst, since nothing then speaks for the text.

    Args:
        teacher_loss, reference_loss: (n,) mean -log p of the same texts, in nats.

    Raises:
        ValueError: different shapes, or nan.

    Example:
        >>> difference_scores(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0])).tolist()
        [1.0, 0.0]
    """
    if teacher_loss.shape != reference_loss.shape:
        raise ValueError(
            f"both models must score the same texts, got {tuple(teacher_loss.shape)} losses of the teacher and "
            f"{tuple(reference_loss.shape)} of the reference"
        )
    for name, loss in (("teacher", teacher_loss), ("reference", reference_loss)):
        _refuse_nan(loss, f"the {name}'s losses")
    return (reference_loss - teacher_loss).where(teacher_loss != math.inf, -math.inf)


def select_by_score(scores: Tensor, ratio: float) -> Tensor:
    """(k,) int64 places of the int(ratio · n) highest scores, ascending. Among equal scores the first are kept.

    Raises:
        ValueError: ratio outside (0, 1], nan among the scores, or nothing kept.

    Example:
        >>> select_by_score(torch.tensor([0.1, 0.9, 0.9, 0.9]), 0.5).tolist()
        [1, 2]
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    _refuse_nan(scores, "the scores")
    count = int(ratio * len(scores))
    if count == 0:
        raise ValueError(f"a ratio of {ratio} keeps none of {len(scores)}: raise it, or give more data")
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _refuse_nan(values: Tensor, what: str) -> None:
    if wrong := values.isnan().nonzero().flatten().tolist():
        raise ValueError(f"{what} hold nan, first at {wrong[0]} ({len(wrong)} of {len(values)})")


def sequence_loss(logits: Tensor, labels: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
    """(B,) cross-entropy per sequence over what the mask counts; 0 where it counts nothing.

    Args:
        logits: (B, S, V), of any float dtype.
        labels: (B, S), aligned with the logits: the token that each position predicts.
        mask: (B, S) of 0 and 1. Paper: 0 where the *input* token is padding.
        reduction: "mean" or "sum" over the positions of each sequence.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    return _per_sequence(logits, None, {"loss": LabelCrossEntropy()}, labels, mask, reduction)["loss"]


def vanilla_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor, ratio: float = 0.5
) -> Tensor:
    """The paper's baseline: (1 - ratio) · CE(labels) + ratio · CE(teacher's distribution), at temperature 1.

    Both are means over each sequence's counted positions, then over the batch. Arguments as in `sequence_loss`.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie between 0 and 1, got {ratio}")
    terms = {"label": LabelCrossEntropy(), "kd": SoftCrossEntropy()}
    losses = _per_sequence(student_logits, teacher_logits, terms, labels, mask, "mean")
    return ((1 - ratio) * losses["label"] + ratio * losses["kd"]).mean()


def _per_sequence(student, teacher, terms: dict, labels, mask, reduction: str) -> dict[str, Tensor]:
    weighted = {name: (divergence, 1.0) for name, divergence in terms.items()}
    rows = run_terms(student, teacher, weighted, labels=labels, mask=mask, reduction="none")
    counted = mask.sum(-1).clamp(min=1) if reduction == "mean" else 1
    return {name: values.sum(-1) / counted for name, values in rows.items()}


# ---- the pipeline ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Selection:
    """A selected corpus.

    Attributes:
        dataset: what was kept, in the corpus's order: `input_ids` of packed chunks, or the corpus's own rows.
        indices: (k,) int64, the units that were kept.
        scores: (n,) float64 of all units; nan where there was nothing to predict.
        facts: counts, losses, quantiles of the scores, examples; also in `selection.json`.
        folder: holds `selected` (read it with `datasets.load_from_disk`), `selection.json`, `selection.safetensors`.
    """

    dataset: Dataset
    indices: Tensor
    scores: Tensor
    facts: dict
    folder: Path

    def summary(self) -> str:
        """A few lines for people."""
        f, q = self.facts, self.facts["score_quantiles"]
        lines = [f"kept {f['kept']:,} of {f['scored']:,} {f['config']['miniplm_unit']}: {self.folder / 'selected'}"]
        if f["nothing_to_predict"]:
            lines.append(f"{f['nothing_to_predict']:,} shorter than two tokens were left out")
        for name in ("teacher", "reference"):
            m, done = f[f"{name}_loss"], f["scoring"][name]
            lines.append(f"{name} loss {m['all']:.4f}, of what was kept {m['kept']:.4f} ({f[name]})")
            lines[-1] += f"; {done['tokens_per_second']:,.0f} tokens/s" if done["units"] else "; scored before"
            if zero := f["zero_probability"][name]:
                lines.append(f"the {name} gives {zero:,} of them probability 0")
        lines.append("scores: " + ", ".join(f"{float(share):.0%} {value:.4f}" for share, value in q.items()))
        return "\n".join(lines)


def select(
    data,
    teacher,
    reference,
    config: MiniPLMConfig | None = None,
    output_dir: str | os.PathLike = "runs/miniplm",
    *,
    processing_class=None,
    text_column: str = "text",
    scores_dir: str | os.PathLike | None = None,
    teacher_options: Mapping | None = None,
    reference_options: Mapping | None = None,
    tile_megabytes: int | None = None,
) -> Selection:
    """Score a corpus with two models and keep what the teacher finds most surprisingly likely.

    Scores stand in `scores_dir` by model and corpus: a killed call goes on, another ratio or reference reads what is
    there. Under `accelerate launch` processes share the shards. One model at a time is in memory, if named by path.

    Args:
        data: see `Corpus`: a Dataset or IterableDataset of texts or `input_ids`, or text files.
        teacher, reference: Hub ids, folders, models or Teachers; with the same tokenizer unless `miniplm_per` is
            "character". The reference should not have seen the data.
        processing_class: the tokenizer of models that bring none.
        scores_dir: `<output_dir>/scores` by default.
        teacher_options, reference_options: of `FrozenTeacher.from_pretrained`: dtype, load_in_4bit, revision…
        tile_megabytes: see `score`.

    Raises:
        ValueError: tokenizers that differ; data that does not fit, or has changed since it was scored; nothing kept.
    """
    config, folder = config or MiniPLMConfig(), Path(output_dir)
    options = {"teacher": dict(teacher_options or {}), "reference": dict(reference_options or {})}
    models = {"teacher": _model(teacher, options["teacher"]), "reference": _model(reference, options["reference"])}
    tokenizers = {name: _tokenizer_of(model, options[name]) or processing_class for name, model in models.items()}
    layout = {"unit": config.miniplm_unit, "length": config.miniplm_length, "text_column": text_column}
    corpus = Corpus(data, tokenizers["teacher"], **layout)
    if config.miniplm_per == "token":
        _check_same_tokenizer(tokenizers, corpus)
    names, scores = {}, {}
    for name in ("teacher", "reference"):
        model = load_teacher(models.pop(name), **options[name])
        names[name] = model.name
        scores[name] = score(
            model,
            corpus,
            scores_dir or folder / "scores",
            per=config.miniplm_per,
            batch_size=config.miniplm_batch_size,
            shard_units=config.miniplm_shard_units,
            tile_megabytes=tile_megabytes,
        )
        del model
        gc.collect()
    state = PartialState()
    if state.is_main_process:
        _write_selection(corpus, scores, names, config, folder)
    state.wait_for_everyone()
    return load_selection(folder)


def load_selection(folder: str | os.PathLike) -> Selection:
    """What `select` left in a folder."""
    folder = Path(folder)
    tensors = load_file(folder / TENSORS)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return Selection(load_from_disk(str(folder / SELECTED)), tensors["indices"], tensors["scores"], facts, folder)


def retokenised(dataset: Dataset, tokenizer, student_tokenizer, length: int) -> Dataset:
    """Selected chunks for a student with another tokenizer: at most `length` of its tokens each.

    The documents of a chunk are decoded, encoded anew and joined by the student's end token.

    Args:
        dataset: rows of `input_ids` of `tokenizer`.
    """

    def convert(batch: dict) -> dict:
        rows = []
        for ids in batch["input_ids"]:
            ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
            parts = [ids[a:b] for a, b in zip([0, *(i + 1 for i in ends)], [*ends, len(ids)], strict=True)]
            texts = tokenizer.batch_decode(parts)
            encoded = student_tokenizer(texts, add_special_tokens=False)["input_ids"]
            joined = [token for part in encoded for token in (*part, student_tokenizer.eos_token_id)]
            rows.append(joined[:-1][:length])
        return {"input_ids": rows}

    return dataset.map(convert, batched=True, remove_columns=dataset.column_names)


def _model(given, options: dict):
    return given if isinstance(given, (str, os.PathLike)) else load_teacher(given, **options)


def _tokenizer_of(model, options: dict):
    if isinstance(model, Teacher):
        return model.tokenizer
    known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    return compat.load_processing_class(os.fspath(model), **known)


def _check_same_tokenizer(tokenizers: dict, corpus: Corpus) -> None:
    ours, theirs = tokenizers["teacher"], tokenizers["reference"]
    if ours is None or theirs is None or tokenizer_digest(ours) == tokenizer_digest(theirs):
        return
    texts = [corpus.text(unit) for unit in corpus.first()]
    if ours.get_vocab() != theirs.get_vocab() or ours(texts)["input_ids"] != theirs(texts)["input_ids"]:
        raise ValueError(
            "teacher and reference have different tokenizers, so their losses per token cannot be compared: take a "
            'reference with the teacher\'s tokenizer, or set miniplm_unit="documents" and miniplm_per="character"'
        )


# ---- what is written -------------------------------------------------------------------------------------------------
def _write_selection(corpus: Corpus, scores: dict[str, Scores], names: dict, config: MiniPLMConfig, folder: Path):
    teacher, reference = scores["teacher"], scores["reference"]
    if teacher.content != reference.content:
        raise ValueError("the corpus changed between the two scorings: delete the older scores, and score again")
    losses = {name: s.losses(config.miniplm_score) for name, s in scores.items()}
    scored = ~losses["teacher"].isnan() & ~losses["reference"].isnan()
    places = scored.nonzero().flatten()
    if not len(places):
        raise ValueError(f"no unit of the corpus has two tokens or more ({len(scored)} units): nothing can be scored")
    differences = torch.full_like(losses["teacher"], torch.nan)
    differences[places] = difference_scores(*(losses[name][places] for name in ("teacher", "reference")))
    kept = places[select_by_score(differences[places], config.miniplm_ratio)]
    order = places[differences[places].sort(stable=True).indices]
    shown = {"highest": order[-SHOWN:].flip(0).tolist(), "lowest": order[:SHOWN].tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    seen = {i for ids in shown.values() for i in ids}
    card = CARD_TEXT.format(kept=len(kept), scored=len(places), unit=config.miniplm_unit, **names)
    texts = write_units(
        corpus,
        kept,
        folder / SELECTED,
        content=teacher.content,
        shard_units=config.miniplm_shard_units,
        shown=seen,
        card=card,
    )
    facts = {
        **names,
        "config": asdict(config),
        "units": len(scored),
        "scored": len(places),
        "nothing_to_predict": len(scored) - len(places),
        "kept": len(kept),
        "predicted": {"all": int(teacher.counts.sum()), "kept": int(teacher.counts[kept].sum())},
        "zero_probability": {name: int(loss.isinf().sum()) for name, loss in losses.items()},
        "score_quantiles": _quantiles(differences[places]),
        "scoring": {name: s.done for name, s in scores.items()},
        "examples": {
            which: [{"unit": i, "score": _plain(differences[i].item()), "text": texts[i][:CHARACTERS]} for i in ids]
            for which, ids in shown.items()
        },
    }
    for name, loss in losses.items():
        facts[f"{name}_loss"] = {"all": _finite_mean(loss[places]), "kept": _finite_mean(loss[kept])}
    tensors = {f"{name}_loss": loss for name, loss in losses.items()} | {"scores": differences, "indices": kept}
    write_file(folder / TENSORS, save(tensors))
    write_json(folder / FACTS, facts)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _finite_mean(values: Tensor) -> float:
    return _plain(values[values.isfinite()].mean().item())


def _quantiles(scores: Tensor) -> dict[str, float]:
    finite = scores[scores.isfinite()].numpy()
    return {str(q): float(np.quantile(finite, q)) for q in QUANTILES} if len(finite) else {}
