import dataclasses

import pytest

from mmx.cli import settings
from mmx.cli.settings import setting
from mmx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    count: int = setting(3, "", low=1, high=9)
    rate: float = setting(0.5, "", low=0)
    name: str | None = setting(None, "", choices=("a", "b"))
    texts: tuple[str, ...] = setting((), "")
    deep: dict | None = None


def test_field_types():
    kind = settings.field_type
    assert kind(Example, "count") == settings.FieldType(int, False, False)
    assert kind(Example, "name") == settings.FieldType(str, False, True)
    assert kind(Example, "texts") == settings.FieldType(str, True, False)
    assert kind(Example, "deep") is None


@pytest.mark.parametrize("values", [
    {}, {"count": 1}, {"count": 9}, {"rate": 2}, {"name": "b"}, {"texts": ("x", "y")},
    {"deep": {"any": 1}}])
def test_what_fits_passes(values):
    settings.check(Example(**values))


@pytest.mark.parametrize("values, words", [
    ({"count": 0}, "--count=0 is out of range. It must be between 1 and 9."),
    ({"count": 10}, "--count=10 is out of range"),
    ({"count": 1.5}, "--count=1.5 has the wrong type. It takes a whole number."),
    ({"count": True}, "--count=True has the wrong type"),
    ({"rate": -0.1}, "--rate=-0.1 is out of range. It must be 0 or more."),
    ({"rate": float("nan")}, "--rate=nan is out of range"),
    ({"rate": "x"}, "--rate='x' has the wrong type. It takes a number."),
    ({"name": "c"}, "--name='c' is not a choice. It is one of a, b."),
    ({"name": 3}, "--name=3 has the wrong type. It takes text."),
    ({"texts": ("x", 1)}, "--texts=1 has the wrong type"),
    ({"count": None}, "--count=None has the wrong type"),
])
def test_what_does_not_fit_is_told(values, words):
    with pytest.raises(UserError) as caught:
        settings.check(Example(**values))
    assert words in str(caught.value)


@pytest.mark.parametrize("low, words", [(1 << 20, "1MiB"), (1_500_001, "1500001")])
def test_the_size_that_is_advised_is_accepted(low, words):
    @dataclasses.dataclass(frozen=True)
    class Sized:
        room: int = setting(low, "", low=low, size=True)

    with pytest.raises(UserError, match=f"{words} or more. Write for example --room={words}."):
        settings.check(Sized(1))
    settings.check(Sized(settings.parse_size(words)))


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("512", 512), ("2GiB", 2 << 30), ("2 gib", 2 << 30), ("1.5KB", 1500),
    ("1e6", 10**6), ("3M", 3 * 10**6)])
def test_sizes(text, size):
    assert settings.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "2 apples", "-1", "1.2.3", "GiB"])
def test_no_sizes(text):
    with pytest.raises(ValueError):
        settings.parse_size(text)


@pytest.mark.parametrize("size", [1, 1000, 1024, 2 << 30, 2_200_000_000, 123456789])
def test_size_text_reads_back(size):
    assert settings.parse_size(settings.size_text(size)) == size
