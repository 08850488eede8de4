from importlib.metadata import EntryPoint

import pytest

from vicreg_mm import objectives, registry
from vicreg_mm.registry import Registry


def plugin():
    return "built by another package"


@pytest.fixture
def fruits():
    fruits = Registry("fruit")
    fruits.register("apple")(lambda colour="red", size=1: (colour, size))
    return fruits


def test_a_builder_is_called_with_its_options(fruits):
    assert fruits.build("apple", size=3) == ("red", 3)


def test_an_unknown_name_lists_the_known_ones(fruits):
    with pytest.raises(ValueError, match="unknown fruit 'pear'; known: apple"):
        fruits.build("pear")


def test_an_unknown_option_lists_those_that_the_builder_takes(fruits):
    with pytest.raises(ValueError, match="unknown option of fruit 'apple' 'color'; known: colour, size"):
        fruits.build("apple", color="green")


def test_two_builders_cannot_share_a_name(fruits):
    with pytest.raises(ValueError, match=r"fruit 'apple' of tests.test_registry clashes with the one that tests.test_registry registered"):
        fruits.register("apple")(plugin)


def test_another_package_adds_a_builder_by_an_entry_point(monkeypatch):
    point = EntryPoint(name="plum", value=f"{__name__}:plugin", group="fruits")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "fruits" else [])
    assert Registry("fruit", group="fruits").names() == ["plum"]
    assert Registry("fruit", group="fruits").build("plum") == "built by another package"


def test_an_entry_point_cannot_take_a_name_that_is_taken(monkeypatch):
    point = EntryPoint(name="apple", value=f"{__name__}:plugin", group="fruits")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    fruits = Registry("fruit", group="fruits")
    fruits.register("apple")(lambda: None)
    with pytest.raises(ValueError, match=r"fruit 'apple' of tests\.test_registry clashes"):
        fruits.names()


def test_the_built_in_objectives_are_listed():
    assert "vicreg" in objectives.names()


def test_an_objective_is_registered_by_one_decorator():
    @objectives.register("mine for this test")
    def mine(scale=1.0):
        return scale

    try:
        assert objectives.build("mine for this test", scale=2.0) == 2.0
    finally:
        del objectives.OBJECTIVES._builders["mine for this test"]


def test_an_unknown_objective_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'vicrg'; known: .*vicreg"):
        objectives.build("vicrg")
