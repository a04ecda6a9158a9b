"""What the teachers' benchmark counts: FLOPs of a step, bytes of a cache, what is left of a teacher."""

import json

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks import bench_teacher, report, teacher_fidelity
from benchmarks.bench_teacher import CACHES, SMALL, Bench, Steps
from benchmarks.harness import Report
from hf_distill import (
    DataCollatorForDistillation,
    EnsembleTeacher,
    FrozenTeacher,
    HeadLogits,
    SparseLogits,
    cache_teacher,
)
from tests.helpers import tiny_llama
from tests.teachers.test_frozen import batch_of

STEP = SMALL["step"]
ROWS = STEP["batch"] * (STEP["length"] - 1)


@pytest.fixture(scope="module")
def flops(tmp_path_factory) -> dict[str, int]:
    bench = Bench(tmp_path_factory.mktemp("caches"), STEP)
    live, wide = bench.trainer(bench.frozen("teacher")), bench.trainer(bench.frozen("wide"))
    trainers = {"labels": bench.trainer(None), "live": live, "wide live": wide}
    trainers |= {name: bench.cached(name, live, options) for name, options in CACHES.items()}
    trainers["wide"] = bench.cached("wide", wide, CACHES["topk 64"])
    teachers = [bench.frozen("member", seed=m) for m in range(4)]
    trainers |= {m: bench.trainer(EnsembleTeacher(teachers[:m])) for m in (1, 2, 4)}
    return {name: Steps(trainer).flops() for name, trainer in trainers.items()}


def test_a_step_from_a_cache_pays_for_the_teacher(flops):
    """0 of its backbone; of its head what the rows cost where they are projected again."""
    head = 2 * ROWS * STEP["vocabulary"] * STEP["teacher"][0]
    assert flops["topk 64"] == flops["sampled 12"] == flops["sampled 50"] == flops["labels"]
    assert flops["hidden bfloat16"] == flops["hidden int8"] == flops["labels"] + head
    assert flops["live"] > flops["labels"] + head


def test_a_step_from_a_topk_cache_grows_with_the_teacher(flops):
    assert flops["wide"] == flops["topk 64"] and flops["wide live"] > 1.5 * flops["live"]


def test_several_teachers_cost_other_than_each_the_same(flops):
    assert flops[4] - flops[2] == 2 * (flops[2] - flops[1]) > 0
    assert flops[1] - (flops[2] - flops[1]) == flops["labels"]


def test_bytes_are_not_those_of_the_format(tmp_path):
    """Row count and first position take 8 bytes of a document, every array is padded to 8."""
    data = Dataset.from_dict({"input_ids": [list(range(3, 36)), list(range(4, 21))]})
    collator = DataCollatorForDistillation(DataCollatorForLanguageModeling(pad_token_id=0))
    teacher, tokens = FrozenTeacher(tiny_llama(16)), 32 + 16

    def measured(name: str, **options) -> float:
        cache = cache_teacher(teacher, data, tmp_path / name, collator=collator, **options)
        return teacher_fidelity.bytes_per_token(cache, tokens) * tokens

    assert measured("hidden", mode="hidden", dtype="bfloat16") == 2 * 8 + tokens * 2 * 16
    assert measured("int8", mode="hidden", dtype="int8") == 2 * 8 + tokens * (16 + 4)
    assert measured("topk", mode="topk", k=8) == 2 * 8 + tokens * 8 * (6 / 8 + 4)  # 64 ids are 6 bits


def test_what_is_left_of_a_teacher_is_compared_wrongly():
    logits = torch.randn(5, 12, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    kept = log_p.topk(3)
    left = teacher_fidelity._log_probs(SparseLogits(kept.indices, kept.values), 12)
    torch.testing.assert_close(left.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    found = teacher_fidelity._compared(log_p, left)
    kl = sum(p * (p.log() - q) for p, q in zip(log_p.exp().flatten(), left.flatten(), strict=True)) / 5
    assert found["kl"] == pytest.approx(kl.item()) and found["agreement"] == 1.0
    same = teacher_fidelity._compared(
        log_p, teacher_fidelity._log_probs(HeadLogits(logits, torch.eye(12).double()), 12)
    )
    assert same["kl"] == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_s_error_is_not_relative_to_it():
    student, batch = tiny_llama(), batch_of()
    rows = len(batch["row_labels"])
    exact = torch.randn(rows, 64)
    gradient = teacher_fidelity.Gradient(student, batch, exact)
    assert gradient.error(exact) == 0.0
    with torch.no_grad():
        logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    own = logits[batch["loss_rows"]]
    assert gradient.error(own) == pytest.approx(1.0, abs=1e-4)  # a teacher that is the student moves nothing


def test_facts_are_not_on_the_teachers_page(tmp_path):
    out = Report("teacher", "process CPU time", {})
    times = {"labels only": {"times": [1.0], "min": 1.0, "median": 1.0, "system": 0.0, "gigaflops": 283.4}}
    out.add({"table": "step"}, times, ["labels only"], fit={"error": 0.01})
    bench_teacher.add_facts(out, {"table": "keeping"}, {"topk": {"bytes": 400.0}, "int8": {"kl": 2e-4}})
    out.write(tmp_path)
    for page in ("performance", "teachers"):
        (tmp_path / f"{page}.md").write_text(f"before {report.START}old{report.END} after")
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "teachers.md").read_text()
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| topk | 400 |  |" in text and "| int8 |  | 0.0002 |" in text and "| 283 |" in text
    assert "Fitted: error 0.01" in text
    assert "make bench" in (tmp_path / "performance.md").read_text()
    assert (tmp_path / "teachers_teacher.png").stat().st_size > 0
    json.loads((tmp_path / "teacher.json").read_text())
