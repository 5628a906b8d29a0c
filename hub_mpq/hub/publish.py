"""Publish a packed folder on the Hub, in one commit."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.files import CONFIG, FLOAT_COPY, INDICATORS, MANIFEST, PACKED
from ..core.library import Library
from ..errors import HubMPQError, InvalidArgument
from ..export import COMPRESSED_TENSORS, check_exportable, export
from ..export.float_copy import float_copy_state
from ..nn.fold import why_not_unfolded
from ..pack import Manifest, read_packed
from ..pack.atomic_folder import finish_interrupted
from .cached import is_foreign_link
from .card import CardFacts, eval_results, render_card
from .folder import read_folder_indicators
from .load import library_of, load_folder
from .origin import origin_of
from .preprocess import preprocess_files, preprocess_names
from .remote import bounded, check_repo_id, hub_api, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

CARD = "README.md"
PICTURE = "policy.png"
EVAL_RESULTS = ".eval_results/hub-mpq.yaml"
_OURS = (CONFIG, PACKED, INDICATORS, FLOAT_COPY, CARD, PICTURE, MANIFEST, EVAL_RESULTS)
_ANSWER = 64 << 20
"""Maximum bytes of a response that is not a file."""
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".safetensors", ".safetensors.index.json", ".onnx")


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    float_copy: bool | None = None,
    format: str = "mpq",
    token: str | bool | None = None,
    license: str | None = None,
    base_model: str | None = None,
    pipeline_tag: str | None = None,
    dataset: str | None = None,
    eval_task: str | None = None,
    trained_on: str | None = None,
    message: str | None = None,
    model: nn.Module | None = None,
    seconds: Mapping[str, float] | None = None,
) -> CommitInfo:
    """Publish a folder that save_pretrained wrote, in one commit.

    Nothing in the folder changes, and only files of known names are published. Readers of the repo see the old version
    or the new one, complete.

    Args:
        folder: The packed folder.
        repo_id: "owner/name".
        private: Whether a new repo is private; None: public. An existing repo keeps its visibility; a public one is
            refused if this is True.
        revision: Branch to publish on, created if it does not exist; None for "main".
        create_pr: Open a pull request instead; the repo must exist.
        float_copy: Also publish dequantized weights, which plain timm or transformers load. None: yes for models of
            these libraries.
        format: "mpq", or "compressed-tensors" for a policy of a transformers model over Linear and Embedding layers.
            transformers loads that with the compressed-tensors package and without hub-mpq; `HubMPQ.from_pretrained`
            does not load it.
        token: Hub token, as in huggingface_hub.
        license: Licence of the float model, if it is not found.
        base_model: Hub id of the float model, if it is not known.
        pipeline_tag: Pipeline tag of the model, if it is not known.
        dataset: What the figures were measured on.
        eval_task: Task of that dataset, if it is a benchmark on the Hub.
        trained_on: Training data.
        message: Commit message.
        model: The quantized model, so that it is not built again.
        seconds: `{stage: wall time}` for the card.

    Returns:
        The commit, with `commit_url`, `oid` and `pr_url`.

    Raises:
        PackedFormat: The packed file is incomplete or damaged; nothing is sent.
        InvalidArgument: The folder or the name is not valid.
        HubMPQError: The Hub refuses.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    finish_interrupted(folder)
    if not (folder / PACKED).is_file() or not (folder / CONFIG).is_file():
        raise InvalidArgument(
            f"{folder} does not contain {CONFIG} and {PACKED}; publish a folder that save_pretrained wrote"
        )
    for name in (CONFIG, PACKED, INDICATORS, CARD, *preprocess_names()):
        if is_foreign_link(folder / name):
            raise InvalidArgument(
                f"{folder / name} is a symbolic link, which is not followed when publishing; replace it with the file"
            )
    _, manifest = read_packed(folder / PACKED)
    library = library_of(manifest, folder / PACKED)
    if format not in ("mpq", COMPRESSED_TENSORS):
        raise InvalidArgument(f"format must be 'mpq' or {COMPRESSED_TENSORS!r}, got {format!r}")
    if format == COMPRESSED_TENSORS:
        check_exportable(manifest)
        if float_copy:
            raise InvalidArgument(
                f"{COMPRESSED_TENSORS} and a float copy would both write {FLOAT_COPY}; publish only one of them"
            )
    wanted = float_copy
    float_copy = format == "mpq" and (library.builds_from_folder if float_copy is None else float_copy)
    with tempfile.TemporaryDirectory(prefix="hub-mpq-push-") as work:
        if format == COMPRESSED_TENSORS:
            files = _write_compressed(Path(work), folder, manifest, model)
        else:
            files = {name: folder / name for name in (CONFIG, PACKED, INDICATORS) if (folder / name).is_file()}
        files |= _preprocessing(folder, manifest, token)
        if float_copy:
            whole = model or _network(folder, library)
            why = why_not_unfolded(whole)
            if why is not None and wanted:
                raise HubMPQError(f"cannot publish a float copy: {why}")
            if why is not None:
                warnings.warn(f"published without a float copy: {why}", stacklevel=2)
            else:
                files[FLOAT_COPY] = _write_float_copy(Path(work) / FLOAT_COPY, library, whole)
        if _draw(manifest, Path(work) / PICTURE):
            files[PICTURE] = Path(work) / PICTURE
        given = {"license": license, "base_model": base_model, "pipeline_tag": pipeline_tag}
        given |= {"dataset": dataset, "eval_task": eval_task, "trained_on": trained_on}
        files |= _card(Path(work), folder, repo_id, manifest, files, given, seconds or {}, token)
        return _commit(repo_id, files, private, revision, create_pr, token, message or _summary(manifest))


