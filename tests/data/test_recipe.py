"""A recipe that cannot be followed is refused in one line that names the key."""

from pathlib import Path

import pytest

from cllm.config.load import load_settings
from cllm.data.prepare.recipe import Recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "data" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_settings(Recipe, [path])
    assert recipe.name == path.stem
    assert recipe.folder == Path("data/prepared") / path.stem


def test_output_does_not_depend_on_where_and_how_fast():
    path = RECIPES[0]
    assert (
        load_settings(Recipe, [path]).sha256()
        == load_settings(Recipe, [path], ["--workers", "7", "--out", "elsewhere"]).sha256()
    )
    assert load_settings(Recipe, [path]).sha256() != load_settings(Recipe, [path], ["--seed", "1"]).sha256()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sorce.kind", "stdlib"], 'did you mean "source"'),
        (["--source.pahts", "x"], 'source.pahts: unknown key; did you mean "paths"'),
        (["--source.paths", "[x]"], "`paths` goes with kind: files, not with kind: stdlib"),
        (["--source.kind", "files"], "kind: files needs `paths`"),
        (["--source.kind", "hub"], "kind: hub needs `dataset`"),
        (["--tokenizer.train.vocab_size", "256"], "tokenizer.train.vocab_size: input should be greater than or equal"),
        (["--tokenizer.load", "gpt2"], "say either `train` or `load`"),
        (["--validation.paths", "[x]"], "say either `fraction` or `paths`"),
        (["--validation.fraction", "1.5"], "validation.fraction"),
        (["--name", "a/b"], "name"),
    ],
)
def test_refusals_name_the_key(command, capsys, words, said):
    recipe = next(path for path in RECIPES if path.stem == "stdlib")
    assert command("--config", recipe, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_no_config_lists_the_recipes(command, capsys):
    assert command() == 2
    assert "recipes/stdlib" in capsys.readouterr().err
