"""Makes packages reproducible: coremltools writes random ids, and maps in random order."""

from __future__ import annotations

import json
import uuid
from pathlib import Path


def settle(package: Path) -> None:
    """Write the model deterministically, and give each file of the package an id derived from its path."""
    from coremltools.proto import Model_pb2

    manifest = package / "Manifest.json"
    about = json.loads(manifest.read_text(encoding="utf-8"))
    entries = about["itemInfoEntries"]
    ids = {drawn: str(uuid.uuid5(uuid.NAMESPACE_OID, entry["path"])).upper() for drawn, entry in entries.items()}
    about["itemInfoEntries"] = {ids[drawn]: entries[drawn] for drawn in sorted(entries, key=ids.__getitem__)}
    about["rootModelIdentifier"] = ids[root := about["rootModelIdentifier"]]
    manifest.write_text(json.dumps(about, indent=4), encoding="utf-8")
    model = Model_pb2.Model()
    file = package / "Data" / entries[root]["path"]
    model.ParseFromString(file.read_bytes())
    file.write_bytes(model.SerializeToString(deterministic=True))
