"""hub-mpq push and pull. The token is the client's own: HF_TOKEN, or `hf auth login`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from . import show
from .inspect import Revision

Repo = Annotated[str, typer.Argument(help="owner/name on the Hub.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Folder that hub-mpq wrote.", show_default=False)]
Private = Annotated[bool | None, typer.Option("--private/--public", help="Of a new repo; an old one keeps its own.")]
FloatCopy = Annotated[
    bool | None, typer.Option(help="Dequantized weights too, that plain timm or transformers load (default: yes).")
]


def push(
    folder: Folder,
    repo: Repo,
    private: Private = None,
    revision: Annotated[o.Text, typer.Option(help="Branch to publish on, made if it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    float_copy: FloatCopy = None,
    format: Annotated[str, typer.Option(help="mpq, or compressed-tensors, for transformers models.")] = "mpq",
    license: Annotated[o.Text, typer.Option(help="Licence of the float model, where it is not found.")] = None,
    base_model: Annotated[o.Text, typer.Option(help="Hub id of the float model, where it is not known.")] = None,
    pipeline_tag: Annotated[o.Text, typer.Option(help="Task of the model, where it is not known.")] = None,
    dataset: Annotated[o.Text, typer.Option(help="What the figures were measured on, such as org/name.")] = None,
    eval_task: Annotated[o.Text, typer.Option(help="Task of the dataset, if it is a benchmark of the Hub.")] = None,
    trained_on: Annotated[o.Text, typer.Option(help="Data of the training, such as org/name.")] = None,
    message: Annotated[o.Text, typer.Option("--message", "-m", help="Message of the commit.")] = None,
    as_json: o.Json = False,
) -> None:
    """Publish a packed folder with its card, all in one commit."""
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
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write.")],
    format: Annotated[str, typer.Option(help="compressed-tensors, gguf or onnx.")] = "compressed-tensors",
    as_json: o.Json = False,
) -> None:
    """Write a packed folder in another program's format."""
    from ..core.output import check_output_folder
    from ..errors import InvalidArgument
    from ..model import HubMPQ
    from .models import is_packed

    check_output_folder(output)
    if not is_packed(folder):
        raise InvalidArgument(f"{folder} is no folder that hub-mpq wrote")
    if output.exists():
        raise InvalidArgument(f"{output} is there already; export writes a new folder")
    size = HubMPQ.from_pretrained(folder).export(output, format)
    tree = {"folder": str(output), "format": format, "bytes": size}
    show.emit(as_json, tree, f"{format} in {output}: {size:,} bytes")


def pull(
    repo: Repo,
    output: Annotated[o.File, typer.Option("--output", "-o", help="New folder; else it stays in the cache.")] = None,
    revision: Revision = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Ask nothing of the network.")] = False,
    as_json: o.Json = False,
) -> None:
    """Fetch a published model without its float copy, verify its weights, and print where it lies."""
    from ..hub.pull import pull as pull_model

    folder = pull_model(repo, output, revision=revision, local_files_only=local_files_only)
    show.emit(as_json, {"folder": str(folder)}, str(folder))
