"""`mpjax explain module:function`: a table of what a compiler makes of a user's program."""

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the subcommand to a parser's."""
    parser = commands.add_parser(
        "explain",
        help="what a compiler makes of every product of a program",
        description="Compiles a program for some hardware, which need not be there, and shows "
        "every matrix product: operands, unit, bytes, copies, and why it is not in 8 bits. "
        "FUNCTION takes no arguments and returns the function to compile and the tuple of its "
        "arguments, which may be jax.ShapeDtypeStructs: return model.apply, (variables, x)",
    )
    parser.add_argument("program", metavar="MODULE:FUNCTION", help="found from this folder, too")
    parser.add_argument("--target", help="a name of `mpjax targets`; left out: the device at hand")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--min-flops",
        type=_part,
        metavar="PART",
        help="exit with 1 unless this part of the operations, such as 0.95, is in 8 bits",
    )
    parser.set_defaults(run=run)


def _part(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1, a part of the whole")


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit status."""
    try:
        function, arguments = program_of(options.program)
        from ._compile_target import CompilerLockedError
        from ._explain import explain

        try:
            found = explain(function, *arguments, target=options.target)
        except CompilerLockedError as error:
            raise NotImplementedError(str(error)) from error
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        print(f"mpjax explain: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(found.to_json(indent=2))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        importlib.import_module("rich").print(found)
    else:
        print(found)
    wanted = options.min_flops
    if wanted and found.flops == 0:
        print("the program multiplies nothing, in 8 bits or otherwise", file=sys.stderr)
        return 1
    if wanted is not None and found.share_in_8_bits < wanted:
        part = f"{found.share_in_8_bits:.1%}"
        print(f"{part} of the operations are in 8 bits, less than {wanted:.1%}", file=sys.stderr)
        return 1
    return 0


def program_of(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function to compile and its arguments, which `module:function` returns.

    Raises:
        ImportError: There is no such module.
        TypeError: What the function returns is no pair of a function and a tuple.
        ValueError: The name has another form, or the module has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{name!r} is not of the form module:function, such as train:program")
    if "" not in sys.path:
        sys.path.insert(0, "")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} ({module.__file__}) has no {function_name}()")
    made: Any = function()
    is_pair = isinstance(made, tuple) and len(made) == 2
    if is_pair and callable(made[0]) and isinstance(made[1], tuple):
        return made
    found = type(made).__name__
    if isinstance(made, tuple):
        found = f"({', '.join(type(each).__name__ for each in made)})"
    raise TypeError(
        f"{name} returned {found}, but should return the function to compile and the tuple of its "
        "arguments: return model.apply, (variables, x)"
    )
