"""A tiny hybrid model's weights and, once per session, its checkpoints."""

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def config():
    return tiny.config(num_layers=9, softmax_every=4, num_heads=6, num_kv_heads=3)


@pytest.fixture(scope="session")
def tensors(config):
    return tiny.tensors(config, seed=3)


@pytest.fixture(scope="session")
def checkpoints(config, tmp_path_factory):
    """Directories by layout: float32, three shards, with decay tables."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: tiny.write_checkpoint(root / layout, config, seed=3, layout=layout, shards=3,
                                          buffers=True) for layout in tiny.DIALECTS}
