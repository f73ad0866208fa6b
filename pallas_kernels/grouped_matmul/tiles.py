"""Tile sizes of the grouped products by chip and shape: data where there is some, else a rule."""

import pathlib

from pallas_kernels import tuning

_FILE = pathlib.Path(__file__).with_name("tiles.json")
LANES = 128


def listed(kernel: str, rows: int, inner: int, columns: int):
    """Returns what the table says of `kernel` for a product [rows, inner] x [inner, columns].

    An entry holds from its `from_rows` on, the last one that does counts; what is listed as "other"
    holds for any shape that is not. None without one.
    """
    table = tuning.table(_FILE)[kernel]
    for name in (tuning.chip(), "any"):
        shapes = table.get(name, {})
        entries = shapes.get(f"{inner}x{columns}", shapes.get("other", ()))
        fitting = [entry for entry in entries if rows >= entry["from_rows"]]
        if fitting:
            return {key: size for key, size in fitting[-1].items() if key != "from_rows"}
    return None


def vmem_bytes() -> int:
    """On-chip memory that a kernel may plan with: a TensorCore has 64 MiB or more, v4's has 16."""
    return (12 if tuning.chip() == "v4" else 44) << 20


def row_tile(rows: int, groups: int) -> int:
    """128 or 256: a tile that two groups share is computed twice, so it is not over their mean."""
    return min(256 if rows >= 256 * groups else 128, -(-rows // 16) * 16)


def column_tile(columns: int, most: int, bytes_of_one: int, room: int) -> int:
    """The widest tile up to `most` columns whose `bytes_of_one` each fit `room`.

    One that divides `columns`, so that no tile is padded, unless that is less than half as wide.
    Raises ValueError where not even 128 columns fit.
    """
    widest = min(most, room // bytes_of_one // LANES * LANES)
    if columns <= max(widest, LANES) and columns * bytes_of_one <= room:
        return columns
    if widest < LANES:
        raise ValueError(
            f"A tile of 128 columns needs {LANES * bytes_of_one >> 20} MiB on the chip, where "
            f"{max(room, 0) >> 20} are left. Pass None, or another implementation.")
    even = [tile for tile in range(LANES, widest + 1, LANES) if columns % tile == 0]
    return even[-1] if even and 2 * even[-1] >= widest else widest


def megablox_row_tile(rows: int, groups: int) -> int:
    """Rows of a megablox tile: up to 512, one that divides `rows` if it can, else they are padded.

    Every visit of a tile reads weights again, so it is about a group's mean rows.
    """
    if rows < 128:
        return -(-rows // 16) * 16
    tile = 128
    while tile < 512 and rows >= 2 * tile * groups:
        tile *= 2
    while tile > 128 and rows % tile:
        tile //= 2
    return tile


def megablox_tiles(inner: int, columns: int, dtype, summed_rows: bool = False) -> tuple[int, int]:
    """Inner and column tiles of megablox: what fits the compiler's own limit of 16 MiB.

    `summed_rows` is the product for the weights' gradient, whose result is [inner, columns].
    """
    found = listed("megablox", 0, inner, columns)
    wide = 512 if summed_rows or dtype.itemsize == 4 else 1024
    if found is not None and wide == 1024:
        return found["inner"], found["columns"]
    return min(inner, wide), min(columns, wide)
