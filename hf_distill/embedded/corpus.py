"""Real text that every machine has: the sources of Python's own standard library, split by module.

A module (or a package with all it holds) is in exactly one split, decided by a hash of its name, so a test module is
new to a model trained on the train split, whichever CPython (3.11 or later) trained it. Sources differ a little between
versions of Python, and with them the numbers measured on them.
"""

import hashlib
import sysconfig
import tokenize
from functools import cache
from pathlib import Path

SPLITS = ("train", "validation", "test")
PIECE_CHARACTERS = 2000
# Third-party code, tests, other programs, and tables that are data rather than source.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
LEFT_OUT |= {"ensurepip", "pydoc_data", "encodings"}
LEFT_OUT_FILES = {"html/entities.py", "locale.py", "mimetypes.py", "stringprep.py"}
SALT = "b"  # of a few tried, one with which no large package dominates the small splits


def split_of(module: str) -> str:
    """The split of a top-level module: 84 of 100 names train, 6 validate, 10 test.

    That is 89, 3 and 8 % of CPython 3.11's characters. A module and its pure-Python twin (`datetime`, `_pydatetime`) go
    together, since code moves between the two from version to version.
    """
    name = module.removeprefix("_py").lstrip("_")
    bucket = int.from_bytes(hashlib.sha256(f"{SALT}{name}".encode()).digest()[:4], "big") % 100
    return "train" if bucket < 84 else "validation" if bucket < 90 else "test"


def stdlib_documents(split: str, max_characters: int | None = None) -> list[dict]:
    """Pieces of source of at most 2000 characters, cut at line ends, in a fixed order that mixes the modules.

    The start of a split is a fair sample of it. A line longer than a piece loses its end.

    Args:
        split: "train", "validation" or "test".
        max_characters: stop before the piece that would exceed this many characters in all. None takes the whole split.

    Returns:
        Documents `{"module": ..., "text": ...}`.

    Example:
        >>> stdlib_documents("test", max_characters=5000)[0].keys()
        dict_keys(['module', 'text'])
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    documents, characters = [], 0
    for module, text in _pieces(Path(sysconfig.get_paths()["stdlib"]), split):
        characters += len(text)
        if max_characters is not None and characters > max_characters:
            break
        documents.append({"module": module, "text": text})
    return documents


def stdlib_dataset(split: str, max_characters: int | None = None):
    """`stdlib_documents` as a `datasets.Dataset` with the columns module and text."""
    from datasets import Dataset

    return Dataset.from_list(stdlib_documents(split, max_characters))


@cache
def _pieces(root: Path, split: str) -> tuple[tuple[str, str], ...]:
    keyed = []
    for name, source in _sources(root):
        module = name.split("/")[0].removesuffix(".py")
        if split_of(module) == split:
            for index, text in enumerate(_cut(source)):
                order = hashlib.sha256(f"{name}:{index}".encode()).digest()
                keyed.append((order, module, text))
    return tuple((module, text) for _, module, text in sorted(keyed))


@cache
def _sources(root: Path) -> tuple[tuple[str, str], ...]:
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        module = relative.parts[0].removesuffix(".py")
        generated = not module.isidentifier() or module.startswith("_sysconfigdata")
        if generated or LEFT_OUT.intersection(relative.parts) or name in LEFT_OUT_FILES:
            continue
        try:
            with tokenize.open(path) as file:
                found.append((name, file.read()))
        except (SyntaxError, UnicodeDecodeError):  # a file that is not text in its declared encoding
            continue
    if not found:
        raise FileNotFoundError(
            f"no Python sources under {root}: this Python ships its standard library compiled only. "
            "Use a Python with its .py files, or give a dataset of your own."
        )
    return tuple(found)


def _cut(source: str) -> list[str]:
    pieces, piece = [], ""
    for line in source.splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE_CHARACTERS:
            pieces.append(piece)
            piece = ""
        piece += line[:PIECE_CHARACTERS]
    return [piece for piece in [*pieces, piece] if piece.strip()]
