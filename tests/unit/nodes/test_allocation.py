"""Allocation strings are read and written exactly, and a bad one gets a sentence that says what to write."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes.allocation import Allocation, Amount, Request, make_request, parse, parse_request

HERE = ("cpu", "cuda:0", "cuda:1", "mps", "mlu:0", "directml:0")
GB = 1 << 30

names = st.builds(
    lambda name, index: name if index is None else f"{name}:{index}",
    st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True),
    st.none() | st.integers(0, 99),
)
decimals = st.builds(lambda number, digits: Fraction(number, 10**digits), st.integers(1, 10**12), st.integers(0, 12))
shares = st.builds(lambda number: Fraction(number, 10**9), st.integers(1, 10**9))


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    devices = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    numbers, units = draw(
        st.sampled_from(
            [
                (decimals, ("b", "k", "kb", "m", "mb", "g", "gb")),
                (st.builds(lambda share: share * 16, shares), ("%",)),
                (shares, ("",)),
            ]
        )
    )
    amounts = [Amount(draw(numbers), draw(st.sampled_from(units))) for _ in devices]
    if draw(st.booleans()):
        amounts[draw(st.integers(0, len(amounts) - 1))] = Amount(Fraction(0), "*")
    return Allocation(tuple(zip(devices, amounts, strict=True)))


@given(allocations())
def test_what_was_written_is_read_again(allocation: Allocation) -> None:
    assert parse(str(allocation)) == allocation


@given(allocations())
def test_spaces_and_capitals_say_the_same(allocation: Allocation) -> None:
    assert parse(f" {str(allocation).upper().replace(';', ' ; ').replace(',', ' , ')} ;") == allocation


@given(names, decimals, st.lists(names, min_size=1, max_size=4, unique=True), st.none() | allocations())
def test_a_whole_request_is_read_again(
    compute: str, gigabytes: Fraction, donors: list[str], expert: Allocation | None
) -> None:
    request = Request(compute, gigabytes, tuple(donors), expert)
    assert parse_request(str(request)) == request


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(AllocationError):
        assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "grammar", "rest"),
    [
        ("cuda:0,4gb;cpu,*", "bytes", "cpu"),
        ("cuda:0,4gb;cpu,100", "bytes", None),
        ("cuda:0,25%;cpu,75%", "ratio", None),
        ("mps,0.5;mlu:0,0.5", "fraction", None),
        ("directml:0,0.5;cpu,*", "fraction", "cpu"),
        ("cpu,*", "wildcard", "cpu"),
    ],
)
def test_units_alone_say_which_grammar_it_is(text: str, grammar: str, rest: str | None) -> None:
    """Letters of device names (mps, mlu, directml) do not."""
    assert (parse(text, HERE).grammar, parse(text, HERE).rest) == (grammar, rest)


@pytest.mark.parametrize(
    ("written", "size"),
    [("1gb", GB), ("1G", GB), ("0.1gb", 107374182), ("1.5k", 1536), ("7b", 7), ("512MB", GB // 2), (".5g", GB // 2)],
)
def test_bytes_are_exact(written: str, size: int) -> None:
    assert parse(f"cpu,{written}").entries[0][1].size == size


BAD = {
    "": "is empty",
    "   ": "is empty",
    ";": "is empty",
    "cpu": "no device,amount",
    "cpu,": "no amount",
    ",1gb": "no device name",
    "cpu,1gb,2gb": "no device,amount",
    "cpu 1gb": "no device,amount",
    "cpu=1gb": "no device,amount",
    "cpu,1gb;;cuda:0,1gb": "nothing between",
    ";;cpu,1gb;cuda:0": "no device,amount",
    "cpu,1gb|cuda:0,2gb": "no device,amount",
    "cuda:,1gb": "no device name",
    "cuda:x,1gb": "no device name",
    "cuda:-1,1gb": "no device name",
    "cuda 0,1gb": "no device name",
    "0,1gb": "no device name",
    "cuda:0:1,1gb": "no device name",
    "*,1gb": "no device name",
    "cuda:7,1gb": "no device 'cuda:7' here",
    "xpu:0,1gb": "no device 'xpu:0' here",
    "cpu,abc": "no amount",
    "cpu,-1gb": "no amount",
    "cpu,+1gb": "no amount",
    "cpu,1e3": "no amount",
    "cpu,1e3b": "no amount",
    "cpu,nan": "no amount",
    "cpu,inf": "no amount",
    "cpu,1.2.3gb": "no amount",
    "cpu,.gb": "no amount",
    "cpu,١gb": "no amount",
    "cpu,1tb": "no unit",
    "cpu,1gib": "no unit",
    "cpu,1gb%": "no amount",
    "cpu,%": "no amount",
    "cpu,1" + "0" * 50 + "b": "at most 40 digits",
    "cpu,5*": "beside *",
    "cpu,**": "beside *",
    "cpu,*gb": "beside *",
    "cpu,*;cuda:0,*": "* twice",
    "cpu,1gb;cpu,2gb": "names cpu twice",
    "cpu,1gb;CPU,*": "names cpu twice",
    "cpu,50%;cuda:0,1gb": "mixes %",
    "cpu,50%;cuda:0,0.5": "mixes %",
    "cpu,0.5;cuda:0,4gb": "mixes shares",
    "cuda:0,4gb;cpu,1.5": "mixes shares",
    "*": "no device,amount",
    "cpu,*;*": "no device,amount",
    "cpu,-inf": "no amount",
    "cpu,1e309": "no amount",
    "cpu,0x10": "no amount",
    "cpu,1_000b": "no amount",
    "cpu,1 g b": "no amount",
    "cpu,1,5gb": "no device,amount",
    "cpu,½": "no amount",
    "cpu,１gb": "no amount",
    "cpu,1²": "no amount",
    "сpu,1gb": "no device name",
    "cuda:０,1gb": "no device name",
    "cpu,1gbs": "no unit",
    "cpu,1gigabyte": "no unit",
    "cpu,0": "gives no device anything",
    "cpu,0%;cuda:0,0%": "gives no device anything",
    "cpu,0gb": "gives no device anything",
    "cuda:0,101%;cpu,*": "leaves nothing",
    "cpu,1.5": "from 0 to 1",
    "cpu,4;cuda:0,*": "from 0 to 1",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_string_gets_a_clear_error(text: str) -> None:
    with pytest.raises(AllocationError) as error:
        parse(text, HERE)
    assert BAD[text] in str(error.value)


def test_there_are_forty_bad_strings() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"virtual_gb": 4.0, "donors": ""}, "no donor_device"),
        ({"virtual_gb": -1, "donors": "cpu"}, "virtual_vram_gb is -1"),
        ({"virtual_gb": "nan", "donors": "cpu"}, "virtual_vram_gb is 'nan'"),
        ({"virtual_gb": 4.0, "donors": "cpu,cpu"}, "names cpu twice"),
        ({"virtual_gb": 4.0, "donors": "cuda:9"}, "no device 'cuda:9' here"),
        ({"virtual_gb": 4.0, "donors": "cpu", "compute": "gpu!"}, "no device name"),
        ({"virtual_gb": 4.0, "donors": "cpu", "expert": "cpu,zz"}, "no amount"),
    ],
)
def test_a_bad_input_of_a_node_is_named(inputs: dict[str, str], problem: str) -> None:
    with pytest.raises(AllocationError) as error:
        make_request(**{"compute": "cuda:0", "devices": HERE, **inputs})  # type: ignore[arg-type]
    assert problem in str(error.value)


@pytest.mark.parametrize("text", ["cuda:0;4;cpu", "#cuda:0;4", "a#b#c", "", "#", "#cuda:0;x;cpu"])
def test_a_bad_request_gets_a_clear_error(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_request(text)
