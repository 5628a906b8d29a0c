"""Names of the files in a published folder."""

PACKED = "model.mpq.safetensors"
INDICATORS = "indicators.safetensors"
CONFIG = "config.json"
FLOAT_COPY = "model.safetensors"
MANIFEST = "mpq_manifest.json"
"""Policy, graph and provenance in words, where no packed file holds them; and the mark of such a repo as ours."""
