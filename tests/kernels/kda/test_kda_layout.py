"""The structs that Python fills are the ones that the C++ side was compiled with."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from kimi_kernels.kda import _layout


@pytest.mark.parametrize("name", ["KdaArgs", "KdaGrads", "KdaLayer"])
def test_sizes_are_those_of_the_header(name):
    header = Path(__file__).parents[3] / "kernels" / "csrc" / "kda" / "args.h"
    sizes = dict(re.findall(r"sizeof\((\w+)\) == (\d+)", header.read_text()))
    structure = getattr(_layout, name)
    assert ctypes.sizeof(structure) == int(sizes[name])
    assert _layout.packer(structure).size == int(sizes[name])


@pytest.mark.parametrize("name", ["KdaArgs", "KdaGrads", "KdaLayer"])
def test_fields_are_those_of_the_header(name):
    header = (Path(__file__).parents[3] / "kernels" / "csrc" / "kda" / "args.h").read_text()
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", header, re.DOTALL)
    assert body is not None
    code = re.sub(r"//[^\n]*", "", body[1])
    declared = [re.search(r"(\w+)\s*$", part)[1] for part in re.split(r"[;,]", code) if part.strip()]
    assert [field[0] for field in getattr(_layout, name)._fields_] == declared
