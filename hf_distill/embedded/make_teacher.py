"""Train the embedded tokenizer and teacher from nothing, on one CPU core in 72 minutes.

    python -m hf_distill.embedded.make_teacher --minutes 72

The teacher is a small Llama that continues Python source. It learns from the train split of `corpus.py`, is watched on
validation and judged on test.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_distill.embedded.corpus import SPLITS, stdlib_documents

HERE = Path(__file__).parent
VOCABULARY = 2048
END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 512


@dataclass(frozen=True)
class Stage:
    """A share of the budget with windows of one length, under its own warm-up and cosine."""

    window: int
    batch: int
    share: float
    rate: float  # of the peak learning rate


# Short windows see more text per second; without the second stage the teacher is lost past the 256th token.
STAGES = (Stage(window=256, batch=8, share=0.8, rate=1.0), Stage(window=CONTEXT, batch=4, share=0.2, rate=0.5))

# A line break takes the indentation that follows it; words, digits and punctuation take one space before them.
SOURCE_PATTERN = r"(?:\r?\n)+[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text comes back exactly, indentation and any Unicode included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SOURCE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """save_pretrained, under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def epochs(documents: list[list[int]], stage: Stage, seed: int):
    """Batches (batch, window + 1) without end: each epoch in a new order, packed, cut into windows at a new offset."""
    generator = random.Random(seed + stage.window)
    while True:
        order = generator.sample(documents, len(documents))
        stream = torch.tensor([token for document in order for token in document])
        windows = stream[generator.randrange(stage.window) :].unfold(0, stage.window + 1, stage.window)
        for rows in torch.tensor(generator.sample(range(len(windows)), len(windows))).split(stage.batch):
            if len(rows) == stage.batch:
                yield windows[rows]


def new_teacher(tokenizer: PreTrainedTokenizerFast, dropout: float, **shape) -> LlamaForCausalLM:
    shape = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=704) | shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=None,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    for layer in model.model.layers:  # Llama has no residual dropout; several passes over a small corpus want one
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(lambda module, _, output: F.dropout(output, dropout, module.training))
    return model


@torch.no_grad()
def cross_entropy(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    """Nats per token over each document alone, end of document included, its first token not."""
    model.eval()
    total, tokens = 0.0, 0
    for document in documents:
        for start in range(0, len(document) - 1, CONTEXT):
            ids = torch.tensor(document[start : start + CONTEXT + 1])
            total += F.cross_entropy(model(ids[None, :-1]).logits[0].float(), ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
    model.train()
    return total / tokens


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up for the first 3 % of the stage, then a cosine to 2 % of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def optimizer_for(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: Tensor, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, readme: str) -> None:
    """The whole folder in bfloat16, complete before it takes the place of the one before."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(fresh)
    save_tokenizer(tokenizer, fresh)
    (fresh / "model.safetensors").chmod(0o644)
    (fresh / "README.md").write_text(readme)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def card(model: LlamaForCausalLM, figures: dict) -> str:
    c = model.config
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""\
# The embedded teacher

A small Llama that continues Python source: {model.num_parameters() / 1e6:.2f}M parameters, hidden {c.hidden_size}, \
{c.num_hidden_layers} layers, {c.num_attention_heads} heads, intermediate {c.intermediate_size}, \
context {c.max_position_embeddings}, tied embeddings, bfloat16. It is the default teacher of the demo and of recipes \
run without flags, and good for nothing else.

Trained from nothing by `python -m hf_distill.embedded.make_teacher` on the train split of \
`hf_distill/embedded/corpus.py`: the sources of CPython's standard library (PSF licence), split by module. \
Cross-entropy is in nats per token of its own tokenizer, on modules that were not trained on; the standard library of \
another Python version gives slightly different numbers.

| | |
|---|---|
{rows}
"""


def train(model, documents, stage: Stage, arguments, say) -> str:
    """One stage to the end of its share of the budget; `say` is called now and then. Returns what was done."""
    optimizer = optimizer_for(model, arguments.weight_decay)
    started = last = time.monotonic()
    steps, recent = 0, []
    for batch in epochs(documents, stage, arguments.seed):
        elapsed = time.monotonic() - started
        if arguments.steps:
            progress = steps / (stage.share * arguments.steps)
        else:
            progress = elapsed / (stage.share * 60 * arguments.minutes)
        if progress >= 1:
            break
        peak = stage.rate * arguments.learning_rate
        recent.append(step(model, optimizer, batch, learning_rate(progress, peak)))
        steps += 1
        if steps % 50 == 0:
            speed = steps * stage.batch * stage.window / elapsed
            print(f"{progress:6.1%} step {steps} loss {sum(recent) / len(recent):.4f} {speed:.0f} tokens/s", flush=True)
            recent.clear()
        if time.monotonic() - last > 60 * arguments.save_minutes:
            say("unfinished")
            last = time.monotonic()
    tokens = steps * stage.batch * stage.window
    return f"{tokens:,} tokens ({steps} steps of {stage.batch} × {stage.window}) in {elapsed:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="Folder that gets tokenizer/ and teacher/.")
    parser.add_argument("--minutes", type=float, default=72.0, help="Wall-clock budget; the schedule follows it.")
    parser.add_argument("--steps", type=int, help="Budget in steps instead, for a run that repeats exactly.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save_minutes", type=float, default=5.0, help="How often the teacher so far is saved.")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    texts = {split: [d["text"] for d in stdlib_documents(split)] for split in SPLITS}
    save_tokenizer(train_tokenizer(texts["train"]), arguments.output / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "tokenizer")
    model = new_teacher(tokenizer, arguments.dropout).train()
    run(model, tokenizer, texts, STAGES, [], arguments)


def run(model, tokenizer, texts: dict, stages: tuple[Stage, ...], done: list[str], arguments) -> None:
    """Train through the stages, saving; `done` says what stages before these did."""
    documents = {split: encode(tokenizer, some) for split, some in texts.items()}
    tokens = {split: sum(map(len, some)) for split, some in documents.items()}
    print("tokens", tokens, flush=True)

    def keep(state: str) -> None:
        split = "test" if state == "finished" else "validation"
        loss = cross_entropy(model, documents[split])
        figures = {
            f"cross-entropy on {split} modules": f"{loss:.4f}",
            "perplexity": f"{math.exp(loss):.3f}",
            "state": state,
            **{f"stage {number}": words for number, words in enumerate(done, start=1)},
            "threads": arguments.threads,
            "tokens in the train split": f"{tokens['train']:,}",
            "characters per token on test modules": f"{sum(map(len, texts['test'])) / tokens['test']:.3f}",
            "flags": f"seed {arguments.seed}, learning rate {arguments.learning_rate}, dropout {arguments.dropout}, "
            f"weight decay {arguments.weight_decay}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        }
        save(model, tokenizer, arguments.output / "teacher", card(model, figures))
        print(f"saved, {state}: {split} {loss:.4f}", flush=True)

    for stage in stages:
        done = [*done, train(model, documents["train"], stage, arguments, keep)]
        print(done[-1], flush=True)
    keep("finished")


if __name__ == "__main__":
    main()
