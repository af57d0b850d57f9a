"""Mistakes in arguments, and the types of options."""

import argparse
from pathlib import Path

import pytest

from cllm.arguments import Parser, number, whole_number
from cllm.errors import UserError


def refusal(parser: Parser, *words: str) -> str:
    with pytest.raises(UserError) as error:
        parser.parse_args(words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def parser() -> Parser:
    parser = Parser(description="Do it.", usage_hint="do.py runs/NAME")
    parser.add_argument("run")
    parser.add_argument("--window", type=whole_number(1))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run: missing; for example: do.py runs/NAME"),
        (["a", "b"], "b: unexpected argument; --help describes the allowed ones"),
        (["a", "--windw", "3"], '--windw: unknown option; did you mean "--window"?'),
        (["a", "--windw=3"], '--windw: unknown option; did you mean "--window"?'),
        (["a", "--win", "3"], '--win: unknown option; did you mean "--window"?'),
        (["a", "--window"], "--window: expected one argument"),
        (["a", "--window", "0"], "--window is 0; allowed: 1 or more"),
        (["a", "--window", "1.5"], "--window is '1.5'; allowed: an integer, 1 or more"),
        (["a", "--device", "gpu"], "--device is 'gpu'; allowed: auto, cpu, cuda"),
    ],
)
def test_a_mistake_is_a_user_error_that_says_what_is_allowed(parser, words, message):
    assert refusal(parser, *words) == message


def test_options_of_subcommands_are_suggested():
    parser = Parser()
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("export").add_argument("--dtype", choices=("fp32", "bf16"))
    commands.add_parser("import")
    assert refusal(parser) == "COMMAND: missing; --help describes every argument"
    assert refusal(parser, "exprt") == "COMMAND is 'exprt'; allowed: export, import"
    assert refusal(parser, "export", "--dtyp", "bf16") == '--dtyp: unknown option; did you mean "--dtype"?'
    assert refusal(parser, "export", "--dtype", "fp8") == "--dtype is 'fp8'; allowed: fp32, bf16"


def test_a_misspelt_option_is_no_setting():
    parser = Parser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume")
    settings = ["name", "runs_dir", "train.steps"]
    options, rest = parser.parse_with_settings(
        ["--resume", "auto", "--train.steps", "3", "--name", "x", "--n_steps", "4"], settings
    )
    assert (options.resume, rest) == ("auto", ["--train.steps", "3", "--name", "x", "--n_steps", "4"])
    for word in ("--dryrun", "--dry_run", "--dry-rum"):
        with pytest.raises(UserError, match=f'{word}: unknown option; did you mean "--dry-run"'):
            parser.parse_with_settings([word, "--name", "x"], settings)
    assert parser.parse_with_settings(["--nmae", "x"], settings)[1] == ["--nmae", "x"]  # nearer to the setting


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("20", 20), (" 3 ", 3)])
def test_whole_numbers(text, value):
    assert whole_number(1, 20)(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "21", "x", "", "1.0", "nan", "inf"])
def test_whole_numbers_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="1 to 20"):
        whole_number(1, 20)(text)


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("1e-3", 1e-3), ("2.5", 2.5)])
def test_numbers(text, value):
    assert number(above=0, up_to=2.5)(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "2.6", "x", "", "nan", "inf"])
def test_numbers_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"above 0, up to 2\.5"):
        number(above=0, up_to=2.5)(text)


def test_a_least_number_is_allowed_itself():
    assert number(least=0)("0") == 0
    for text in ("-0.1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 0"):
            number(least=0)(text)


def test_an_infinite_number_is_refused_without_a_bound():
    with pytest.raises(argparse.ArgumentTypeError, match="is inf; allowed: above 0"):
        number(above=0)("inf")


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_empty_texts_and_paths_are_refused_but_for_a_default(text):
    parser = Parser()
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    assert vars(parser.parse_args(["--out", "a"])) == {"only": "", "out": Path("a")}
    assert refusal(parser, "--out", text).startswith("--out is ")
    if text:
        assert refusal(parser, "--only", text).startswith("--only is ")


def test_help_with_a_word_shows_the_options_that_have_to_do_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--window", help="tokens read at once")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where")
    commands = parser.add_subparsers()
    commands.add_parser("export").add_argument("--shard", help="tokens of a file")
    for word, shown in (("WINDOW", {"--window"}), ("tokens", {"--window", "--shard"}), ("cuda", {"--device"})):
        with pytest.raises(SystemExit):
            parser.parse_args(["--help", word])
        told = capsys.readouterr().out
        assert {option for option in ("--window", "--shard", "--device", "--help") if option in told} == shown
        assert ("export:" in told) == ("--shard" in shown)
    with pytest.raises(UserError, match="--help nothing: nothing about it"):
        parser.parse_args(["--help", "nothing"])
