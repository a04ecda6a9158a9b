"""The command `hf-distill`."""

from __future__ import annotations

import argparse


def methods(_: argparse.Namespace) -> None:
    """Print every method, those of installed packages included."""
    from hf_distill.methods import cards

    for card in cards():
        paper = f"arXiv {card.arxiv}" if card.arxiv else str(card.year)
        origin = "" if not card.module else f"  [{card.module.split('.')[0]}]"
        print(f"{card.slug:18s} {card.kind:10s} {card.modality:12s} {paper:18s} {card.title}{origin}")


def main(argv: list[str] | None = None) -> None:
    from hf_distill import __version__

    parser = argparse.ArgumentParser(prog="hf-distill", description="Knowledge distillation for Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list the methods").set_defaults(run=methods)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
