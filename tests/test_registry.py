"""Registries: names, what they refuse, and the plugins that fill them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

import granet
from granet.registry import Registry


@pytest.fixture
def fruits():
    return Registry("fruit", home="granet.registry")


def test_a_registry_is_a_mapping_in_the_order_of_adding(fruits):
    for name in ("pear", "apple"):
        fruits.add(name)(object())
    assert list(fruits) == ["pear", "apple"] and len(fruits) == 2
    assert "apple" in fruits and "plum" not in fruits and 3 not in fruits
    assert fruits.get("plum") is None


def test_an_unknown_name_is_answered_with_the_nearest(fruits):
    fruits.add("apple")(object())
    for error in (KeyError, ValueError):  # as a mapping, and as input that a user can correct
        with pytest.raises(error, match=r"unknown fruit 'aple': choose from apple; did you mean 'apple'\?"):
            fruits["aple"]


def test_a_name_is_taken_once(fruits):
    fruits.add("apple")(object())
    with pytest.raises(ValueError, match="there is already a fruit named 'apple'"):
        fruits.add("apple")(object())


def test_a_definition_that_is_run_again_replaces_the_earlier_one(fruits):
    def define():
        def cook(): ...

        return fruits.add("apple")(cook)

    first, second = define(), define()
    assert first is not second and fruits["apple"] is second


@pytest.mark.parametrize("name", ["", "Apple", "a b", "-x", "a/b", 3, None])
def test_names_that_cannot_be_typed_are_refused(fruits, name):
    with pytest.raises(ValueError, match="cannot be the name of a fruit"):
        fruits.add(name)


def test_a_method_must_be_a_dataclass_derived_from_method():
    with pytest.raises(TypeError, match=r"'x' must be a class derived from granet\.Method, not the class int"):
        granet.METHODS.add("x")(int)

    class Plain(granet.Method):
        pass

    with pytest.raises(TypeError, match=r"'x' must be a dataclass: write @dataclass"):
        granet.METHODS.add("x")(Plain)
    assert "x" not in granet.METHODS


def test_a_built_in_name_cannot_be_taken_before_the_built_in_methods_are_imported(tmp_path):
    code = """
from granet.registry import Registry
import granet
try:
    @granet.register("rigl")
    class Mine(granet.Method): pass
except ValueError as error:
    print(error)
"""
    assert "there is already a method named 'rigl'" in python(tmp_path, "-c", code)


def test_a_method_of_a_class_gets_its_name_in_kebab_case():
    @granet.register
    @dataclass(frozen=True, kw_only=True)
    class MyOwnMethod(granet.Method):
        """Keeps everything."""

    assert granet.METHODS["my-own-method"] is MyOwnMethod


def test_what_was_added_can_be_taken_away(fruits):
    fruits.add("apple")(object())
    with fruits.restored():
        fruits.add("pear")(object())
    assert list(fruits) == ["apple"]


def python(folder, *arguments, plugins="", code=0):
    """The output and errors of a Python process with these plugins."""
    env = os.environ | {"GRANET_PLUGINS": plugins, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_plugin_that_cannot_be_imported_is_one_error_that_names_it(tmp_path):
    (tmp_path / "broken.py").write_text("import granet\n1 / 0\n")
    for plugin, reason in {
        "broken": "ZeroDivisionError: division by zero",
        "absent": r"No module named 'absent' \(a module must be installed or on PYTHONPATH",
    }.items():
        said = python(tmp_path, "-m", "granet.cli", "ls", "methods", plugins=f" , {plugin}", code=2)
        assert said.count("\n") == 1
        assert re.search(reason, said), said
        assert f"the plugin {plugin!r}, listed in the environment variable GRANET_PLUGINS, cannot be imported" in said


def test_a_failed_plugin_fails_again_at_the_next_look(tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError\n")
    code = """
from granet import METHODS
for _ in range(2):
    try:
        METHODS["rigl"]
    except ValueError as error:
        print(error)
"""
    said = python(tmp_path, "-c", code, plugins="./broken.py")
    assert said.count("the plugin './broken.py'") == 2 and said.count("cannot be imported: RuntimeError") == 2
