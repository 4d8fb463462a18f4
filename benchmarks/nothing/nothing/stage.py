"""What a `nothing` stage does."""

from typing import Any


def run(context: Any) -> dict[str, Any]:
    """Publish one empty file."""
    (context.out / "nothing").touch()
    return {}
