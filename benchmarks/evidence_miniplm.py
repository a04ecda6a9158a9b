"""Evidence for MiniPLM: students trained for equal tokens on all of a corpus, a random half, and the selected half.

    python -m benchmarks.evidence_miniplm --data DIR --seeds 3       # DIR holds wikitext2, tinyshakespeare and gsm8k
    python -m benchmarks.evidence_miniplm --cards                    # rewrite model_cards/miniplm.md from the results

Four kinds of text (with Python's own sources) are cut into chunks and split: one part trains the teacher, a small one
the reference, a third is the corpus that is scored. A second table mixes chunks of noise into the corpus. Every
finished run is kept under runs/, so that a killed command goes on, and processes may share the seeds (--seed_list).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.evidence_cards import CARDS, begun, fill
from benchmarks.evidence_lm import model
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from benchmarks.toy import quiet
from hf_distill.evaluation.comparison import Run, paired, picture
from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.methods.miniplm import MiniPLMConfig, Selection, select
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher

WORK = ROOT / "runs" / "evidence" / "miniplm"
ALL, RANDOM, KEPT, DROPPED = "all of the corpus", "a random half", "MiniPLM's half", "the other half (control)"
ROWS = (ALL, RANDOM, KEPT, DROPPED)
DOMAINS = ("wikipedia", "shakespeare", "arithmetic", "python")
TABLES = {"plain": "Four kinds of text", "noisy": "Four kinds of text and noise"}
MEAN, TEACHERS = "mean of four", "teacher's own text"
SHARES = {"teacher": 0.5, "reference": 0.08, "corpus": 0.36, "validation": 0.02, "test": 0.04}


@dataclass
class Plan:
    """Sizes of a study; the tests run a smaller one."""

    characters: int = 1_050_000  # of each kind of text at most
    block: int = 64
    vocabulary: int = 1024
    teacher: tuple[int, int] = (192, 4)  # width, layers
    reference: tuple[int, int] = (64, 2)
    student: tuple[int, int] = (96, 2)
    teacher_steps: int = 700
    reference_steps: int = 300
    steps: int = 200
    batch: int = 16
    tune_share: float = 0.2
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    noise: float = 0.4  # share of the noisy corpus
    noise_seen: float = 0.15  # share of what teacher and reference are trained on


# ---- data ------------------------------------------------------------------------------------------------------------
def documents(data: Path, characters: int) -> dict[str, list[str]]:
    """Texts of each kind, in an order that mixes them, up to so many characters."""
    from hf_distill.embedded.corpus import stdlib_documents

    def pieces(path: Path) -> list[str]:
        text = path.read_text(encoding="utf-8")
        return [text[i : i + 1500] for i in range(0, len(text), 1500)]

    rows = map(json.loads, (data / "gsm8k" / "train_1000.jsonl").read_text(encoding="utf-8").splitlines())
    found = {
        "wikipedia": pieces(data / "wikitext2" / "valid.txt"),
        "shakespeare": pieces(data / "tinyshakespeare" / "input.txt"),
        "arithmetic": [f"{row['question']}\n{row['answer']}" for row in rows],
        "python": [d["text"] for d in stdlib_documents("train", max_characters=characters)],
    }
    for texts in found.values():
        random.Random(0).shuffle(texts)
        while sum(map(len, texts)) > characters:
            texts.pop()
    return found


def chunks(tokenizer, texts: list[str], block: int) -> Tensor:
    """(n, block + 1) tokens; documents are joined by the end token."""
    stream = [i for ids in tokenizer(texts)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    return torch.tensor(stream[: len(stream) // (block + 1) * (block + 1)]).reshape(-1, block + 1)


def noise_like(rows: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Half of the rows with their tokens shuffled, half of uniformly drawn tokens."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(rows.shape, generator=draw).argsort(1)
    made = rows.gather(1, order)
    made[1::2] = torch.randint(3, vocabulary, made[1::2].shape, generator=draw)
    return made


@dataclass
class Parts:
    """All chunks: `kinds` say what each row of the corpus is (the number of its domain, or -1: noise)."""

    tokenizer: object
    train: dict[str, Tensor]
    corpora: dict[str, tuple[Tensor, Tensor]]
    validation: Tensor
    tests: dict[str, Tensor]


def parts_of(data: Path, plan: Plan) -> Parts:
    texts = documents(data, plan.characters)
    split: dict[str, dict[str, list[str]]] = {name: {} for name in SHARES}
    for domain, own in texts.items():
        first = 0.0
        for name, share in SHARES.items():
            split[name][domain] = own[int(first * len(own)) : int((first + share) * len(own))]
            first += share
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    seen = [text for own in split["teacher"].values() for text in own]
    tokenizer = tokenizer.train_new_from_iterator(seen, plan.vocabulary, show_progress=False)
    rows = {name: {d: chunks(tokenizer, t, plan.block) for d, t in by.items()} for name, by in split.items()}
    train = {}
    for seed, name in enumerate(("teacher", "reference")):
        clean = torch.cat(list(rows[name].values()))
        count = int(len(clean) * plan.noise_seen / (1 - plan.noise_seen))
        some = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))[:count]
        train[name] = torch.cat([clean, noise_like(clean[some], plan.vocabulary, seed)])
    clean = torch.cat(list(rows["corpus"].values()))
    kinds = torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows["corpus"].values())])
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(2))
    clean, kinds = clean[order], kinds[order]
    cut = int(plan.noise * len(clean))
    noisy, noisy_kinds = clean.clone(), kinds.clone()
    spoilt = torch.randperm(len(clean), generator=torch.Generator().manual_seed(3))[:cut]
    noisy[spoilt], noisy_kinds[spoilt] = noise_like(clean[spoilt], plan.vocabulary, 3), -1
    corpora = {"plain": (clean, kinds), "noisy": (noisy, noisy_kinds)}
    return Parts(tokenizer, train, corpora, torch.cat(list(rows["validation"].values())), rows["test"])


# ---- training --------------------------------------------------------------------------------------------------------
def trained(net: LlamaForCausalLM, rows: Tensor, rate: float, steps: int, batch: int, seed: int) -> LlamaForCausalLM:
    """AdamW with a warm-up and a cosine to a tenth, as in the paper; epochs in an order drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), eta_min=rate / 10)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warm_up])
    epochs = -(-steps * batch // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=draw) for _ in range(epochs)])
    net.train()
    for step in range(steps):
        ids = rows[order[step * batch : (step + 1) * batch]]
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.eval()


@torch.no_grad()
def cross_entropy(net: LlamaForCausalLM, rows: Tensor) -> float:
    """Nats per token."""
    total = 0.0
    for part in rows.split(64):
        logits = net(part, use_cache=False).logits[:, :-1]
        total += observe(logits, None, {"ce": LabelCrossEntropy()}, labels=part[:, 1:])["ce"].double().sum().item()
    return total / rows[:, 1:].numel()


@torch.no_grad()
def written_by(teacher: LlamaForCausalLM, tokenizer, length: int, count: int) -> Tensor:
    """(count, length) tokens that the teacher writes after an end token, at temperature 1."""
    torch.manual_seed(0)
    start = torch.full((count, 1), tokenizer.eos_token_id)
    return teacher.generate(
        start, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length - 1, min_new_tokens=length - 1,
        attention_mask=torch.ones_like(start), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


# ---- the study -------------------------------------------------------------------------------------------------------
class Study:
    """One data folder and plan: models, selections and runs, each made once and kept."""

    def __init__(self, data: Path, plan: Plan, work: Path):
        self.plan, self.work = plan, work
        work.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(vars(plan)))
        path = work / "plan.json"
        if path.is_file() and json.loads(path.read_text()) != asked:
            raise ValueError(f"{work} holds rows of another plan: remove it, or give another folder with --work")
        path.write_text(json.dumps(asked))
        self.parts = parts_of(data, plan)
        self.teacher = self._made("teacher", plan.teacher, plan.teacher_steps)
        self.reference = self._made("reference", plan.reference, plan.reference_steps)
        own = written_by(self.teacher, self.parts.tokenizer, plan.block + 1, 8 * plan.batch)
        self.tests = self.parts.tests | {TEACHERS: own}
        self.selections = {}

    def _made(self, name: str, shape: tuple[int, int], steps: int) -> LlamaForCausalLM:
        folder = self.work / name
        if not (folder / "config.json").is_file():
            net = model(self.parts.tokenizer, *shape, seed=0)
            trained(net, self.parts.train[name], 2e-3, steps, self.plan.batch, seed=0).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder).eval()

    def selected(self, table: str) -> Selection:
        if table not in self.selections:
            data = Dataset.from_dict({"input_ids": self.parts.corpora[table][0].tolist()})
            named = {"teacher": self.teacher, "reference": self.reference}
            models = (FrozenTeacher(m, self.parts.tokenizer, name=name) for name, m in named.items())
            config = MiniPLMConfig(miniplm_length=self.plan.block, miniplm_batch_size=64, miniplm_shard_units=2048)
            self.selections[table] = select(data, *models, config, self.work / table)
        return self.selections[table]

    def rows_of(self, table: str, row: str, seed: int) -> Tensor:
        """What a row is trained on."""
        rows, kept = self.parts.corpora[table][0], self.selected(table).indices
        if row == RANDOM:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 + seed))
            return rows[order[: len(kept)].sort().values]
        other = torch.ones(len(rows), dtype=torch.bool)
        other[kept] = False
        return {ALL: rows, KEPT: rows[kept], DROPPED: rows[other]}[row]

    def run(self, table: str, row: str, rate: float, seed: int, *, tuning: bool = False) -> dict:
        """One student; kept in a file."""
        path = self.work / "runs" / f"{table}-{ROWS.index(row)}-{rate:g}-{seed}{'-tuning' * tuning}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        plan = self.plan
        steps = max(1, round(plan.steps * plan.tune_share)) if tuning else plan.steps
        busy = time.process_time()
        net = model(self.parts.tokenizer, *plan.student, seed=seed)
        net = trained(net, self.rows_of(table, row, seed), rate, steps, plan.batch, seed)
        run = Run(row, rate, seed, steps, cpu_seconds=time.process_time() - busy)
        run.validation = cross_entropy(net, self.parts.validation)
        if not tuning:
            run.test = self.measured(net)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{time.monotonic_ns()}.part")
        part.write_text(json.dumps(run.record()), encoding="utf-8")
        part.replace(path)
        print(f"{table}: {row}, rate {rate:g}, seed {seed}: validation {run.validation:.4f}", flush=True)
        return run.record()

    def measured(self, net: LlamaForCausalLM) -> dict[str, float]:
        found = {name: cross_entropy(net, rows) for name, rows in self.tests.items()}
        return {MEAN: statistics.mean(found[d] for d in DOMAINS)} | found

    def rate_of(self, table: str, row: str) -> float:
        tried = {rate: self.run(table, row, rate, 0, tuning=True)["validation"] for rate in self.plan.rates}
        return min(tried, key=tried.get)

    def result(self, seeds: list[int], command: str, tables: Sequence[str] = tuple(TABLES)) -> dict:
        """All of these tables; run what is missing."""
        runs = {t: {row: [] for row in ROWS} for t in tables}
        for table in tables:
            for seed in seeds:
                for row in ROWS:
                    runs[table][row].append(self.run(table, row, self.rate_of(table, row), seed))
        return {
            "plan": vars(self.plan),
            "teacher": self.measured(self.teacher) | {"parameters": self.teacher.num_parameters()},
            "reference": self.measured(self.reference) | {"parameters": self.reference.num_parameters()},
            "student_parameters": model(self.parts.tokenizer, *self.plan.student, seed=0).num_parameters(),
            "chunks": {k: len(v) for k, v in self.parts.train.items()}
            | {"corpus": len(self.parts.corpora["plain"][0])},
            "kept": {table: self._kept(table) for table in tables},
            "command": command,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "tables": runs,
        }

    def _kept(self, table: str) -> dict[str, float]:
        """Of each kind: its share of the corpus and of what was kept, and its mean score."""
        kinds, made = self.parts.corpora[table][1], self.selected(table)
        found = {}
        for number, name in enumerate((*DOMAINS, "noise")):
            own = kinds == (-1 if name == "noise" else number)
            if own.any():
                share = own[made.indices].double().mean().item()
                found[name] = [own.double().mean().item(), share, made.scores[own].mean().item()]
        return found


