"""hub-mpq push, pull and export. The token is that of huggingface_hub: HF_TOKEN, or `hf auth login`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from . import show

Repo = Annotated[str, typer.Argument(metavar="REPO", help="Repo on the Hub, owner/name.", show_default=False)]
Revision = Annotated[o.Text, typer.Option(help="Branch, tag or commit of the model. Default: main.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Packed folder that hub-mpq wrote.", show_default=False)]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public", help="Visibility of a new repo; an existing one keeps its own. Default: public."
    ),
]
FloatCopy = Annotated[
    bool | None,
    typer.Option(help="Also publish dequantized weights, which plain timm or transformers load. Default: yes."),
]


def push(
    folder: Folder,
    repo: Repo,
    private: Private = None,
    revision: Annotated[
        o.Text, typer.Option(help="Branch to publish on, created if it does not exist. Default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    float_copy: FloatCopy = None,
    format: Annotated[str, typer.Option(help="mpq, or compressed-tensors for transformers models.")] = "mpq",
    license: Annotated[o.Text, typer.Option(help="License of the float model, if it is not found.")] = None,
    base_model: Annotated[o.Text, typer.Option(help="Hub id of the float model, if it is not known.")] = None,
    pipeline_tag: Annotated[o.Text, typer.Option(help="Pipeline tag of the model, if it is not known.")] = None,
    dataset: Annotated[
        o.Text, typer.Option(help="Dataset that the figures were measured on, for example org/name.")
    ] = None,
    eval_task: Annotated[o.Text, typer.Option(help="Task of that dataset, if it is a benchmark on the Hub.")] = None,
    trained_on: Annotated[o.Text, typer.Option(help="Training data, for example org/name.")] = None,
    message: Annotated[o.Text, typer.Option("--message", "-m", help="Commit message.")] = None,
    as_json: o.Json = False,
) -> None:
    """Publish a packed folder with its model card, in one commit.

    Uses the token of huggingface_hub: HF_TOKEN, or `hf auth login`.
    """
    from ..hub.publish import publish

    done = publish(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        float_copy=float_copy,
        format=format,
        license=license,
        base_model=base_model,
        pipeline_tag=pipeline_tag,
        dataset=dataset,
        eval_task=eval_task,
        trained_on=trained_on,
        message=message,
    )
    tree = {"commit": done.oid, "commit_url": done.commit_url, "pull_request": done.pr_url}
    show.emit(as_json, tree, done.pr_url or done.commit_url)


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist.")],
    format: Annotated[str, typer.Option(help="Format: compressed-tensors, gguf or onnx.")] = "compressed-tensors",
    as_json: o.Json = False,
) -> None:
    """Convert a packed folder to another program's format."""
    from ..core.output import check_output_folder
    from ..errors import InvalidArgument
    from ..model import HubMPQ
    from .models import is_packed

    check_output_folder(output)
    if not is_packed(folder):
        raise InvalidArgument(f"{folder} is not a folder that hub-mpq wrote")
    if output.exists():
        raise InvalidArgument(f"{output} already exists; name a new folder")
    size = HubMPQ.from_pretrained(folder).export(output, format)
    tree = {"folder": str(output), "format": format, "bytes": size}
    show.emit(as_json, tree, f"saved {output}: {size:,} bytes of {format}")


def pull(
    repo: Repo,
    output: Annotated[o.File, typer.Option("--output", "-o", help="Output folder. Default: the Hub cache.")] = None,
    revision: Revision = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Use cached files only.")] = False,
    as_json: o.Json = False,
) -> None:
    """Download a published model without its float copy, verify its weights, and print its folder."""
    from ..hub.pull import pull as pull_model

    folder = pull_model(repo, output, revision=revision, local_files_only=local_files_only)
    show.emit(as_json, {"folder": str(folder)}, str(folder))
