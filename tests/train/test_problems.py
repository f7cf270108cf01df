from typing import Annotated

import pytest
from pydantic import BaseModel, Field, ValidationError

from granet.train.problems import problems, suggest


class Example(BaseModel):
    """One field of each kind."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    count: Annotated[int, Field(ge=10, le=2_000_000)] = 10
    steps: int | str = 1
    number: int | float = 1
    on: bool = False
    names: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"share": 0}, ["share: must be greater than 0, got 0"]),
        ({"share": 1}, ["share: must be less than 1, got 1"]),
        ({"share": "x"}, ["share: must be a number, got 'x'"]),
        ({"count": 2}, ["count: must be 10 or more, got 2"]),
        ({"count": 3_000_000}, ["count: must be 2,000,000 or less, got 3000000"]),
        ({"count": 2.5}, ["count: must be a whole number, got 2.5"]),
        ({"steps": None}, ["steps: is not a number of steps: write 1000, '1000it', '80ep' or '50%' (of the training), "
                           "got None"]),
        ({"number": "x"}, ["number: must be a number, got 'x'"]),
        ({"on": 7}, ["on: must be true or false, got 7"]),
        ({"names": []}, ["names: needs at least 1, got []"]),
        ({"names": [1]}, ["names.0: must be a text, got 1"]),
        ({"names": "a"}, ["names: must be a list, got 'a'"]),
        ({"share": 0, "on": []}, ["share: must be greater than 0, got 0", "on: must be true or false, got []"]),
    ],
)  # fmt: skip
def test_each_is_said_once_in_our_own_words(values, lines):
    with pytest.raises(ValidationError) as error:
        Example(**values)
    assert [str(problem) for problem in problems(error.value)] == lines


def test_the_nearest_choice_first():
    assert suggest("regl", ["granet", "rigl"]) == "did you mean 'rigl'? (choices: granet, rigl)"
    assert suggest("x" * 10**6, ["granet"]) == "(choices: granet)"
