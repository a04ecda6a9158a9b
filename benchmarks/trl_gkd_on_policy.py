"""By which count are sampled texts divided? TRL's GKD trainer beside DistillSFTTrainer.

    python -m benchmarks.trl_gkd_on_policy          # from the repository's root; CPU, half a minute

Both take one optimizer step on the same prompts with the same models, divergence (generalized JSD, beta 0.5) and
texts: the student's likeliest tokens, up to their end. The mean over the tokens that were sampled is worked out row by
row in float64. With trl 1.16 GKDTrainer divides the sum over the sampled tokens by the number of labels that the data
set's own completions had, so its loss and gradient are `sampled / data set's` times too large; DistillSFTTrainer counts
after sampling.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
BETA, NEW_TOKENS, ROWS = 0.5, 12, 4


def chats() -> list[dict]:
    """Short answers, so that samples are longer."""
    return [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 9} w3"}]}
        for i in range(ROWS)
    ]


def models():
    from tests.helpers import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tiny_llama(16, 2, seed=1), tiny_llama(32, 3, seed=2), tokenizer


def settings(accumulation: int) -> dict:
    from tests.helpers import SGD

    size = ROWS // accumulation
    return SGD | dict(
        max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_length=32
    )


def by_trl(accumulation: int) -> tuple[float, int]:
    """Logged loss, and the count that it was divided by."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = models()
    args = GKDConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=1, lmbda=1.0, beta=BETA, max_new_tokens=NEW_TOKENS, **settings(accumulation),
    )  # fmt: skip
    trainer = GKDTrainer(student, teacher, args, train_dataset=Dataset.from_list(chats()), processing_class=tokenizer)
    trainer.generation_config.do_sample = False
    counts, whole = [], trainer.get_batch_samples

    def counting(*given):
        batches, count = whole(*given)
        counts.append(int(count))
        return batches, count

    trainer.get_batch_samples = counting
    trainer.train()
    return _loss(trainer), counts[0]


def by_ours(accumulation: int) -> tuple[float, int]:
    """Logged loss, and the tokens that were sampled."""
    from datasets import Dataset

    from hf_distill import DistillSFTTrainer, FrozenTeacher, LogitKD
    from tests.helpers import sft_arguments

    student, teacher, tokenizer = models()
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chats()]
    trainer = DistillSFTTrainer(
        student,
        teacher=FrozenTeacher(teacher),
        objective=LogitKD("generalized_jsd", options={"beta": BETA}),
        args=sft_arguments(
            tempfile.mkdtemp(), lmbda=1.0, sampling_temperature=0.0, max_completion_length=NEW_TOKENS,
            **settings(accumulation),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], round(log["on_policy/length"] * ROWS)


def by_hand() -> tuple[float, int]:
    """The mean over the tokens of the student's likeliest texts, and their count: no batch, no cache, float64."""
    import torch

    student, teacher, tokenizer = (part.double().eval() if hasattr(part, "double") else part for part in models())
    total, count = 0.0, 0
    with torch.no_grad():
        for row in chats():
            ids = tokenizer(tokenizer.apply_chat_template(row["messages"][:1], tokenize=False))["input_ids"]
            for _ in range(NEW_TOKENS):
                seen = torch.tensor([ids])
                q, p = (m(seen).logits[0, -1].log_softmax(-1) for m in (student, teacher))
                mixture = (BETA * p.exp() + (1 - BETA) * q.exp()).log()
                total += (BETA * (p.exp() * (p - mixture)) + (1 - BETA) * (q.exp() * (q - mixture))).sum().item()
                count += 1
                ids.append(int(q.argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
    return total / count, count


def _loss(trainer) -> float:
    return next(log["loss"] for log in trainer.state.log_history if "loss" in log)


def main() -> None:
    exact, sampled = by_hand()
    print(f"{'':34} {'loss':>9} {'count':>6} {'loss / exact':>13}")
    print(f"{'by hand, float64':34} {exact:9.6f} {sampled:6d} {1:13.6f}")
    for name, run in (("GKDTrainer", by_trl), ("DistillSFTTrainer", by_ours)):
        for accumulation in (1, 2):
            loss, count = run(accumulation)
            print(f"{name}, {accumulation} micro-batches{'':8} {loss:9.6f} {count:6d} {loss / exact:13.6f}")


if __name__ == "__main__":
    main()