# ---- the card --------------------------------------------------------------------------------------------------------
def write_cards(results: Path, cards: Path = CARDS) -> None:
    """Fill model_cards/miniplm.md from evidence_miniplm.json."""
    path = results / "evidence_miniplm.json"
    result, card = json.loads(path.read_text(encoding="utf-8")), cards / "miniplm.md"
    if not card.is_file():
        card.write_text(begun("miniplm"), encoding="utf-8")
    rows = {t: {r: [Run(**run) for run in runs] for r, runs in by.items()} for t, by in result["tables"].items()}
    both = {f"{r}, {t}": runs for t, by in rows.items() for r, runs in by.items()}
    labels = {MEAN: "mean over four kinds of text (nats), lower", TEACHERS: "text written by the teacher, lower"}
    picture(both, result["teacher"], str(cards / "evidence_miniplm.png"), "Cross-entropy on held-out text", labels)
    fill(card, "\n\n".join([_setting(result), *(_table(result, rows[t], t) for t in rows), _made(result)]))


def _setting(result: dict) -> str:
    plan, count = result["plan"], result["chunks"]
    sizes = {n: f"{result[n]['parameters']:,} parameters, {result[n][MEAN]:.4f}" for n in ("teacher", "reference")}
    return (
        "**Set-up.** Wikipedia (wikitext2), Shakespeare, arithmetic problems (gsm8k) and Python's own sources, at most "
        f"{plan['characters']:,} characters each, in chunks of {plan['block'] + 1} tokens of a tokenizer made for them "
        f"(vocabulary {plan['vocabulary']:,}), split by pieces of up to 2,000 characters (neighbours may be apart): "
        f"{count['teacher']:,} chunks train the teacher, "
        f"{count['reference']:,} the reference (both with {plan['noise_seen']:.0%} noise), {count['corpus']:,} are the "
        f"corpus that is scored. Teacher: {sizes['teacher']} nats per token on test text; reference: "
        f"{sizes['reference']}; student: {result['student_parameters']:,} parameters, untrained. Every student sees "
        f"{plan['steps']} batches of {plan['batch']} chunks, less than one pass over a half; same initialisation per "
        f"seed; learning rate one of {', '.join(f'{r:g}' for r in plan['rates'])}, chosen on validation text with seed "
        f"0 and {plan['tune_share']:.0%} of the steps. Text written by the teacher is drawn at temperature 1."
    )


