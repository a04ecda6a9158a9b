"""Peak memory of the loss against rows, vocabulary and teachers; every point is a fresh process.

    python -m benchmarks.bench_memory                  # CPU: resident memory above the inputs; about four minutes
    python -m benchmarks.bench_memory --device cuda    # torch's own count

Forward KL, forward and backward. A point's peak is what one call adds above inputs and heads, the two gradients
included. What must not grow with the rows is the peak beyond the gradients and our budget for a tile.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import MIB, ROOT, Absent, Report, loglog_slope, parser, reason, slope
from benchmarks.loss_variants import ENGINES, VARIANTS, Inputs, make_inputs, ours

CPU = dict(rows=1024, vocabulary=16384, teachers=1, student_hidden=128, teacher_hidden=256, tile_bytes=16 * MIB)
CUDA = CPU | dict(rows=4096, vocabulary=151936, student_hidden=896, teacher_hidden=3584, tile_bytes=1024 * MIB)
SWEEPS = {
    "rows": (512, 1024, 2048, 4096),
    "vocabulary": (8192, 16384, 32768, 65536),
    "teachers": (1, 2, 4),
}
CUDA_SWEEPS = SWEEPS | {"rows": (2048, 4096, 8192, 16384), "vocabulary": (32768, 65536, 131072, 262144)}
OURS = [name for name in VARIANTS if name.startswith("ours")]
ONE_CALL_EACH = "ours, one call per teacher"
# freed tiles go back to the system at once, instead of hiding in the allocator
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def variants_of(sweep: str) -> list[str]:
    if sweep == "rows":
        return list(VARIANTS)
    return ["naive", "ours (eager)"] + ([ONE_CALL_EACH] if sweep == "teachers" else [])


# ---- one point, in a process of its own -----------------------------------------------------------------------------
def teachers_of(inputs: Inputs, count: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and head of each teacher; those after the first are copies, which cost the same memory."""
    first = inputs.teacher_hidden, inputs.teacher_head
    return [first] + [tuple(x.clone() for x in first) for _ in range(count - 1)]


def naive_mixture(inputs: Inputs, teachers: list) -> Tensor:
    log_q = (inputs.student_hidden @ inputs.student_head.T).float().log_softmax(-1)
    with torch.no_grad():
        p = sum((hidden @ head.T).float().softmax(-1) for hidden, head in teachers) / len(teachers)
    return torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


def our_mixture(inputs: Inputs, teachers: list, tile_bytes: int) -> Tensor:
    try:
        from hf_distill.signals import MixtureLogits
    except ImportError as error:
        raise Absent("this version has no mixture of teachers") from error
    from hf_distill.losses import ForwardKL, HeadLogits, run_terms

    parts = tuple(HeadLogits(hidden, head) for hidden, head in teachers)
    weights = torch.full((len(parts),), 1 / len(parts), device=inputs.labels.device)
    student = HeadLogits(inputs.student_hidden, inputs.student_head)
    terms = {"kl": (ForwardKL(), 1.0)}
    return run_terms(student, MixtureLogits(parts, weights), terms, tile_bytes=tile_bytes)["kl"]


def step_of(point: dict, inputs: Inputs) -> Callable[[], object]:
    """One forward and backward pass, giving its gradients."""
    variant, tile_bytes = point["variant"], point["tile_bytes"]
    if point["sweep"] != "teachers":
        if variant in OURS:
            engine = ENGINES[OURS.index(variant)]
            return lambda: inputs.gradients(ours(inputs, "fKL", engine, tile_bytes=tile_bytes))
        return lambda: inputs.gradients(VARIANTS[variant](inputs, "fKL"))
    teachers = teachers_of(inputs, point["teachers"])
    if variant == "naive":
        return lambda: inputs.gradients(naive_mixture(inputs, teachers))
    if variant == "ours (eager)":
        return lambda: inputs.gradients(our_mixture(inputs, teachers, tile_bytes))

    def one_call_each():
        for hidden, head in teachers:
            single = Inputs(*inputs.trained, hidden, head, inputs.labels)
            (ours(single, "fKL", tile_bytes=tile_bytes) / len(teachers)).backward()
        for x in inputs.trained:
            x.grad = None

    return one_call_each


