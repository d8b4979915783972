"""A W&B server on this machine, as far as a run with artifacts and registry links speaks to one.

It answers GraphQL by the name of the operation, takes files by PUT, and can be told to fail. What it does not know is
kept in `unknown`, so that a newer client shows what it asks for.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from json_http import JsonAnswers

ENTITY, ORGANIZATION = "me", "org"


@dataclass
class Artifact:
    """A version of an artifact."""

    id: str
    name: str
    type: str
    project: str
    index: int
    digest: str
    metadata: Any
    description: Any
    aliases: list[str]
    tags: list[str]
    ttl_seconds: int | None
    state: str = "PENDING"
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Link:
    source: str
    target: str
    aliases: list[str]


class FakeWandb:
    """`with FakeWandb() as server:`; it must outlive the client's process.

    Attributes:
        fail: Operation -> HTTP status with which it is answered.
        put_status: The status of every upload of a file.
        seconds: How long every answer takes.
    """

    def __init__(self, *, fail: Mapping[str, int] | None = None, put_status: int = 200, seconds: float = 0) -> None:
        self.fail, self.put_status, self.seconds = dict(fail or {}), put_status, seconds
        self.artifacts: list[Artifact] = []
        self.runs: set[str] = set()
        self.alerts: list[tuple[str, str, str]] = []
        self.links: list[Link] = []
        self.uses: list[str] = []
        self.calls: list[str] = []
        self.unknown: list[str] = []
        self.errors: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False
        self.lock = threading.RLock()
        self.http = _Server(self)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> FakeWandb:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def models(self) -> list[Artifact]:
        """What is complete, without the tables, which are artifacts as well."""
        return [each for each in self.artifacts if each.type == "model" and each.state == "COMMITTED"]

    def table(self, key: str) -> dict[str, Any]:
        """The newest table that was logged under `key`: `columns` and `data`."""
        found = [each for each in self.artifacts if each.type == "run_table" and f"{key}.table.json" in each.files]
        return json.loads(found[-1].files[f"{key}.table.json"])

    # --- GraphQL ------------------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        (operation,) = re.findall(r"(?:query|mutation)\s+(\w+)", query)[:1] or ["?"]
        with self.lock:
            self.calls.append(operation)
            handler = getattr(self, f"on_{operation}", None)
            if handler is None:
                self.unknown.append(operation)
                return {}
            return handler(variables.get("input") or variables)

    def on_Viewer(self, asked: Any) -> Any:
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "me@example.org", "flags": "{}"}
        return {"viewer": user | {"name": ENTITY, "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    on_GetDefaultEntity = on_Viewer

    def on_NotifyScriptableRunAlert(self, asked: Any) -> Any:
        self.alerts.append((asked["severity"], asked["title"], asked["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_ServerFeaturesQuery(self, asked: Any) -> Any:
        names = ("ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE", "ARTIFACT_TAGS")
        return {"serverInfo": {"features": [{"name": name, "isEnabled": True} for name in names]}}

    def on_RunResumeStatus(self, asked: Any) -> Any:
        counts = dict.fromkeys(("historyLineCount", "logLineCount", "eventsLineCount"), 0)
        texts = {
            "historyTail": "[]",
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        bucket = {"id": "r", "name": asked["name"], "displayName": asked["name"], "tags": [], **counts, **texts}
        known = bucket if asked["name"] in self.runs else None
        return {"model": {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": known}}

    def on_UpsertBucket(self, asked: Any) -> Any:
        project = {"id": "p", "name": asked.get("project") or "runs", "entity": {"id": "e", "name": ENTITY}}
        name = asked.get("name") or "run"
        self.runs.add(name)
        bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "project": project}
        return {"upsertBucket": {"inserted": True, "bucket": bucket | {"sweepName": None, "historyLineCount": 0}}}

    def on_OrganizationCoreWeaveOrganizationID(self, asked: Any) -> Any:
        return {}

    on_XXHashDigestsEnabled = on_OrganizationCoreWeaveOrganizationID
    on_FetchArtifactDigestAlgorithm = on_RunState = on_MarkRunFilesUploaded = on_OrganizationCoreWeaveOrganizationID

    def on_ArtifactType(self, asked: Any) -> Any:
        found = [each for each in self.artifacts if each.name == asked["name"].partition(":")[0]]
        return {"project": {"artifact": {"artifactType": {"name": found[0].type}} if found else None}}

    def on_CreateArtifact(self, asked: Any) -> Any:
        name = (asked.get("artifactCollectionNames") or [asked.get("artifactCollectionName")])[0]
        versions = [each for each in self.artifacts if each.name == name]
        made = next((each for each in versions if each.digest == asked["digest"]), None)
        if made is None:
            made = Artifact(
                base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode(),
                name,
                asked["artifactTypeName"],
                asked["projectName"],
                len(versions),
                asked["digest"],
                asked.get("metadata"),
                asked.get("description"),
                [],
                [each["tagName"] for each in asked.get("tags") or []],
                asked.get("ttlDurationSeconds"),
            )
            self.artifacts.append(made)
        for alias in [each["alias"] for each in asked.get("aliases") or []]:
            for each in versions:  # an alias belongs to one version
                each.aliases = [other for other in each.aliases if other != alias]
            if alias not in made.aliases:
                made.aliases.append(alias)
        sequence = {"id": f"sequence-{name}", "latestArtifact": {"id": versions[-1].id} if versions else None}
        return {"createArtifact": {"artifact": {"id": made.id, "state": made.state, "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, asked: Any) -> Any:
        file = {"id": "f", "uploadUrl": f"{self.url}/manifest/{asked['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def on_CreateArtifactFiles(self, asked: Any) -> Any:
        edges = []
        for each in asked["artifactFiles"]:
            url = f"{self.url}/artifact/{each['artifactID']}/{each['name']}"
            node = {"storagePath": each["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": each["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, asked: Any) -> Any:
        artifact = self.by_id(asked["artifactID"])
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def on_ArtifactByID(self, asked: Any) -> Any:
        return {"artifact": fragment(self.by_id(asked["id"]))}

    def on_ArtifactMembershipByName(self, asked: Any) -> Any:
        name, _, version = asked["name"].partition(":")
        found = [
            each
            for each in self.models
            if each.name == name and (version in each.aliases or version == f"v{each.index}")
        ]
        membership = member(found[0], collection(found[0]), found[0].aliases) if found else None
        return {"project": {"artifactCollectionMembership": membership}}

    def on_UpdateArtifact(self, asked: Any) -> Any:
        artifact = self.by_id(asked["artifactID"])
        if "ttlDurationSeconds" in asked:
            artifact.ttl_seconds = asked["ttlDurationSeconds"]
        return {"result": {"artifact": fragment(artifact)}}

    def on_UseArtifact(self, asked: Any) -> Any:
        self.uses.append(self.by_id(asked["artifactID"]).name)
        return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}

    def on_FetchOrgInfoFromEntity(self, asked: Any) -> Any:
        organization = {"name": ORGANIZATION, "orgEntity": {"name": f"{ORGANIZATION}-entity"}}
        return {"entity": {"organization": organization, "user": {"organizations": [organization]}}}

    def on_LinkArtifact(self, asked: Any) -> Any:
        artifact = self.by_id(asked["artifactID"])
        aliases = [each["alias"] for each in asked["aliases"]]
        project, name = asked["projectName"], asked["artifactPortfolioName"]
        self.links.append(Link(artifact.name, f"{asked['entityName']}/{project}/{name}", aliases))
        where = {"__typename": "ArtifactPortfolio", "name": name, "project": named(project, asked["entityName"])}
        return {"result": {"versionIndex": 0, "artifactMembership": member(artifact, where, aliases)}}

    def on_CreateRunFiles(self, asked: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/run/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    # --- what is stored -----------------------------------------------------------------------------------------------

    def by_id(self, key: str) -> Artifact:
        return next(each for each in self.artifacts if each.id == key)

    def put(self, path: str, body: bytes) -> None:
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "artifact":
            key, _, name = rest.partition("/")
            self.by_id(key).files[name] = body

    def stream(self, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        self.history += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary |= json.loads(line)
        self.finished = self.finished or bool(body.get("complete"))


def named(project: str, entity: str) -> dict[str, Any]:
    return {"id": "p", "internalId": "1", "name": project, "entity": {"name": entity}}


def collection(artifact: Artifact) -> dict[str, Any]:
    return {"__typename": "ArtifactSequence", "name": artifact.name, "project": named(artifact.project, ENTITY)}


def alias(name: str) -> dict[str, Any]:
    return {"__typename": "ArtifactAlias", "id": f"alias-{name}", "alias": name}


def member(artifact: Artifact, where: dict[str, Any], aliases: list[str]) -> dict[str, Any]:
    return {
        "__typename": "ArtifactCollectionMembership",
        "id": f"member-{artifact.id}",
        "versionIndex": artifact.index,
        "createdAt": "2026-01-01T00:00:00Z",
        "aliases": [alias(name) for name in aliases],
        "artifactCollection": where,
        "artifact": fragment(artifact),
    }


def fragment(artifact: Artifact) -> dict[str, Any]:
    """`ArtifactFragment` of the client's queries."""
    return {
        "__typename": "Artifact",
        "id": artifact.id,
        "artifactSequence": collection(artifact),
        "versionIndex": artifact.index,
        "artifactType": {"name": artifact.type},
        "description": artifact.description,
        "metadata": artifact.metadata,
        "ttlDurationSeconds": artifact.ttl_seconds or -2,  # the server's word for "inherited"
        "ttlIsInherited": artifact.ttl_seconds is None,
        "tags": [{"__typename": "Tag", "id": f"tag-{name}", "name": name} for name in artifact.tags],
        "historyStep": None,
        "state": artifact.state,
        "size": sum(map(len, artifact.files.values())),
        "digest": artifact.digest,
        "digestAlgorithm": "MANIFEST_MD5",
        "commitHash": None,
        "fileCount": len(artifact.files),
        "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": None,
        "aliases": [{"artifactCollection": collection(artifact)} | alias(name) for name in artifact.aliases],
    }


