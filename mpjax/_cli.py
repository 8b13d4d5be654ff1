"""The command `mpjax`: what is installed, and which hardware is known."""

import argparse
from collections.abc import Sequence

from ._console import print_table
from ._doctor import HEADER, describe, sections
from ._target import targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: The words after `mpjax`; None takes those of the process.
    """
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpjax", description="Mixed precision and quantization for Flax."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, what each mode becomes here, kernels, extras",
        description="Says what is installed, what the hardware at hand multiplies, what each "
        "quantization mode becomes on it, and which kernels are used or why not.",
    )
    doctor.set_defaults(run=_doctor)
    listed = commands.add_parser(
        "targets",
        help="the hardware that target= knows by name",
        description="Lists the hardware that target= knows: the 8 bits that auto8 becomes, what it "
        "multiplies and how fast, its memory and bandwidth. The figures are the vendors', of one "
        "chip, and of one core of a CPU.",
    )
    listed.add_argument("--sources", action="store_true", help="where the figures are from")
    listed.set_defaults(run=_targets)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    del options
    for title, rows in sections():
        print_table(title, rows)
    return 0


def _targets(options: argparse.Namespace) -> int:
    print_table("Targets", [HEADER, *map(describe, targets())])
    if options.sources:
        sources = [(each.name, each.source) for each in targets()]
        print_table("Sources", [("target", "source"), *sources])
    return 0
