"""Messages for unknown names: they list the choices and suggest the nearest."""

from granet.names import did_you_mean, unknown


def test_a_name_near_one_that_there_is():
    assert did_you_mean("granett", ["granet", "rigl"]) == "; did you mean 'granet'?"
    assert did_you_mean("rigl", {"rigl": 1, "rigl-itop": 2}) == ""


def test_a_name_near_none_is_met_with_the_choices_alone():
    assert unknown("method", "xyz", ["granet", "rigl"]) == "unknown method 'xyz': choose from granet, rigl"
    assert unknown("method", 7, ["granet", "rigl"]) == "unknown method 7: choose from granet, rigl"
