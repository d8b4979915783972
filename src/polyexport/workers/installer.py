"""uv, which installs the packages of toolchains, and the package indexes that it takes them from."""

from __future__ import annotations

import os
import shutil

from polyexport.errors import ToolMissing


def uv() -> str:
    """Path of uv, which installs packages.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
        if found is None:
            raise ToolMissing("uv is not installed; `pip install uv`") from None
        return found


_INDEXES = {
    "PIP_INDEX_URL": "UV_INDEX_URL",
    "PIP_EXTRA_INDEX_URL": "UV_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
}


def pip_indexes() -> dict[str, str]:
    """Pip's variables under uv's names, so that a private index keeps working; uv's own win.

    They are set in the environment, not on the command line: an index's URL may have a password, and other users of the
    machine can read command lines.
    """
    found = {uvs: " ".join(os.environ.get(pips, "").split()) for pips, uvs in _INDEXES.items()}
    # uv separates folders by commas, pip by spaces
    found["UV_FIND_LINKS"] = found["UV_FIND_LINKS"].replace(" ", ",")
    return {name: value for name, value in found.items() if value and name not in os.environ}
