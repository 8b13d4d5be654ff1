"""What the examples end with: each promise, and whether it came true."""

from rich.console import Console


def verdict(console: Console, checks: list[tuple[str, bool]]) -> bool:
    """Prints whether each target was reached; returns whether all were."""
    for text, reached in checks:
        console.print(f"{'reached' if reached else 'MISSED '}  {text}", highlight=False)
    return all(reached for _, reached in checks)
