"""A version guard for modules that use private or patched parts of a library."""

from importlib import metadata


def require_version(package: str, prefix: str) -> None:
    """Raise ImportError unless the installed version of `package` starts with `prefix`, as 0.4.13 does with 0.4."""
    version = metadata.version(package)
    if not f"{version}.".startswith(f"{prefix}."):
        raise ImportError(f"{package} {version} is not supported, only {prefix}.*; install that version")
