"""Fetch the public sets that the evidence is measured on, from where they were published, and check every file.

    make data DATA=DIR              # what is missing or damaged; nothing is fetched twice
    make data DATA=DIR SETS="sst2 trec"

A file counts as right when the digest of its contents is the one that the evidence was measured on (of arrays and
tensors, not of the archive around them). Without a network, or where a source is gone, the command says what is
missing and where it comes from, and ends with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

RAW = os.environ.get("HF_DISTILL_DATA_SOURCE", "https://raw.githubusercontent.com")  # a mirror may stand in
CONVNETJS = "larrabeew/covnetJS/0d2866f3c12431c9044d3f275a588c12dc785926/demo/cifar10"
TREC = "hertz-pj/CNN-text-classification-pytorch/1bc7f1eebbf998b963ecf7485d0cc692a3aae962/data/TREC"
SST2 = "clairett/pytorch-sentiment-classification/457ffd83de90a9d6d472d8ffc31bbffe40a8b236/data/SST2"
TRIES, TIMEOUT = 3, 60.0


@dataclass(frozen=True)
class File:
    """One file of a set.

    Args:
        sources: paths under `RAW`.
        digest: of `contents`.
        made: from the sources' bytes to the file's; the first source as it is by default.
    """

    name: str
    sources: tuple[str, ...]
    digest: str
    made: Callable[..., bytes] = field(default=lambda first, *rest: first)


def first_lines(count: int) -> Callable[[bytes], bytes]:
    return lambda text: b"".join(text.splitlines(keepends=True)[:count])


def trec_table(train: bytes, dev: bytes, test: bytes) -> bytes:
    """Lines `fine question<tab>COARSE` as `COARSE<tab>fine<tab>question`: each question once, none of the test set."""
    seen, rows = {_trec_row(line)[2] for line in test.decode().splitlines() if line.strip()}, []
    for line in (train + b"\n" + dev).decode().splitlines():
        if line.strip():
            row = _trec_row(line)
            if row[2] not in seen:
                rows.append("\t".join(row))
                seen.add(row[2])
    return ("\n".join(rows) + "\n").encode()


def _trec_row(line: str) -> tuple[str, str, str]:
    left, coarse = line.rsplit("\t", 1)
    fine, question = left.split(" ", 1)
    return coarse.strip(), fine, question.strip()


def cifar_arrays(start: int) -> Callable[[bytes, bytes], bytes]:
    """A picture with an image per line of 1,024 pixels, and a script with the list of labels."""

    def made(picture: bytes, script: bytes) -> bytes:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        labels = [int(n) for n in re.search(r"\[([\d,\s]*)\]", script.decode())[1].split(",")]
        out = io.BytesIO()
        images = pixels.reshape(len(pixels), 32, 32, 3)
        np.savez_compressed(out, images=images, labels=np.array(labels[start : start + len(images)], np.uint8))
        return out.getvalue()

    return made


def bare_tensors(checkpoint: bytes) -> bytes:
    """The weights of a torch checkpoint without DataParallel's prefix."""
    state = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)["state_dict"]
    return save({name.removeprefix("module."): tensor.contiguous() for name, tensor in state.items()})


