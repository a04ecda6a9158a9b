"""The card every method file carries, and where all cards are found."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from types import ModuleType

KINDS = ("logits", "features", "relations", "data", "students", "evaluation", "preference")
ENTRIES = ("distill", "select", "evaluate", "generate")


@dataclass(frozen=True)
class MethodCard:
    """What a method is.

    Attributes:
        slug: the file's name, and the recipe's.
        title: the paper's.
        arxiv: its id, "" where it has none.
        year: of first publication.
        kind: where the idea lies, one of KINDS.
        modality: "text", "image", "text-classification", "vision-language"; decides what `testing` checks it on.
        entry: the function that runs it.
        citation: BibTeX.
        couples_batch: why its loss depends on which examples meet in a batch; None when it does not.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    kind: str
    modality: str
    entry: str = "distill"
    citation: str = ""
    couples_batch: str | None = None
    module: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.entry not in ENTRIES:
            raise ValueError(f"entry must be one of {', '.join(ENTRIES)}, got {self.entry!r}")

    def load(self) -> ModuleType:
        """The method's module."""
        return importlib.import_module(self.module or f"hf_distill.methods.{self.slug}")

    def config_class(self) -> type:
        """Its `<Name>Config`."""
        module = self.load()
        found = [
            v
            for k, v in vars(module).items()
            if k.endswith("Config") and getattr(v, "__module__", "") == module.__name__
        ]
        if len(found) != 1:
            raise ValueError(f"{module.__name__} must define exactly one <Name>Config, found {len(found)}")
        return found[0]


def all_cards(slugs: tuple[str, ...]) -> list[MethodCard]:
    """Cards of our own methods and of installed packages' (entry-point group `hf_distill.methods`).

    An entry point names a module with a CARD. One that cannot be imported is an error that names its package.
    """
    cards = [importlib.import_module(f"hf_distill.methods.{slug}").CARD for slug in slugs]
    for point in entry_points(group="hf_distill.methods"):
        try:
            module = point.load()
            cards.append(replace(module.CARD, module=module.__name__))
        except Exception as error:
            owner = point.dist.name if point.dist else point.value
            raise ImportError(f"method {point.name!r} of {owner} cannot be loaded: {error}") from error
    return cards