class _Server(ThreadingHTTPServer):
    def __init__(self, fake: FakeWandb) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.fake = fake

    def handle_error(self, *of: object) -> None:
        """Ignore a client that hangs up; what goes wrong here is in `errors`."""


class _Answers(JsonAnswers):
    server: _Server

    def do_POST(self) -> None:
        fake, body = self.server.fake, self._body()
        time.sleep(fake.seconds)
        try:
            asked = json.loads(body)
            if self.path == "/graphql":
                self._answer_query(asked)
            else:
                fake.stream(asked)
                self.answer({})
        except Exception as error:  # a dropped connection would be tried again for minutes
            fake.errors.append(f"{self.path}: {type(error).__name__}: {error}: {body[:300]!r}")
            self.answer({"errors": [{"message": str(error)}]}, 400)

    def _answer_query(self, asked: Any) -> None:
        fake, name = self.server.fake, re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        status = fake.fail.get(name[1] if name else "", fake.fail.get("*", 200))
        if status == 200:
            self.answer({"data": fake.answer(asked["query"], asked.get("variables") or {})})
        else:
            self.answer({"errors": [{"message": "told to fail"}]}, status)

    def do_PUT(self) -> None:
        fake, body = self.server.fake, self._body()
        time.sleep(fake.seconds)
        if fake.put_status == 200:
            fake.put(self.path, body)
        self.answer({}, fake.put_status)

    def do_GET(self) -> None:
        self.answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
