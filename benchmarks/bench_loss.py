"""Forward and backward of each loss, from hidden states and heads to both gradients: ours beside its peers.

    python -m benchmarks.bench_loss              # CPU: float32, V 32,768, N 512; about four minutes
    python -m benchmarks.bench_loss --large      # CPU: V 151,936, forward KL
    python -m benchmarks.bench_loss --device cuda

The floor is the matrix products of an exact gradient alone (3 of the student, 1 of the teacher), into reused buffers.
Freed memory is kept (--system_allocator: given back and asked for again, as C does by default).
The gradient's relative error is against float64, on fewer rows of the same heads.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Absent, Report, Variant, interleave, keep_memory, parser, reason
from benchmarks.loss_variants import EAGER, LOSSES, VARIANTS, Floor, Inputs, make_inputs, naive, uses_teacher

BASES = ["floor", "naive", "checkpointed", "TRL chunked", "Liger"]
CPU = dict(vocabulary=32768, rows=512, student_hidden=512, teacher_hidden=1024)
CUDA = dict(vocabulary=151936, rows=4096, student_hidden=896, teacher_hidden=3584)
ERROR_ROWS = 64


def relative_errors(inputs: Inputs, losses: list[str]) -> dict[str, dict[str, float | str]]:
    """{loss: {variant: the larger of the relative errors of d hidden and d head, or why it cannot run}}."""
    few = inputs.of_rows(min(ERROR_ROWS, inputs.labels.shape[0]))
    exact = few.double()
    out: dict[str, dict[str, float | str]] = {}
    for loss in losses:
        truth = exact.gradients(naive(exact, loss))
        out[loss] = {}
        for name, variant in VARIANTS.items():
            try:
                found = few.gradients(variant(few, loss))
            except Exception as error:
                if name == EAGER:
                    raise
                out[loss][name] = reason(error)
                continue
            out[loss][name] = max(((f - t).norm() / t.norm()).item() for f, t in zip(found, truth, strict=True))
    return out


def variants_of(inputs: Inputs, losses: list[str], absent: dict[str, dict]) -> list[Variant]:
    """All losses and variants in one list, so that they take turns; the floor is the same for all with a teacher."""
    out = []
    for teacher in sorted({uses_teacher(loss) for loss in losses}):
        out.append(Variant(_floor_name(teacher), Floor(inputs, teacher), required=True))
    for loss in losses:
        for name, function in VARIANTS.items():

            def run(function=function, loss=loss, why=absent[loss][name]):
                if isinstance(why, str):
                    raise Absent(why)
                inputs.gradients(function(inputs, loss))

            out.append(Variant(f"{loss}: {name}", run, required=name == EAGER))
    return out


def _floor_name(teacher: bool) -> str:
    return "floor with a teacher" if teacher else "floor"


def measure(report: Report, losses: list[str], *, rounds: int, device: str = "cpu", **sizes) -> None:
    """One case per loss, all measured in turns."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(**sizes, device=device, dtype=dtype)
    errors = relative_errors(inputs, losses)  # also compiles what compiles
    # on a CPU nothing else needs a warm-up, and a whole round of all is a minute
    warm_up = device == "cuda"
    rows = interleave(variants_of(inputs, losses, errors), rounds=rounds, warm_up=warm_up, device=device)
    for loss in losses:
        own = {"floor": rows[_floor_name(uses_teacher(loss))]}
        for name in VARIANTS:
            own[name] = rows[f"{loss}: {name}"]
            if "absent" not in own[name]:
                own[name]["gradient_error"] = errors[loss][name]
        case = {"loss": loss, **sizes, "dtype": str(dtype).removeprefix("torch."), "device": device}
        report.add(case, own, BASES)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--large", action="store_true", help="a vocabulary of 151,936 on the CPU")
    options.add_argument("--losses", nargs="+", choices=LOSSES)
    options.add_argument("--system_allocator", action="store_true", help="give freed memory back, as C does by default")
    for name in CPU:
        options.add_argument(f"--{name}", type=int)
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    sizes = dict(CUDA if options.device == "cuda" else CPU | (dict(vocabulary=151936) if options.large else {}))
    sizes |= {name: getattr(options, name) for name in CPU if getattr(options, name) is not None}
    losses = options.losses or (["fKL"] if options.large else list(LOSSES))
    clock = "CUDA events" if options.device == "cuda" else "process CPU time, one thread"
    name = "loss_" + options.device + "_large" * options.large + "_system_allocator" * options.system_allocator
    keeps = not options.system_allocator and keep_memory()
    report = Report(name, clock, {"rounds": options.rounds, "losses": losses, **sizes, "keeps_memory": keeps})
    measure(report, losses, rounds=options.rounds, device=options.device, **sizes)
    report.write(options.results)


if __name__ == "__main__":
    main()
