"""Model folders on the Hub: checked, uploaded in one commit, read back."""

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from .messages import describe
from .model_folder import FILES
from .recipe import load_recipe
from .zoo import NAMESPACE, WEIGHTS, HTTPError, hub_id

_KEPT = {".gitattributes"}  # of the Hub's own
_RESULTS = ("test_loss", "test_top1", "test_top5")
_PNG = b"\x89PNG\r\n\x1a\n"
_HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # the last two: of a card, of an upload


class PublishError(Exception):
    """A folder that can't be published; the message says why and what to do."""


@dataclass
class Plan:
    """What publishing a folder would do to its repository; `head` is the revision online, None where there is none."""

    folder: Path
    repo: str
    contents: dict[str, bytes]
    head: str | None = None
    private: bool = False
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def check_folder(folder: Path) -> dict[str, bytes]:
    """The files of a model folder that is complete and says nothing but what is so.

    Raises:
        PublishError: something is missing, damaged, of no use to others, or disagrees with the rest.
    """
    try:
        contents = _read(folder)
        _check(folder, contents)
    except PublishError:
        raise
    except KeyError as e:
        raise PublishError(f"{folder}: config.json lacks {e}") from e
    except Exception as e:  # whatever a file that anybody may have written leads its reader to
        raise PublishError(f"{folder}: can't be read: {_one_line(e)}") from e
    return contents


def _require(condition: bool, folder: Path, problem: str) -> None:
    if not condition:
        raise PublishError(f"{folder}: {problem}")


def _read(folder: Path) -> dict[str, bytes]:
    _require(folder.is_dir(), folder, "no such folder")
    names = {path.name for path in folder.iterdir()}
    missing, strange = ", ".join(sorted(set(FILES) - names)), ", ".join(sorted(names - set(FILES)))
    _require(not missing, folder, f"{missing} missing: is it the trainer's output?")
    _require(not strange, folder, f"{strange} does not belong there: move it away")
    odd = [name for name in FILES if (folder / name).is_symlink() or not (folder / name).is_file()]
    _require(not odd, folder, f"{', '.join(odd)} is no regular file")
    return {name: (folder / name).read_bytes() for name in FILES}


def _check(folder: Path, contents: dict[str, bytes]) -> None:
    def require(condition: bool, problem: str) -> None:
        _require(condition, folder, problem)

    def parse(name: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(contents[name].decode())
        except Exception as e:  # whatever a file that anybody may have written leads its reader to
            raise PublishError(f"{folder}: {name} can't be read: {_one_line(e)}") from e

    config = parse("config.json", json.loads)
    recipe = parse("recipe.yaml", lambda _: load_recipe(folder / "recipe.yaml"))
    rows = parse("log.csv", lambda text: list(csv.DictReader(io.StringIO(text))))
    require(bool(rows), "log.csv has no epochs")
    log = parse("log.csv", lambda _: {key: float(rows[-1][key]) for key in ("epoch", *_RESULTS)})
    card = parse("README.md", ModelCard)
    training, name = config["training"], folder.resolve().name
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}

    require(name.startswith(f"{config['architecture']}."), f"should be named {config['architecture']}.TAG")
    digest = hashlib.sha256(contents[WEIGHTS]).hexdigest()
    require(digest == config["weights_sha256"], f"{WEIGHTS} is not what config.json says: damaged?")
    require(contents["curves.png"].startswith(_PNG), "curves.png is no PNG")
    epochs = {log["epoch"], recipe.epochs, training["epochs"]}
    require(len(epochs) == 1, "log.csv, recipe.yaml and config.json differ in epochs")
    for key in _RESULTS:
        said = f"{key} is {log[key]} in log.csv, {training[key]} in config.json"
        require(abs(log[key] - training[key]) < 6e-4, said)
    local = [k for k in ("data", "model") if re.search(r":/|//|^/|\\", getattr(recipe, k))]
    require(not local, f"recipe.yaml names a place on this machine as its {' and '.join(local)}: of no use to others")
    require("hf_hub_filename" not in config["pretrained_cfg"], "config.json names another file for the weights")
    card_metrics = metrics.get("accuracy"), metrics.get("accuracy@5")
    require(
        card_metrics == (training["test_top1"], training["test_top5"]), "the card has other figures than config.json"
    )
    require(card.data.library_name == "timm", "the card lacks library_name: timm")
    require(bool(card.data.license), "the card lacks a license: that of the checkpoint it started from, in config.json")
    named = f"hf-hub:{hub_id(folder, NAMESPACE)}" in card.content
    require(named, "the card loads another repository: name the folder as it was, or have update_zoo.py write the card")
    classes = config["num_classes"]
    require(classes == len(config["label_names"]), "config.json has not as many classes and names")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    require(model.num_classes == classes, f"config.json has not the network's {model.num_classes} classes")
    parameters = sum(p.numel() for p in model.parameters())
    require(parameters == config["parameters"], f"config.json has not the network's {parameters} parameters")
    bad = [key for key, t in safetensors.torch.load(contents[WEIGHTS]).items() if not t.isfinite().all()]
    require(not bad, f"{', '.join(bad[:3])} in {WEIGHTS} not finite")


