"""Names of the files in a published folder."""

PACKED = "model.mpq.safetensors"
INDICATORS = "indicators.safetensors"
CONFIG = "config.json"
FLOAT_COPY = "model.safetensors"
MANIFEST = "mpq_manifest.json"
"""Policy, graph and provenance as JSON, for a repo without a packed file; it also marks the repo as written by us."""