def _table(result: dict, rows: dict[str, list[Run]], table: str) -> str:
    measures, lines, noise = (MEAN, *DOMAINS, TEACHERS), [f"### {TABLES[table]}"], result["plan"]["noise"]
    if table == "noisy":
        lines += [
            f"{noise:.0%} of the corpus's chunks are noise: tokens shuffled, or drawn uniformly; no test text is."
        ]
    lines += ["", "| row | learning rate | " + " | ".join(measures) + " |", "|---" * (2 + len(measures)) + "|"]
    for row, runs in rows.items():
        cells = [_mean([run.test[m] for run in runs]) for m in measures]
        lines.append(f"| {row} | {runs[0].learning_rate:g} | {' | '.join(cells)} |")
    shares = [
        f"{kind} {before:.1%} → {after:.1%} (mean score {score:+.3f})"
        for kind, (before, after, score) in result["kept"][table].items()
    ]
    lines += ["", "Share of the corpus → share of what was kept: " + ", ".join(shares) + "."]
    lines += ["", "**In short.** " + " ".join(_verdict(rows, beside) for beside in (RANDOM, ALL, DROPPED))]
    lines += ["", "Mean paired difference ± standard error (below 0: MiniPLM's half is better).", ""]
    lines += ["| MiniPLM's half beside | " + " | ".join(measures) + " |", "|---" * (1 + len(measures)) + "|"]
    for beside in (RANDOM, ALL, DROPPED):
        found = [paired(rows, KEPT, beside, m) for m in measures]
        cells = [f"{p.mean:+.4f} ± {p.standard_error:.4f}, {p.verdict}" for p in found]
        lines.append(f"| {beside} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(rows: dict[str, list[Run]], beside: str) -> str:
    found = paired(rows, KEPT, beside, MEAN)
    said = {"beats": "beats", "loses to": "**loses to**", "not told apart": "**does not beat**"}[found.verdict]
    seeds = len(found.values)
    return f"Over {seeds} seeds it {said} {beside} ({found.mean:+.4f} ± {found.standard_error:.4f} nats)."


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def _made(result: dict) -> str:
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    return (
        f"![rows](evidence_miniplm.png)\n\n`{result['command']}` · {where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} threads · {installed} · commit {result['commit']}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per set")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--seed_list", type=int, nargs="+", help="only these, for processes side by side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of trained models and finished runs")
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    if not options.cards:
        if options.data is None or not (options.data / "wikitext2").is_dir():
            parser.error(f"--data must name a folder that holds wikitext2/, got {options.data}")
        torch.set_num_threads(1)
        quiet()
        study = Study(options.data, Plan(), options.work)
        seeds = list(range(options.seeds)) if options.seed_list is None else options.seed_list
        command = f"python -m benchmarks.evidence_miniplm --data DIR --seeds {options.seeds}"
        options.results.mkdir(parents=True, exist_ok=True)
        for last in range(1, len(TABLES) + 1):  # what is finished is there
            result = study.result(seeds, command, list(TABLES)[:last])
            text = json.dumps(rounded(result), indent=1, ensure_ascii=False)
            (options.results / "evidence_miniplm.json").write_text(text + "\n", encoding="utf-8")
    write_cards(options.results)


if __name__ == "__main__":
    main()
