"""What YAML may say, and what no text can do to the process that reads it."""

import pytest

from cllm.errors import UserError
from cllm.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_word, parse_yaml, read_yaml


def refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "a.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


def laughs(levels: int, times: int) -> str:
    """Every list repeats the one before: `times ** levels` values from a few hundred characters."""
    lists = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * times)}]" for i in range(1, levels)]
    return "\n".join([f"l0: &l0 [{', '.join('x' * times)}]", *lists])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("base: &a {x: 1, y: 2}\nhere: {<<: *a, y: 3}", {"x": 1, "y": 3}),
        ("base: &a {x: 1}\nmore: &b {y: 2}\nhere: {<<: [*a, *b], z: 3}", {"x": 1, "y": 2, "z": 3}),
        ("base: &a {x: 1}\nmore: &b {<<: *a, x: 2}\nhere: {<<: *b, y: 3}", {"x": 2, "y": 3}),
        ("base: &a [1, 2]\nhere: *a", [1, 2]),
    ],
)
def test_merge_keys_and_aliases_load(text, value):
    assert parse_yaml(text, "a.yaml")["here"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0.5", 0.5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1.5e+3", 1500.0),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("2024-01-31", "2024-01-31"),
        ("2024-13-45", "2024-13-45"),
        ("1.2.3", "1.2.3"),
        ("!!str 010", "010"),
        ("'1:30'", "1:30"),
    ],
)
def test_scalars(text, value):
    assert parse_yaml(text, "a.yaml") == value
    assert type(parse_yaml(text, "a.yaml")) is type(value)


@pytest.mark.parametrize("text", ["010", "-010", "007", "08", "00", "0_7"])
def test_a_leading_zero_is_refused(text):
    assert refusal(f"a: {text}").startswith(
        f"a.yaml line 1: {text} has a leading zero, which makes it octal in YAML 1.1"
    )


@pytest.mark.parametrize("text", ["1:30", "12:30:45", "1:30.5", "-1:30"])
def test_a_number_to_base_60_is_refused(text):
    assert refusal(f"a: {text}").startswith(f"a.yaml line 1: {text} is a number to base 60 in YAML 1.1 and text in")


REFUSED = {
    "aliases that multiply": (laughs(9, 9), f"stands for more than {MAX_VALUES:,} values with its aliases"),
    "merge keys that multiply": (
        "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)),
        f"stands for more than {MAX_VALUES:,} values with its aliases",
    ),
    "aliases inside each other": (
        "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000)),
        f"is nested more than {MAX_DEPTH} levels deep",
    ),
    "a list inside itself": ("&a [*a]", "an alias refers to the value that it is in"),
    "a mapping inside itself": ("a: &a {b: {c: *a}}", "an alias refers to the value that it is in"),
    "brackets": ("[" * 100_000, f"is nested more than {MAX_DEPTH} levels deep"),
    "braces": ("{a: " * 10_000, f"is nested more than {MAX_DEPTH} levels deep"),
    "indents": ("\n".join(" " * i + "a:" for i in range(500)), f"is nested more than {MAX_DEPTH} levels deep"),
    "many digits": ("9" * 5000, "a number of 5000 digits; allowed: up to 40"),
    "many hexadecimal digits": ("0x" + "f" * 5000, "a number of 5002 digits; allowed: up to 40"),
    "a number that is none": ("!!int foo", "tag 'int'; allowed: none, or !!str"),
    "a float that is none": ("!!float foo", "tag 'float'; allowed: none, or !!str"),
    "code": ("!!python/object/apply:os.system [ls]", "tag 'python/object/apply:os.system'; allowed: none, or !!str"),
    "a control character": ("a: \x00", "not valid YAML: unacceptable character"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML: "),
    "a merge of a number": ("<<: 1", "not valid YAML: expected a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    text, message = REFUSED[case]
    assert message in refusal(text)


def test_duplicate_keys_are_found_beside_a_merge():
    assert "duplicate key 'x'" in refusal("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}")


def test_a_file_that_is_too_large_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=r"a\.yaml: is larger than 1,048,576 bytes"):
        read_yaml(path)
    path.write_bytes(b"#" * MAX_BYTES)
    assert read_yaml(path) == {}


def test_an_endless_file_is_refused():
    with pytest.raises(UserError, match="/dev/zero: is larger than"):
        read_yaml("/dev/zero")


def test_a_word_of_a_command_line_has_no_comment():
    for text in ("2 # two", "#name", "[1, 2] #", "null # none"):
        with pytest.raises(UserError, match=r'^--a: .*: YAML reads "#.*" as a comment; leave it out, or quote text'):
            parse_word(text, "--a")
        parse_yaml(text, "a")
    words = {"a#b": "a#b", "'a # b'": "a # b", "": None, " 2 ": 2, "[1, '# 2']": [1, "# 2"]}
    assert {text: parse_word(text, "--a") for text in words} == words
