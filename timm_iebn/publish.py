"""Model folders on the Hub: checked, uploaded in one commit, read back."""

import csv
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from torch import nn

from .model_folder import FILES
from .recipe import RecipeError, load_recipe
from .zoo import NAMESPACE, WEIGHTS, HTTPError, hub_id, read_config, sha256

_KEPT = {".gitattributes"}  # of the Hub's own
_READING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError)
_HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # the last two: of a card, of an upload


class PublishError(Exception):
    """A folder that can't be published; the message says why and what to do."""


@dataclass
class Plan:
    """What publishing a folder would do to its repository; `head` is the revision online, None where there is none."""

    folder: Path
    repo: str
    head: str | None = None
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def check_folder(folder: Path) -> nn.Module:
    """The network in a model folder that is complete and says nothing but what is so.

    Raises:
        PublishError: something is missing, damaged, of no use to others, or disagrees with the rest.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise PublishError(f"{folder}: {problem}")

    require(folder.is_dir(), "no such folder")
    names = {path.name for path in folder.iterdir()}
    require(names >= set(FILES), f"{', '.join(sorted(set(FILES) - names))} missing: is it the trainer's output?")
    require(names <= set(FILES), f"{', '.join(sorted(names - set(FILES)))} does not belong there: move it away")
    try:
        config, recipe = read_config(folder), load_recipe(folder / "recipe.yaml")
        training = config["training"]
        with open(folder / "log.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        log = {k: float(v) for k, v in last.items()}
        card = ModelCard.load(folder / "README.md")
        metrics = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    except (RecipeError, *_READING_ERRORS) as e:
        raise PublishError(f"{folder}: can't be read: {type(e).__name__}: {e}") from e
    require(sha256(folder / WEIGHTS) == config["weights_sha256"], f"{WEIGHTS} is not what config.json says: damaged?")
    require(
        log["epoch"] == recipe.epochs == training["epochs"], "log.csv, recipe.yaml and config.json differ in epochs"
    )
    for key in ("test_loss", "test_top1", "test_top5"):
        require(abs(log[key] - training[key]) < 6e-4, f"{key} is {log[key]} in log.csv, {training[key]} in config.json")
    top1, top5 = metrics.get("accuracy"), metrics.get("accuracy@5")
    require(
        (top1, top5) == (training["test_top1"], training["test_top5"]), "the card has other figures than config.json"
    )
    require(card.data.library_name == "timm" and bool(card.data.license), "the card lacks library_name or license")
    require(
        hub_id(folder, NAMESPACE) in card.content,
        "the card does not say how to load it: scripts/update_zoo.py writes cards",
    )
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except _READING_ERRORS as e:
        raise PublishError(f"{folder}: timm can't load it: {e}") from e
    require(
        sum(p.numel() for p in model.parameters()) == config["parameters"], "config.json has another parameter count"
    )
    bad = [name for name, t in model.state_dict().items() if not t.isfinite().all()]
    require(not bad, f"{', '.join(bad[:3])} in {WEIGHTS} not finite")
    return model


def _contents(folder: Path, repo: str) -> dict[str, bytes]:
    """The files of the repository: those of the folder, with a card that names the repository."""
    files = {name: (folder / name).read_bytes() for name in FILES}
    files["README.md"] = files["README.md"].replace(hub_id(folder, NAMESPACE).encode(), repo.encode())
    return files


def _is_same(online: RepoFile, data: bytes) -> bool:
    if online.lfs:
        return online.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return online.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _explain(repo: str, error: BaseException) -> PublishError:
    if isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading", from what says why
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    namespace = repo.partition("/")[0]
    if isinstance(error, LocalTokenNotFoundError):
        return PublishError("no token: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    if status == 401:
        return PublishError("the Hub does not accept this token: log in again with `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return PublishError(f"this token may not write to {namespace}: --namespace says where else, HF_TOKEN who else")
    if status == 412:
        return PublishError(f"{repo} has changed meanwhile: run again")
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return PublishError(f"{repo}: the Hub did not do it ({reason}). What is online is whole; run again to go on.")


def check_token(namespace: str, api: HfApi) -> None:
    """Raises PublishError unless there is a token that the Hub knows."""
    try:
        api.whoami()
    except _HUB_ERRORS as e:
        raise _explain(namespace, e) from e


def make_plan(folder: Path, namespace: str, tag: str | None, api: HfApi) -> Plan:
    """Compares a model folder with what is online.

    Raises:
        PublishError: the Hub can't be asked, or `tag` stands at another revision.
    """
    plan = Plan(folder, hub_id(folder, namespace))
    try:
        plan.head = api.model_info(plan.repo).sha
        online = {f.path: f for f in api.list_repo_tree(plan.repo, recursive=True) if isinstance(f, RepoFile)}
        refs = api.list_repo_refs(plan.repo)
    except RepositoryNotFoundError:
        plan.added = list(FILES)
        return plan
    except _HUB_ERRORS as e:
        raise _explain(plan.repo, e) from e
    for name, data in _contents(folder, plan.repo).items():
        group = plan.added if name not in online else plan.unchanged if _is_same(online[name], data) else plan.changed
        group.append(name)
    plan.removed = sorted(online.keys() - set(FILES) - _KEPT)
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if tagged and (tagged != plan.head or plan.added or plan.changed or plan.removed):
        raise PublishError(f"{plan.repo}: the tag {tag} stands at {tagged[:8]}, another revision: choose another tag")
    return plan


def publish(plan: Plan, private: bool, tag: str | None, api: HfApi) -> str:
    """Does what `plan` says, in one commit, and returns the revision, which was downloaded and compared.

    Interrupted anywhere, what is online stays as it was or is whole, and a second call goes on.

    Raises:
        PublishError: the Hub refused or failed, or what it has is not what was uploaded.
    """
    repo, contents = plan.repo, _contents(plan.folder, plan.repo)
    try:
        if plan.head is None:
            api.create_repo(repo, private=private, exist_ok=True)
            plan.head = api.model_info(repo).sha
        operations = [CommitOperationAdd(name, contents[name]) for name in (*plan.added, *plan.changed)]
        operations += [CommitOperationDelete(name) for name in plan.removed]
        revision = plan.head
        if operations:
            message = f"{plan.folder.resolve().name}, by timm-iebn"
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=plan.head)
            revision = commit.oid
        _compare(plan, revision, contents, api)
        if tag:
            api.create_tag(repo, tag=tag, revision=revision, exist_ok=True)
    except _HUB_ERRORS as e:
        raise _explain(repo, e) from e
    return revision


def _compare(plan: Plan, revision: str, contents: dict[str, bytes], api: HfApi) -> None:
    """Downloads `revision` into a fresh cache and compares hashes and logits."""
    with TemporaryDirectory() as cache:
        path = Path(api.snapshot_download(plan.repo, revision=revision, cache_dir=cache))
        damaged = [
            name
            for name, data in contents.items()
            if not (path / name).exists() or sha256(path / name) != hashlib.sha256(data).hexdigest()
        ]
        if damaged:
            raise PublishError(f"{plan.repo}@{revision}: {', '.join(damaged)} came back changed: run again")
        ours, theirs = (timm.create_model(f"local-dir:{f}", pretrained=True).eval() for f in (plan.folder, path))
        images = torch.randn(2, *ours.pretrained_cfg["input_size"])
        with torch.no_grad():
            if not torch.equal(ours(images), theirs(images)):
                raise PublishError(f"{plan.repo}@{revision} computes something else than {plan.folder}")