def _preprocessing(folder: Path, manifest: Manifest, token: str | bool | None) -> dict[str, Path]:
    own = {name: folder / name for name in preprocess_names() if (folder / name).is_file()}
    return own or preprocess_files(manifest.base_model, manifest.revision, library=manifest.library, token=token)


def _write_compressed(work: Path, folder: Path, manifest: Manifest, model: nn.Module | None) -> dict[str, Path]:
    """Write config.json and weights in compressed-tensors format, and the manifest, which no other file holds."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    export(work, COMPRESSED_TENSORS, model or load_folder(folder, None, {})[0].model, manifest, config, None)
    (work / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return {name: work / name for name in (CONFIG, FLOAT_COPY, MANIFEST)}


def _network(folder: Path, library: Library) -> nn.Module:
    """The quantized model of a folder."""
    if not library.builds_from_folder:
        raise InvalidArgument("a float copy of a custom network needs the network itself; use HubMPQ.push_to_hub")
    return load_folder(folder, None, {})[0].model


def _write_float_copy(path: Path, library: Library, model: nn.Module) -> Path:
    from safetensors.torch import save_file

    save_file(float_copy_state(model, library), path, metadata={"format": "pt"})
    return path


def _draw(manifest: Manifest, path: Path) -> bool:
    """Plot the policy; False if matplotlib is not installed."""
    from ..plot import check_plot, plot_policy

    try:
        check_plot(path)
    except HubMPQError:
        return False
    plot_policy(manifest.graph, manifest.policy, path)
    return True


def _card(
    work: Path,
    folder: Path,
    repo_id: str,
    manifest: Manifest,
    files: Mapping[str, Path],
    given: Mapping[str, str | None],
    seconds: Mapping[str, float],
    token: str | bool | None,
) -> dict[str, Path]:
    """The card and the evaluation file; a README.md in the folder is the user's own and is published unchanged."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    origin = origin_of(manifest, config, given["base_model"], token)
    indicators = read_folder_indicators(folder)
    facts = CardFacts(
        nbytes={name: path.stat().st_size for name, path in files.items()},
        license=given["license"] or origin.license,
        base_model=origin.base_model,
        pipeline_tag=given["pipeline_tag"] or origin.pipeline_tag,
        dataset=given["dataset"],
        eval_task=given["eval_task"],
        trained_on=given["trained_on"],
        picture=PICTURE if PICTURE in files else None,
        config=config,
        indicators=indicators.provenance if indicators else {},
        seconds=seconds,
    )
    out = {CARD: folder / CARD}
    if not out[CARD].is_file():
        out[CARD] = work / CARD
        out[CARD].write_text(render_card(repo_id, manifest, facts), encoding="utf-8")
    entries = eval_results(manifest, facts)
    if entries is not None:
        out[EVAL_RESULTS] = work / "eval_results.yaml"
        out[EVAL_RESULTS].write_bytes(entries)
    return out


def _summary(manifest: Manifest) -> str:
    widths = sorted({bits.weight for bits in manifest.policy.bits.values()})
    return f"{manifest.base_model} in mixed precision, weights at {', '.join(map(str, widths))} bits"


def _commit(
    repo_id: str,
    files: Mapping[str, Path],
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
    message: str,
) -> CommitInfo:
    from huggingface_hub.errors import HfHubHTTPError

    api = hub_api(token)
    after = "; the repository is either unchanged or fully updated"
    with hub_errors(f"cannot publish {repo_id}", after), bounded(_ANSWER):
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        for attempt in (1, 2):
            head, there = _head(api, repo_id, private, revision, create_pr)
            try:
                return api.create_commit(
                    repo_id,
                    _operations(repo_id, files, there),
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head,
                )
            except HfHubHTTPError as error:  # 412: somebody else has committed in the meantime
                if error.response is None or error.response.status_code != 412:
                    raise
                if attempt == 2:
                    raise HubMPQError(
                        f"{repo_id} keeps changing while it is published: its head is no longer {head[:12]}. "
                        "Nothing was published; try again"
                    ) from error
    raise AssertionError


def _head(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> tuple[str, frozenset[str]]:
    """(commit that the push starts from, names of its files)."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision is None or create_pr or revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise HubMPQError(f"{repo_id} already exists and is public; make it private in its settings first")
    if info.sha is None:
        raise HubMPQError(f"{repo_id}: the Hub returned no commit to start from")
    return info.sha, frozenset(f.rfilename for f in info.siblings or ())


def _operations(repo_id: str, files: Mapping[str, Path], there: frozenset[str]) -> list[Any]:
    """Add every file and delete ours that this version lacks; refuse a repo with weights of others."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    ours = (*_OURS, *preprocess_names())
    foreign = {f for f in there if "/" not in f and f.endswith(_WEIGHTS)} - set(ours)
    if not there & {PACKED, MANIFEST}:
        foreign |= there & {FLOAT_COPY}
    if foreign:
        raise HubMPQError(
            f"{repo_id} holds weights that hub-mpq did not write ({', '.join(sorted(foreign)[:3])}), which a plain "
            "load would mistake for this model. Publish under another name, or delete them first"
        )
    adds = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    stale = [name for name in ours if name in there and name not in files]
    return [*adds, *(CommitOperationDelete(name) for name in stale)]
