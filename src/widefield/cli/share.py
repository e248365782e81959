"""``widefield share``."""

from __future__ import annotations

import argparse
from pathlib import Path

from widefield.cli._subjects import MODEL_HELP

SUMMARY = "a model as one file, as a folder, or on the Hugging Face Hub, for others to load and use"

_HUB = "hf-hub:"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "target", metavar="TARGET", help="where to write: NAME.safetensors, a folder, or hf-hub:USER/NAME"
    )
    parser.add_argument("--weights", choices=("ema", "model"), help="weights of a run (the average if it has one)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run (best)")
    parser.add_argument("--pretrained", action="store_true", help="download pretrained weights (default: random)")
    parser.add_argument("--license", metavar="NAME", help="for the model card, such as apache-2.0 (not stated)")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown for the model card: data, purpose, limits")
    parser.add_argument("--private", action="store_true", help="make a new repository on the Hub private")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.loading import load, push_to_hub, save

    notes = None if args.notes is None else args.notes.read_text(encoding="utf-8")
    subject = load(args.model, pretrained=args.pretrained, which=args.which, weights=args.weights)
    options = {"license": args.license, "notes": notes}
    if args.target.startswith(_HUB):
        place = push_to_hub(subject, args.target.removeprefix(_HUB), private=args.private, **options)
        args.printer.add(model=subject.name, written=place)
        print(f"wrote {place}")
        return 0
    if args.private:
        raise ValueError(f"--private is for repositories of the Hub (hf-hub:USER/NAME), not for {args.target}.")
    path = save(subject, args.target, **options)
    args.printer.add(model=subject.name, written=path)
    print(f"wrote {path}")
    print(f"widefield predict {path} photos")
    return 0
