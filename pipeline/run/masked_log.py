"""The process between a worker's standard error and its log: it copies standard input to standard output, and masks
secrets as they pass.

A process of its own, which outlives a killed worker or command, so that a log is complete and never holds a secret.
"""

import contextlib
import os

from stages.system.secrets import secret_values


def main() -> None:
    # a reader of the error stream of a killed command must not wait for a worker that is stopped
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    secrets = sorted({value.encode() for _, value in secret_values()}, key=len, reverse=True)
    held, chunk = b"", b" "
    while chunk:
        chunk = os.read(0, 1 << 16)
        text = held + chunk
        for secret in secrets:
            text = text.replace(secret, b"***")
        count = max((_overlap(text, secret) for secret in secrets), default=0) if chunk else 0
        held = text[len(text) - count :]
        with contextlib.suppress(OSError), open(1, "wb", closefd=False) as log:  # a full disk must not stop the worker
            log.write(text[: len(text) - count])


def _overlap(text: bytes, secret: bytes) -> int:
    """How many bytes at the end of `text` may be the beginning of `secret`."""
    return next((n for n in range(min(len(secret) - 1, len(text)), 0, -1) if text.endswith(secret[:n])), 0)


if __name__ == "__main__":
    main()
