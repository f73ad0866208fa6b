"""Meshes as text."""

import pytest

from mmx.errors import UserError
from mmx.sharding.mesh import parse_mesh


@pytest.mark.parametrize("text, words", [
    ("foo=2", "The mesh axis 'foo' is unknown. Axes are slice, data,"),
    ("tensor=4096", "needs 4096 devices"),
    ("tensor", "does not describe a mesh"),
])
def test_what_is_no_mesh_here(text, words):
    with pytest.raises(UserError, match=words):
        parse_mesh(text)
