import pytest
from packed_toys import toy

from hub_mpq.pack import write_packed


@pytest.fixture
def packed(tmp_path):
    """(path of a packed toy model, its tensors, its manifest)."""
    tensors, manifest = toy()
    path = tmp_path / "model.mpq.safetensors"
    write_packed(path, tensors, manifest)
    return path, tensors, manifest