SETS: dict[str, list[File]] = {
    "tinyshakespeare": [
        File(
            "input.txt",
            ("karpathy/char-rnn/d1d7aa34fdb3626174bce1d753e6cc6845ce7087/data/tinyshakespeare/input.txt",),
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    ],
    "wikitext2": [
        File(
            "valid.txt",
            (
                "pytorch/examples/37ce9402ff0cae48d764d7788810fd2ed8238b25/word_language_model/data/wikitext-2/valid.txt",
            ),
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        )
    ],
    "gsm8k": [
        File(
            "train_1000.jsonl",
            ("openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl",),
            "73e81c100d0c321f074b5740e4365cad29bae7577d770d7f9cce722f00b4ff3e",
            first_lines(1000),
        )
    ],
    "sst2": [
        File("train.tsv", (f"{SST2}/train.tsv",), "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920"),
        File("dev.tsv", (f"{SST2}/dev.tsv",), "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359"),
    ],
    "trec": [
        File(
            "train.tsv",
            (f"{TREC}/train.txt", f"{TREC}/dev.txt", f"{TREC}/test.txt"),
            "127a506faaa533015cfd994305b536c70a44bfa8e052126aa0220c0f9850a400",
            trec_table,
        )
    ],
    "cifar10": [
        File(
            f"train_{start:04d}_{start + 999:04d}.npz",
            (f"{CONVNETJS}/cifar10_batch_{start // 1000}.png", f"{CONVNETJS}/cifar10_labels.js"),
            digest,
            cifar_arrays(start),
        )
        for start, digest in (
            (0, "156566483c8ae493d404b5f08bcd6f2cde48c26f0294b3d521f2851f8090751f"),
            (1000, "38dad9bd7518cf31c4f1f07d5a775ad36499f365d9b748ce5b3d66adb2419d2a"),
        )
    ],
    "resnet_cifar10": [
        File(
            "resnet20.safetensors",
            (
                "akamaster/pytorch_resnet_cifar10/66514ca38d5679354766dee91e912d8766bdd227/"
                "pretrained_models/resnet20-12fca82f.th",
            ),
            "cc0db3e8f8de587771b8e81cf49dd722871593d62920e4cff3284deeda9fdb1a",
            bare_tensors,
        )
    ],
    # a choice of 600 examples, their pictures made smaller: not made here from its source
    "nlvr": [
        File("images.npz", (), "c1ae5ecae52a9f1bcc494ed705ae442c18b33340c025e435195794405109430c"),
        File("statements.jsonl", (), "b50f9b65f74a7d93422c2610432ce52d2d40a74a3d0da0439efae295e84fd5c2"),
    ],
}
PREPARED = {"nlvr": "600 development examples of https://github.com/lil-lab/nlvr, pictures at 50 x 200 pixels"}


class FetchError(RuntimeError):
    """A source could not be reached, or what it gave is not what the evidence was measured on."""


def contents(path: Path) -> str:
    """SHA-256 of what a file holds: arrays and tensors by name, type, shape and bytes; other files as they are."""
    digest = hashlib.sha256()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            for name in sorted(arrays.files):
                array = arrays[name]
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    elif path.suffix == ".safetensors":
        with safe_open(path, "numpy") as tensors:
            for name in sorted(tensors.keys()):
                array = tensors.get_tensor(name)
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def state_of(folder: Path, file: File) -> str:
    """`there`, `missing` or `damaged`."""
    path = folder / file.name
    if not path.is_file():
        return "missing"
    try:
        return "there" if contents(path) == file.digest else "damaged"
    except (OSError, ValueError, KeyError):
        return "damaged"


def download(source: str) -> bytes:
    """What lies under a path of `RAW`; tried again after failures that may pass.

    Raises:
        FetchError: naming the address.
    """
    address = f"{RAW}/{source}"
    for again in range(TRIES):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code < 500 or again == TRIES - 1:
                raise FetchError(f"{address} answers {error.code}") from error
        except (OSError, urllib.error.URLError) as error:
            if again == TRIES - 1:
                raise FetchError(f"{address} cannot be reached: {error}") from error
        time.sleep(2**again)
    raise AssertionError("unreachable")


def fetch(name: str, data: Path) -> list[str]:
    """Bring a set into `data/<name>`; returns what is still wrong. A file that is right is left alone."""
    wrong, folder = [], data / name
    for file in SETS[name]:
        state = state_of(folder, file)
        if state == "there":
            continue
        if not file.sources:
            wrong.append(f"{folder / file.name} is {state}: prepared by hand from {PREPARED[name]}")
            continue
        part = (folder / file.name).with_name("part-" + file.name)
        try:
            made = file.made(*map(download, file.sources))
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(made)
            found = contents(part)
            if found != file.digest:
                raise FetchError(
                    f"its digest is {found[:12]}..., expected {file.digest[:12]}...: the source has changed"
                )
            part.replace(folder / file.name)
        except FetchError as error:
            wrong.append(f"{folder / file.name} is {state}: {error}")
        except Exception as error:  # whatever a parser says of a file that is another thing now
            wrong.append(f"{folder / file.name} is {state}: its source has another form now ({error})")
        finally:
            part.unlink(missing_ok=True)
    return wrong


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the sets, one folder each")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), help="default: all")
    options = parser.parse_args(argv)
    wrong = []
    for name in options.sets or SETS:
        found = fetch(name, options.data)
        print(f"{name}: {'there' if not found else '; '.join(found)}", flush=True)
        wrong += found
    if wrong:
        print(f"{len(wrong)} files are missing; methods whose sets are there can be measured", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