def _is_same(online: RepoFile, data: bytes) -> bool:
    if online.lfs:
        return online.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return online.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _one_line(error: BaseException) -> str:
    """Its type and message, without line breaks and without what a signed URL has behind its '?'."""
    return re.sub(r"[?][^ ]+", "", describe(error))


def _explain(repo: str, error: BaseException) -> PublishError:
    if isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading", from what says why
        error = error.__cause__
    namespace = repo.partition("/")[0]
    if isinstance(error, LocalTokenNotFoundError):
        return PublishError("no token: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    because = f" ({' '.join(reason.split())})" if reason else ""
    if isinstance(error, GatedRepoError):
        return PublishError(f"{repo} is gated, and closed to this token{because}")
    if status == 401:
        hint = "log in again with `hf auth login`, or set HF_TOKEN"
        return PublishError(f"the Hub does not accept this token{because}: {hint}")
    if status == 403:
        hint = "--namespace says where else, HF_TOKEN who else"
        return PublishError(f"{repo}: the Hub refuses to write to {namespace}{because}: {hint}")
    if status in (409, 412):
        return PublishError(f"{repo} has changed meanwhile{because}: run again")
    if "Connect" in type(error).__name__:
        hint = "check the connection and its proxy, and HF_ENDPOINT if you set it"
        return PublishError(f"{repo}: the Hub at {constants.ENDPOINT} can't be reached ({_one_line(error)}): {hint}")
    what = f"the Hub at {constants.ENDPOINT} did not do it ({_one_line(error)})"
    return PublishError(f"{repo}: {what}. What is online is whole: run again.")


def check_access(namespace: str, tag: str | None, api: HfApi) -> None:
    """Raises PublishError unless there is a token that the Hub knows, and `tag` can be one."""
    if tag is not None and (tag == "main" or not re.fullmatch(r"\w([\w.-]*\w)?", tag, re.ASCII)):
        raise PublishError(f"{tag!r} can't be a tag: use letters, digits, '.', '_', '-', such as v1")
    try:
        api.whoami()
    except _HUB_ERRORS as e:
        raise _explain(namespace, e) from e


def make_plan(folder: Path, contents: dict[str, bytes], namespace: str, tag: str | None, api: HfApi) -> Plan:
    """Compares what `check_folder` read with what is online.

    Raises:
        PublishError: the Hub can't be asked, or `tag` stands at another revision.
    """
    plan = Plan(folder, hub_id(folder, namespace), dict(contents))
    plan.contents["README.md"] = contents["README.md"].replace(hub_id(folder, NAMESPACE).encode(), plan.repo.encode())
    try:
        info = api.model_info(plan.repo)
        tree = api.list_repo_tree(plan.repo, recursive=True, revision=info.sha)
        online = {f.path: f for f in tree if isinstance(f, RepoFile)}
        refs = api.list_repo_refs(plan.repo)
    except GatedRepoError as e:
        raise _explain(plan.repo, e) from e
    except RepositoryNotFoundError:
        plan.added = list(FILES)
        return plan
    except _HUB_ERRORS as e:
        raise _explain(plan.repo, e) from e
    plan.head, plan.private = info.sha, bool(info.private)
    for name, data in plan.contents.items():
        group = plan.added if name not in online else plan.unchanged if _is_same(online[name], data) else plan.changed
        group.append(name)
    plan.removed = sorted(online.keys() - set(FILES) - _KEPT)
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if tagged and (tagged != plan.head or plan.added or plan.changed or plan.removed):
        raise PublishError(f"{plan.repo}: the tag {tag} stands at {tagged[:8]}, another revision: choose another tag")
    return plan


def diff(plan: Plan, api: HfApi) -> str:
    """What `plan` would change online, a line for each file, and the lines of texts that change."""
    lines = [f"+ {name}" for name in plan.added] + [f"- {name}" for name in plan.removed]
    for name in plan.changed:
        lines.append(f"~ {name}")
        if name.endswith((".md", ".json", ".yaml", ".csv", ".txt")):
            try:
                with TemporaryDirectory() as cache:
                    path = api.hf_hub_download(plan.repo, name, revision=plan.head, cache_dir=cache)
                    before = Path(path).read_text(encoding="utf-8", errors="replace")
            except _HUB_ERRORS as e:
                raise _explain(plan.repo, e) from e
            after = plan.contents[name].decode()
            lines += difflib.unified_diff(before.splitlines(), after.splitlines(), "online", "here", "", "", 1, "")
    return "\n".join(lines + [f"= {name}" for name in plan.unchanged])


def publish(plan: Plan, private: bool, tag: str | None, api: HfApi) -> str:
    """Does what `plan` says, in one commit, and returns the revision, which was downloaded and compared.

    Interrupted anywhere, what is online stays as it was or is whole, and a second call goes on.

    Raises:
        PublishError: the Hub refused or failed, or what it has is not what was uploaded.
    """
    repo = plan.repo
    try:
        if plan.head is None:
            api.create_repo(repo, private=private or None)  # without a wish, as the organisation has it
            plan.head = api.model_info(repo).sha
        operations = [CommitOperationAdd(name, plan.contents[name]) for name in (*plan.added, *plan.changed)]
        operations += [CommitOperationDelete(name) for name in plan.removed]
        revision = plan.head
        if operations:
            message = f"{plan.folder.resolve().name}, by timm-iebn"
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=plan.head)
            revision = commit.oid
        _compare(plan, revision, api)
        if tag:
            api.create_tag(repo, tag=tag, revision=revision, exist_ok=True)
            if {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}.get(tag) != revision:
                raise PublishError(f"{repo}: somebody has set the tag {tag} elsewhere meanwhile: choose another tag")
    except _HUB_ERRORS as e:
        raise _explain(repo, e) from e
    return revision


def _compare(plan: Plan, revision: str, api: HfApi) -> None:
    """Downloads `revision` into a fresh cache as others do, and compares hashes and logits."""
    with TemporaryDirectory() as cache:
        path, damaged = Path(api.snapshot_download(plan.repo, revision=revision, cache_dir=cache)), []
        for name, data in plan.contents.items():
            if not (path / name).exists() or (path / name).read_bytes() != data:
                damaged.append(name)
        if damaged:
            raise PublishError(f"{plan.repo}@{revision}: {', '.join(damaged)} came back changed: run again")
        ours = timm.create_model(f"local-dir:{plan.folder}", pretrained=True).eval()
        name = f"hf-hub:{plan.repo}@{revision}"
        try:
            theirs = timm.create_model(name, pretrained=True, cache_dir=cache).eval()
        except (RemoteEntryNotFoundError, RuntimeError) as e:
            raise PublishError(f"{name} can't be loaded: {_one_line(e)}") from e
        images = torch.randn(2, *ours.pretrained_cfg["input_size"])
        with torch.no_grad():
            if not torch.equal(ours(images), theirs(images)):
                raise PublishError(f"{name} computes something else than {plan.folder}")
