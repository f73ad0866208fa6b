"""Headers and byte ranges of safetensors files."""

import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mmx.checkpoint import hf_files
from mmx.checkpoint.hf_files import BadHeader, Reader, read_header, scan
from mmx.checkpoint.hf_source import cut
from mmx.errors import UserError


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file with one tensor of 5,040 elements that are their own indices, after another one."""
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    save_file({"x": np.arange(5040, dtype=np.float32), "a": np.ones(3, np.float32)}, path)
    return read_header(path)["x"]


@st.composite
def regions(draw):
    view = draw(st.sampled_from([(5040,), (70, 72), (7, 10, 72), (6, 7, 8, 15), (2, 3, 4, 5, 42)]))
    region = []
    for n in view:
        start = draw(st.integers(0, n - 1))
        region.append(slice(start, draw(st.integers(start + 1, n))))
    return view, tuple(region)


@pytest.mark.parametrize("page, span", [(4096, 1 << 20), (4096, 64), (0, 1 << 20), (40, 100)])
@settings(deadline=None, max_examples=60)
@given(region=regions())
def test_any_region_reads_as_a_slice(stored, page, span, region):
    view, region = region
    before = hf_files._PAGE, hf_files._SPAN
    hf_files._PAGE, hf_files._SPAN = page, span
    try:
        with Reader() as reader:
            part = reader.read(stored, view, region)
    finally:
        hf_files._PAGE, hf_files._SPAN = before
    expected = np.arange(5040, dtype=np.float32).reshape(view)[region]
    np.testing.assert_array_equal(part, expected)
    if page == 0:
        assert reader.bytes_read == expected.nbytes


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 200), st.data())
def test_cut_covers_a_region_once_in_order_and_within_room(shape, room, data):
    axes = data.draw(st.integers(1, len(shape)))
    grid = np.arange(math.prod(shape)).reshape(shape)
    blocks = [grid[part].reshape(-1) for part in cut([slice(0, n) for n in shape], room, axes)]
    assert np.concatenate(blocks).tolist() == grid.reshape(-1).tolist()
    smallest = math.prod(shape[axes:])
    assert all(block.size <= max(room, smallest) for block in blocks)


def _write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("content", [
    b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 50) + b"{}"],
    ids=["empty", "short", "huge", "cut"])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadHeader):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("header", [
    b"{", b"[]", {"x": {"dtype": "F32", "shape": [2]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [-8, 0]}}, {"x": 3}],
    ids=["cut", "list", "no offsets", "too short", "backwards", "negative", "number"])
def test_headers_that_make_no_sense(tmp_path, header):
    _write(tmp_path / "x.safetensors", header)
    with pytest.raises(BadHeader):
        read_header(tmp_path / "x.safetensors")


def test_header_of_the_safetensors_library(tmp_path):
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    save_file({"x": x}, tmp_path / "x.safetensors", {"format": "pt"})
    ref = read_header(tmp_path / "x.safetensors")["x"]
    assert (ref.dtype, ref.shape, ref.nbytes) == ("BF16", (2, 3), 12)
    with Reader() as reader:
        part = reader.read(ref, (2, 3), (slice(0, 2), slice(1, 3)))
    np.testing.assert_array_equal(part, x[:, 1:])


def test_loose_shards_are_all_read(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"y": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    assert set(scan(tmp_path).tensors) == {"x", "y"} and not scan(tmp_path).problems


def test_index_decides_which_file_counts(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "old.safetensors")
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "new.safetensors")
    (tmp_path / hf_files.INDEX).write_text(json.dumps({"weight_map": {"x": "new.safetensors"}}))
    found = scan(tmp_path)
    assert found.tensors["x"].file.name == "new.safetensors" and not found.problems


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}',
                                  '{"weight_map": {"x": "../../etc/passwd"}}'])
def test_index_that_makes_no_sense(tmp_path, text):
    (tmp_path / hf_files.INDEX).write_text(text)
    with pytest.raises(UserError, match="index.json is not readable"):
        scan(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(100, np.float32)}, path)
    ref = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-8])
    with Reader() as reader, pytest.raises(UserError, match="ended while it was read"):
        reader.read(ref, (100,), (slice(0, 100),))
