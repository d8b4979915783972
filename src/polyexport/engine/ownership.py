"""Who made an export: this user, who may unpickle it, or somebody else.

A folder that was begun here has a seal of its path, made with a key in the user's cache folder.
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
    """A seal that shows later that this user began the export in `folder`; empty if no key can be stored."""
    key = _key()
    return hmac.new(key, os.fsencode(os.path.realpath(folder)), hashlib.sha256).hexdigest() if key else ""


def is_ours(folder: Path, sealed: str) -> bool:
    """Whether `sealed` was made by this user for this folder at its present path."""
    expected = seal(folder)
    return bool(expected) and hmac.compare_digest(expected, sealed)


def _key() -> bytes:
    """This user's key, made on first use; empty if it cannot be stored."""
    file = user_cache_path("polyexport") / "key"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        made = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # only one process can create it
        with os.fdopen(made, "wb") as opened:
            opened.write(secrets.token_bytes(32))
    try:
        return file.read_bytes()
    except OSError:
        return b""
