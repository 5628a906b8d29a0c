"""What others get of a quantized model: folders, Hub repos, exports."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.library import libraries
from ..errors import HubMPQError
from ..export import export
from ..hub.folder import save_folder
from ..hub.origin import local_card
from ..hub.preprocess import local_preprocess
from ..hub.publish import publish
from ..hub.remote import check_repo_id
from .searching import Searching

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Sharing(Searching):
    """The steps that follow a policy."""

    def save_pretrained(self, folder: str | Path) -> int:
        """Write config.json, packed weights and indicators atomically into a folder; returns the packed bytes.

        Of a model that was loaded from a folder its tokenizer or image processor too.
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before saving")
        source = self.source
        extra = local_preprocess(self.home, source.library)
        return save_folder(folder, self.model, self._manifest(self.policy), source.config, self.indicators, extra)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        float_copy: bool | None = None,
        format: str = "mpq",
        token: str | bool | None = None,
        **card: str | None,
    ) -> CommitInfo:
        """Publish the quantized model as "owner/name" in one commit; all arguments as in hub_mpq.hub.publish.publish.

        float_copy: dequantized weights too, that plain timm or transformers load (None: for their models, yes).
        format: "compressed-tensors" publishes weight-only transformers policies so that nobody needs this package.
        card: license, base_model, pipeline_tag, dataset, eval_task, trained_on, message.
        """
        check_repo_id(repo_id)
        # the packed file does not tell where on this disk its base model lies
        known = {key: value for key, value in local_card(self.home).items() if card.get(key) is None}
        with tempfile.TemporaryDirectory(prefix="hub-mpq-") as folder:
            self.save_pretrained(folder)
            return publish(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                float_copy=float_copy,
                format=format,
                token=token,
                model=self.model,
                seconds=self.seconds,
                **{**card, **known},
            )

    def export(self, folder: str | Path, format: str) -> int:
        """Write the quantized model for other programs: format "compressed-tensors" or "onnx"; returns the bytes.

        Formats, and what each refuses, are described in hub_mpq.export.
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before exporting")
        source = self.source
        return export(folder, format, self.model, self._manifest(self.policy), source.config, source.example)

    def _tell_transformers(self) -> None:
        """So that `mpq.model.save_pretrained` writes the packed format and transformers' Trainer trains `mpq.model`."""
        if self.policy is not None and libraries.get(self.source.library).pretrained_models:
            from ..hub.plugin import prepare

            prepare(self.model, self._manifest(self.policy))
