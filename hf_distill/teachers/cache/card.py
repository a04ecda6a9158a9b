"""The dataset card of a cache."""

from __future__ import annotations

from pathlib import Path

from hf_distill.teachers.cache.store import write_file

TEMPLATE = """---
tags:
- hf_distill
- knowledge-distillation
- teacher-cache
viewer: false
---

# What {name} says

Answers of the teacher `{name}` (revision {revision}) over {examples} examples, kept by
[hf_distill](https://pypi.org/project/hf-distill/) so that students train without the teacher.

| | |
|---|---|
| mode | {mode} |
| settings | {settings} |
| stored rows | {positions} |
| documents | {documents} |
| size | {megabytes:.1f} MB in {shards} shards |

Use it where a teacher goes:

```python
from hf_distill import CachedTeacher, DistillSFTTrainer

teacher = CachedTeacher.from_hub("<this repository>")  # or CachedTeacher("<folder>")
trainer = DistillSFTTrainer("<student>", teacher=teacher, train_dataset=dataset)
```

or on the command line `--teacher_model_name_or_path hf://datasets/<this repository>`. Documents are found by the hash
of their token ids and other inputs: train on the same data, tokenised and cut in the same way.
"""


def write_card(folder: Path, manifest: dict) -> None:
    codec, shards = manifest["codec"], manifest["shards"]
    card = TEMPLATE.format(
        name=manifest["name"],
        revision=manifest["teacher"]["revision"] or "unknown",
        examples=manifest["data"]["examples"],
        mode=codec["mode"],
        settings=", ".join(f"{k} {v}" for k, v in sorted(codec.items()) if k not in ("mode", "values")),
        positions="those that carry loss" if manifest["positions"] == "loss" else "all",
        documents=sum(shard["documents"] for shard in shards),
        megabytes=sum(shard["bytes"] for shard in shards) / 1e6,
        shards=len(shards),
    )
    write_file(folder / "README.md", card.encode())
