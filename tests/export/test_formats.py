import typing

import pytest

import granet
from granet.cli.export import Arguments
from granet.export.formats import FORMATS, Format


def test_missing_packages_are_named_with_their_extra():
    form = Format("onnx", ".onnx", ("float32",), ("torch", "no_such_package"), "export", "an ONNX file")
    with pytest.raises(
        ModuleNotFoundError, match=r'an ONNX file needs no_such_package: pip install "granet\[export\]"'
    ):
        form.require()
    assert all(set(form.precisions) <= {"float32", "int8"} for form in FORMATS.values())


def test_the_command_line_offers_every_format():
    assert typing.get_args(typing.get_type_hints(Arguments)["to"]) == tuple(FORMATS)
    assert all(callable(getattr(granet.export, form.function)) for form in FORMATS.values())
