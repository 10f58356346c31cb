"""Structured logs: a JSON object on each line of standard error."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from danqing.escaping import escape, escape_json

if TYPE_CHECKING:
    from danqing.serve.jobs import Job


class JsonLines(logging.Formatter):
    """One object a line: when, how grave, what, and whatever the row knows."""

    def __init__(self, *, prompts: bool) -> None:
        """Keep whether prompts may be written."""
        super().__init__()
        self._prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "row", {}),
        }
        if not self._prompts:
            row.pop("prompt", None)
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        row = {name: round(one, 4) if isinstance(one, float) else one for name, one in row.items()}
        return escape_json(json.dumps(row, ensure_ascii=False, default=str))


class _Escaped(io.TextIOBase):
    """Standard error for what is no log line: gradio prints tracebacks that quote its clients."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without what could control a terminal."""
        self._stream.write(escape(text))
        return len(text)

    def flush(self) -> None:
        """Pass on."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the stream's own."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Say whether a person reads it."""
        return self._stream.isatty()


def set_up(*, prompts: bool) -> None:
    """Let the server's logs, and uvicorn's, go to standard error as JSON.

    Args:
        prompts: write what people asked for, too.
    """
    handler = logging.StreamHandler(sys.stderr)
    sys.stderr = _Escaped(sys.stderr)
    handler.setFormatter(JsonLines(prompts=prompts))
    for name, level in (
        ("danqing.serve", logging.INFO),
        ("uvicorn", logging.WARNING),
        ("asyncio", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def about(job: Job, **more: object) -> dict[str, Any]:
    """Return what a log line says of a job, for `extra`."""
    row = {"job": job.id, "client": job.client, "model": job.order.model}
    if job.order.user is not None:
        row["user"] = job.order.user
    return {"row": {**row, "prompt": job.order.request.prompt, **more}}
