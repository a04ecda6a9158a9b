"""A sparse feed-forward block beside the dense one with the same active FLOPs, forward and backward, as experts grow.

    python -m benchmarks.bench_moe        # CPU, under a minute

512 tokens, width 256, top-2 of E experts of inner width 256: the dense block's inner width is 512. `routed` is our
block of `students.routed`, `transformers` Qwen3-MoE's, both through grouped_mm; `transformers, eager` loops over
experts. The dense block does not grow with E, so its ratio is what sparsity costs beyond the arithmetic: routing,
sorting, smaller products and the traffic of E experts' gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock

from benchmarks.harness import Report, Variant, interleave, keep_memory, loglog_slope, parser
from benchmarks.toy import quiet
from hf_distill.students.routed import RoutedFFN

TOKENS, WIDTH, INNER, TOP_K = 512, 256, 256, 2
EXPERTS = (4, 16, 64)
TARGETS = {4: 1.3, 16: 2.1, 64: 4.0}  # times the dense block, grouped_mm on a CPU
SLOPE = 0.45
CLOCK = "process CPU time, one thread"
DENSE, OURS = "dense", "routed"


def config_of(experts: int, kernel: str) -> Qwen3MoeConfig:
    config = Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    config.routing = {"num_experts": experts, "top_k": TOP_K}
    config._experts_implementation = kernel
    return config


def block_of(name: str, experts: int) -> nn.Module:
    config = config_of(experts, "eager" if "eager" in name else "grouped_mm")
    if name == DENSE:
        block = Qwen3MoeMLP(config, intermediate_size=TOP_K * INNER)
    elif name == OURS:
        block = RoutedFFN(config, Qwen3MoeMLP(config, intermediate_size=INNER))
    else:
        block = Qwen3MoeSparseMoeBlock(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def step_of(block: nn.Module, tokens: int, repeats: int) -> Callable[[], None]:
    """Forward and backward, `repeats` times; gradients of weights and input, written anew each time."""
    torch.manual_seed(1)
    hidden = torch.randn(1, tokens, WIDTH, requires_grad=True)
    upstream = torch.randn(1, tokens, WIDTH)

    def step() -> None:
        for _ in range(repeats):
            block.zero_grad()
            hidden.grad = None
            block(hidden).backward(upstream)

    return step


def measure(
    report: Report, *, rounds: int, repeats: int = 4, tokens: int = TOKENS, experts: tuple[int, ...] = EXPERTS
) -> None:
    names = [DENSE, OURS, "transformers", "transformers, eager"]
    least: dict[str, list[float]] = {name: [] for name in names}
    for count in experts:
        blocks = {name: block_of(name, count) for name in names}
        variants = [Variant(name, step_of(block, tokens, repeats), required=True) for name, block in blocks.items()]
        rows = interleave(variants, rounds=rounds)
        for name in names:
            least[name].append(rows[name]["min"] / rows[DENSE]["min"])
        case = {"experts": count, "top_k": TOP_K, "tokens": tokens, "width": WIDTH, "inner": INNER, "steps": repeats}
        report.add(case, rows, [DENSE], target=TARGETS.get(count))
    slopes = {name: loglog_slope(list(experts), least[name]) for name in names[1:]}
    text = ", ".join(f"{name} {value:.2f}" for name, value in slopes.items())
    facts = {name: {"exponent_of_E": value} for name, value in slopes.items()}
    entry = {"case": {"growth": "times the dense block ~ E^k"}, "facts": facts, "target": SLOPE}
    report.append(entry, f"\nexponent of E (target for {OURS}: {SLOPE}): {text}")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    report = Report("moe", CLOCK, {"rounds": options.rounds, "keeps_memory": keep_memory()})
    measure(report, rounds=options.rounds)
    report.write(options.results)


if __name__ == "__main__":
    main()
