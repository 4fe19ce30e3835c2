"""The loopback Hub against `huggingface_hub` itself: what the tests of uploads and downloads stand on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub import HubError, LoopbackHub, Repository, blob_id

PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
repo = api.create_repo("steps", exist_ok=True)
commit = api.upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1], commit_message="End of training")
print(repo.repo_id, commit.oid)
"""
# Prints the name of the exception of `huggingface_hub` that the code ends with.
CAUGHT = """
import sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
try:
    {code}
except Exception as error:
    print(type(error).__name__, getattr(getattr(error, "response", None), "status_code", ""), error)
"""
FILES = {
    "README.md": b"---\nlibrary_name: diffusers\n---\n# Steps\n",
    "scheduler_config.json": b'{"coefficients": {"4": [0.1, 1e-300]}}',
    "model/weights.safetensors": bytes(range(256)) * 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "upload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "upload"


def caught(hub: LoopbackHub, code: str, token: str | None = LoopbackHub.token) -> str:
    return hub.python(CAUGHT.format(code=code), token=token)


def test_round_trip(hub: LoopbackHub, folder: Path) -> None:
    repo_id, sha = hub.python(PUSH, folder).split()
    repository = hub.repos[repo_id]
    assert dict(repository.files) == FILES
    assert [commit.title for commit in repository.commits] == ["initial commit", "End of training"]
    assert repository.head.sha == sha

    code = f"""
import json
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
one = hf_hub_download("{repo_id}", "model/weights.safetensors", revision="{sha}")
everything = snapshot_download("{repo_id}")
names = sorted(str(p.relative_to(everything)) for p in Path(everything).rglob("*") if p.is_file())
info = api.model_info("{repo_id}")
tree = [entry.path for entry in api.list_repo_tree("{repo_id}", "model", recursive=True)]
user = api.whoami()["name"]
print(json.dumps([Path(one).read_bytes().hex(), names, user, info.sha, tree, one.startswith(everything)]))
"""
    weights, names, user, head, tree, cached = json.loads(hub.python(code))
    assert bytes.fromhex(weights) == FILES["model/weights.safetensors"]
    assert names == sorted(FILES)
    assert (user, head, tree) == (hub.user, sha, ["model/weights.safetensors"])
    assert cached  # both went to the one snapshot folder of this commit


def test_second_push_sends_changes_and_deletions(hub: LoopbackHub, folder: Path) -> None:
    hub.python(PUSH, folder)
    (folder / "README.md").write_bytes(b"# New\n")
    push_and_delete = PUSH.replace("commit_message=", 'delete_patterns="model/*", commit_message=')
    (folder / "model/weights.safetensors").unlink()
    hub.python(push_and_delete, folder)
    repository = hub.repos["tester/steps"]
    kept = {name: content for name, content in FILES.items() if name == "scheduler_config.json"}
    assert dict(repository.files) == {"README.md": b"# New\n", **kept}
    assert len(repository.commits) == 3
    assert dict(repository.at(repository.commits[1].sha).files) == FILES  # what was there stays there under its hash

    assert hub.python("from huggingface_hub import HfApi; HfApi().delete_repo('tester/steps')") == ""
    assert hub.repos == {}


@pytest.mark.parametrize("token", ["hf_revoked", None])
def test_refused_token(hub: LoopbackHub, token: str | None) -> None:
    hub.repos["tester/steps"] = Repository("tester/steps", private=False)
    name, status, *words = caught(hub, "HfApi().create_repo('other')", token).split(maxsplit=2)
    assert (name, status) == ("HfHubHTTPError", "401")
    refusal = "Invalid credentials in Authorization header" if token else "Invalid username or password."
    assert refusal in words[0]
    assert caught(hub, "HfApi().whoami()", token).startswith(
        "HfHubHTTPError 401" if token else "LocalTokenNotFoundError"
    )
    upload = "HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='tester/steps')"
    assert "401" in caught(hub, upload, token)
    assert list(hub.repos) == ["tester/steps"]
    assert len(hub.repos["tester/steps"].commits) == 1
    assert {entry.status for entry in hub.log if entry.method == "POST"} == {401}


def test_reading_needs_a_token_only_when_private(hub: LoopbackHub) -> None:
    for name, private in [("open", False), ("closed", True)]:
        hub.repos[f"tester/{name}"] = repository = Repository(f"tester/{name}", private)
        content = {"path": "a.json", "content": "e30="}
        repository.commit([{"key": "header", "value": {"summary": "a"}}, {"key": "file", "value": content}])
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('tester/{}', 'a.json')).read())"
    assert hub.python(code.format("open"), token=None) == "{}\n"
    assert hub.python(code.format("closed")) == "{}\n"
    assert caught(hub, "HfApi().model_info('tester/closed')", token=None).startswith("RepositoryNotFoundError 401")


def test_not_found(hub: LoopbackHub) -> None:
    hub.repos["tester/steps"] = Repository("tester/steps", private=False)
    download = "hf_hub_download('tester/{}', 'a.json', revision={!r})"
    assert caught(hub, download.format("nothing", "main")).startswith("RepositoryNotFoundError 404")
    assert caught(hub, download.format("steps", "v9")).startswith("RevisionNotFoundError 404")
    assert caught(hub, download.format("steps", "main")).startswith("RemoteEntryNotFoundError 404")


def test_dropped_connection(hub: LoopbackHub, folder: Path) -> None:
    repository = hub.repos["tester/steps"] = Repository("tester/steps", private=False)
    hub.drop_next(1, matching="POST /api/repos/create")
    assert caught(hub, "HfApi().create_repo('other')").startswith("RemoteProtocolError")
    assert list(hub.repos) == ["tester/steps"]

    # An upload of a folder tries again by itself, and the files arrive once.
    hub.drop_next(1, matching="/commit/main$")
    hub.python(PUSH, folder)
    assert [entry.status for entry in hub.log if "/commit/" in entry.path] == [None, 200]
    assert [commit.title for commit in repository.commits] == ["initial commit", "End of training"]

    # A connection that stays away fails, and what was there is untouched.
    hub.drop_next(100, matching="/commit/main$")
    single = "HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='tester/steps')"
    assert caught(hub, single).startswith("RemoteProtocolError")
    assert dict(repository.files) == FILES


def test_commit_is_all_or_nothing() -> None:
    repository = Repository("tester/steps", private=False)
    lines = [
        {"key": "header", "value": {"summary": "half"}},
        {"key": "file", "value": {"path": "a", "content": "YQ=="}},
        {"key": "lfsFile", "value": {"path": "b", "oid": "0"}},
    ]
    with pytest.raises(HubError, match="lfsFile"):
        repository.commit(lines)
    assert dict(repository.files) == {}
    assert len(repository.commits) == 1


def test_blob_id_is_gits() -> None:
    assert blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
