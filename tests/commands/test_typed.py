import pytest

from tfm.commands.typed import Given, read, together, tokens
from tfm.config import InputError

KINDS = {"model.d_model": int, "dropout": float, "data.corpus": tuple[str, ...], "quiet": bool, "json": str | None}


def test_values_follow_their_option():
    argv = ["--model.d-model=3", "--data.corpus", "a", "b", "--quiet", "--json=x=y"]
    given, wants_help = read("train", argv, KINDS)
    assert not wants_help
    assert given == [
        Given("model.d_model", ("3",)),
        Given("data.corpus", ("a", "b")),
        Given("quiet", ("True",)),
        Given("json", ("x=y",)),
    ]
    assert [str(option) for option in given[:2]] == ["--model.d_model=3", "--data.corpus a b"]
    assert list(tokens(given[1])) == ["--data.corpus=a", "b"]


def test_help_is_asked_for_wherever_it_stands():
    assert read("train", ["--quiet", "-h"], KINDS) == ([Given("quiet", ("True",))], True)


def test_what_takes_several_values_takes_them_one_by_one_too():
    given, _ = read("train", ["--data.corpus=a", "--json=1", "--data.corpus=b", "--json=2"], KINDS)
    assert together(given, KINDS) == [Given("json", ("1",)), Given("json", ("2",)), Given("data.corpus", ("a", "b"))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--qiet"], "--qiet: unknown option; did you mean --quiet?"),
        (["x", "--quiet"], "x: unexpected argument; options are --NAME=VALUE, see tfm train --help"),
        (["--json"], "--json has no value: expected"),
        (["--json="], "--json is empty: expected"),
        (["--dropout=inf"], "--dropout=inf: expected one number, and a finite one"),
    ],
)
def test_what_cannot_be_read_is_refused(argv, message):
    with pytest.raises(InputError) as refused:
        read("train", argv, KINDS)
    assert str(refused.value).startswith(message)
