"""Keeping secrets of the environment out of files and messages: passwords, tokens and keys, found by variable name.

Configs take them as ``${oc.env:NAME}``. What a run writes (``resolved.yaml``, stamps, what trackers are told) holds
that text again in place of the value, so that another process finds the value in its own environment; what it says (log
lines, errors) holds ``<NAME>``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
import urllib.parse
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

NAMES = re.compile(r"KEY(?!BOARD)|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PASS$|_PWD$", re.IGNORECASE)
"""A variable whose name holds one of these holds a secret."""

SHORTEST = 6
"""Characters of the shortest value that counts: shorter ones (``1``, ``true``) stand everywhere by chance."""

LONG_LINE = 16
"""Characters from which one line of a value of several lines, such as a private key, counts by itself."""

_read: dict[str, str] = {}
"""Values that a config asked for under a secret's name, however short: from value to variable."""


def remember(name: str, value: str) -> None:
    """Count ``value``, which a config read from the variable ``name``, as a secret if the name says so."""
    if NAMES.search(name) and len(value) > 2:
        _read[value] = name


def known_secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return from every secret value to its variable's name, the longest value first.

    Args:
        environ: default: this process's environment and what ``remember`` was told.
    """
    found = dict(_read) if environ is None else {}
    for name, value in (os.environ if environ is None else environ).items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            found[value] = name
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def redact(text: str) -> str:
    """Return ``text`` with ``<NAME>`` in place of every secret, also where it stands quoted, as JSON or in a URL."""
    for value, name in known_secrets().items():
        for form in _forms(value):
            if form in text:
                text = text.replace(form, f"<{name}>")
    return text


def _forms(value: str) -> list[str]:
    """Return how a value may be written, the longest first."""
    quoted = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    quoted += [repr(value)[1:-1], urllib.parse.quote(value, safe=""), urllib.parse.quote(value)]
    lines = [line for line in value.splitlines() if len(line) >= LONG_LINE]
    return sorted({value, *quoted, *lines}, key=len, reverse=True)


def veil(content: Any) -> Any:
    """Return plain values with ``${oc.env:NAME}`` in place of every secret; in the keys of mappings ``<NAME>``.

    Args:
        content: mappings, sequences, texts; everything else comes back as it is.
    """
    secrets = known_secrets()
    return _veil(content, secrets) if secrets else content


def _veil(content: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(content, str):
        for value, name in secrets.items():
            content = content.replace(value, f"${{oc.env:{name}}}")
        return content
    if isinstance(content, Mapping):
        return {redact(key) if isinstance(key, str) else key: _veil(item, secrets) for key, item in content.items()}
    if isinstance(content, list | tuple):
        items = [_veil(item, secrets) for item in content]
        return tuple(items) if isinstance(content, tuple) else items
    return content


def veil_arguments(arguments: Iterable[str]) -> list[str]:
    """Return command-line arguments in which secrets that the shell filled in are interpolations again."""
    parts = [text.partition("=") for text in arguments]
    return [f"{key}{equals}{veil(value)}" for key, equals, value in parts]


def keep_secrets() -> None:
    """Redact every log record, warning and uncaught error of this process from now on; calling it again is harmless.

    Records are redacted where they are made, so that handlers which appear later get them redacted too.
    """
    if getattr(logging.getLogRecordFactory(), "keeps_secrets", False):
        return
    make = logging.getLogRecordFactory()

    def factory(*arguments: Any, **options: Any) -> logging.LogRecord:
        return redact_record(make(*arguments, **options))

    factory.keeps_secrets = True  # type: ignore[attr-defined]  # a function may carry a mark
    logging.setLogRecordFactory(factory)
    show = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: redact(show(*arguments, **options))
    if sys.excepthook is sys.__excepthook__:  # a debugger or a notebook has its own
        sys.excepthook = _say_uncaught
    threading.excepthook = lambda end: _say_uncaught(end.exc_type, end.exc_value, end.exc_traceback)


def redact_record(record: logging.LogRecord) -> logging.LogRecord:
    """Return a log record whose message and traceback hold no secret."""
    try:
        said = record.getMessage()
    except (TypeError, ValueError, KeyError):  # a wrong format: logging itself reports it
        said = str(record.msg)
    kept = redact(said)
    if kept != said:
        record.msg, record.args = kept, None
    if record.exc_info and record.exc_info[1] is not None:
        told = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if redact(told) != told:
            record.exc_text = redact(told)  # formatters take it in place of the traceback
            record.exc_info = None
    return record


def _say_uncaught(
    kind: type[BaseException], error: BaseException | None, where: TracebackType | None
) -> None:  # pragma: no cover - runs in processes that end
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, where))))