def peak_of(point: dict) -> dict:
    """{"peak", "gradients"} in bytes, or {"absent": why}."""
    torch.set_num_threads(1)
    device = point["device"]
    sizes = {k: point[k] for k in ("rows", "vocabulary", "student_hidden", "teacher_hidden")}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(**sizes, device=device, dtype=dtype)
    try:
        step = step_of(point, inputs)
        step()  # compiles, loads kernels
        gc.collect()
        before = _reset_peak(device)
        kept = step()
        peak = _peak(device) - before
        del kept
    except Exception as error:
        if point["variant"] == "ours (eager)" and not isinstance(error, Absent) and point["sweep"] != "teachers":
            raise
        return {"absent": reason(error)}
    return {"peak": peak, "gradients": sum(x.numel() * x.element_size() for x in inputs.trained)}


def _reset_peak(device: str) -> int:
    """Bytes in use now; from here on the high-water mark is counted anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Absent(f"this system cannot reset a process's high-water mark ({error})") from error
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Absent(f"/proc/self/status has no {field}")


def in_a_process(point: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.bench_memory", "--point", json.dumps(point)]
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["killed"])[-1]
        if point["variant"] == "ours (eager)":
            raise RuntimeError(f"{point} failed:\n{done.stderr}")
        return {"absent": f"exit code {done.returncode}: {error}"[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- all points -----------------------------------------------------------------------------------------------------
def fit_of(sweep: str, points: list[dict]) -> dict:
    """Growth of the peak, and of what lies beyond gradients and tile; below a MiB it counts as one."""
    x = [p[sweep] for p in points]
    beyond = [max(p["beyond"], MIB) for p in points]
    return {
        "peak_exponent": loglog_slope(x, [p["peak"] for p in points]),
        "beyond_exponent": loglog_slope(x, beyond),
        "beyond_bytes_each": slope(x, beyond),
    }


def measure(report: Report, sweeps: dict, base: dict, *, device: str = "cpu", variants=None) -> None:
    """One case per sweep and variant; `variants` names those wanted, None takes all."""
    chosen = [(s, v) for s in sweeps for v in variants_of(s) if variants is None or v in variants]
    bar = tqdm(total=sum(len(sweeps[sweep]) for sweep, _ in chosen), unit="process", disable=None)
    for sweep, variant in chosen:
        points, absent = [], None
        for size in sweeps[sweep]:
            point = base | {"sweep": sweep, "variant": variant, "device": device, sweep: size}
            found = in_a_process(point)
            bar.update()
            if "absent" in found:
                absent = found["absent"]
                break
            budget = point["tile_bytes"] if variant.startswith("ours") else 0
            beyond = found["peak"] - found["gradients"] - budget
            points.append({sweep: size, **found, "tile_budget": budget, "beyond": beyond})
        case = {"sweep": sweep, "variant": variant, **{k: v for k, v in base.items() if k != sweep}, "device": device}
        entry = {"case": case, "absent": absent} if absent else {"case": case, "points": points}
        if len(points) > 1 and not absent:
            entry["fit"] = fit_of(sweep, points)
        report.append(entry, text_of(entry))
    bar.close()


def text_of(entry: dict) -> str:
    sweep, name = entry["case"]["sweep"], f"{entry['case']['sweep']:10} {entry['case']['variant']:26}"
    if "absent" in entry:
        return f"{name} absent: {entry['absent']}"
    sizes = "  ".join(f"{p[sweep]}: {p['peak'] / MIB:.0f} ({p['beyond'] / MIB:+.0f})" for p in entry["points"])
    if "fit" not in entry:
        return f"{name} {sizes}"
    exponent, each = entry["fit"]["beyond_exponent"], entry["fit"]["beyond_bytes_each"]
    return f"{name} {sizes}  beyond ~ {sweep}^{exponent:.2f}, {each:,.0f} B each"


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--sweeps", nargs="+", choices=tuple(SWEEPS), default=tuple(SWEEPS))
    options.add_argument("--variants", nargs="+", help="default: all of each sweep")
    options.add_argument("--point", help="run one point (JSON) in this process and print its peak")
    options = options.parse_args(argv)
    if options.point:
        print(json.dumps(peak_of(json.loads(options.point))))
        return
    cuda = options.device == "cuda"
    base, all_sweeps = (CUDA, CUDA_SWEEPS) if cuda else (CPU, SWEEPS)
    sweeps = {name: all_sweeps[name] for name in options.sweeps}
    clock = "torch.cuda.max_memory_allocated" if cuda else "VmHWM above VmRSS before the call"
    report = Report(f"memory_{options.device}", clock, base | {"sweeps": sweeps})
    print("MiB at the peak above the inputs, in brackets beyond gradients and our tile budget", flush=True)
    measure(report, sweeps, base, device=options.device, variants=options.variants)
    report.write(options.results)


if __name__ == "__main__":
    main()
