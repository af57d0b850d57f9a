"""Entry points of installed packages: loaded on demand, once; faults name the entry point and its distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cllm.errors import UserError
from cllm.plugins import origin, plugins

Install = Callable[..., Path]


def test_a_group_without_plugins_is_empty() -> None:
    assert plugins("cllm.tests.nothing") == {}


def test_modules_are_imported_once_and_on_demand(install_package: Install, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = f"open({str(log)!r}, 'a').write('imported ')\nclass Method: pass\n"
    install_package("outside", {"outside_a": source}, {"cllm.tests": {"one": "outside_a:Method", "all": "outside_a"}})
    assert not log.exists()
    found = plugins("cllm.tests")
    assert list(found) == ["all", "one"]
    assert found["one"] is found["all"].Method
    assert plugins("cllm.tests")["one"] is found["one"]
    assert log.read_text() == "imported "
    assert origin("cllm.tests", "one") == 'plug-in cllm.tests "one" (outside_a:Method, distribution outside 1.0)'


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("import nowhere_to_be_found", "outside_b", "No module named 'nowhere_to_be_found'"),
        ("def f(:", "outside_b", "SyntaxError"),
        ("1 / 0", "outside_b", "ZeroDivisionError: division by zero"),
        ("", "outside_b:Missing", "Missing"),
        ("", "outside_c", "No module named 'outside_c'"),
        ("", "not a value!", "cannot be loaded"),
    ],
)
def test_a_broken_plugin_is_one_line_that_names_it(
    install_package: Install, source: str, value: str, reason: str
) -> None:
    install_package("broken-package", {"outside_b": source}, {"cllm.tests": {"bad": value}})
    with pytest.raises(UserError) as caught:
        plugins("cllm.tests")
    message = str(caught.value)
    assert reason in message
    assert '"bad"' in message
    assert "broken-package 1.0" in message
    assert "\n" not in message


def test_two_plugins_of_one_name_are_a_mistake_that_names_both(install_package: Install) -> None:
    install_package("first-package", {"outside_d": "A = 1"}, {"cllm.tests": {"same": "outside_d:A"}})
    install_package("second-package", {"outside_e": "A = 2"}, {"cllm.tests": {"same": "outside_e:A"}})
    with pytest.raises(UserError, match=r"first-package 1\.0.* second-package 1\.0.* same name"):
        plugins("cllm.tests")
