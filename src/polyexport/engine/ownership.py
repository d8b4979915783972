"""Whose export it is that lies in a folder: this user's, who may unpickle it, or anybody's.

A folder that was begun here holds a seal of its path, made with a key that lies in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from platformdirs import user_cache_path


def seal(folder: Path) -> str:
    """What proves later that this user began the export in `folder`; empty where no key can be kept."""
    key = _key()
    return hmac.new(key, os.path.realpath(folder).encode(), hashlib.sha256).hexdigest() if key else ""


def is_ours(folder: Path, sealed: str) -> bool:
    """Whether `sealed` was made by this user for this folder, where it lies now."""
    expected = seal(folder)
    return bool(expected) and hmac.compare_digest(expected, sealed)


def _key() -> bytes:
    """This user's key, made when it is first asked for; empty where it cannot be kept."""
    file = user_cache_path("polyexport") / "key"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        made = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # by one process only
        with os.fdopen(made, "wb") as opened:
            opened.write(secrets.token_bytes(32))
    try:
        return file.read_bytes()
    except OSError:
        return b""
