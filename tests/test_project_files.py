"""CONTRIBUTING.md, CHANGELOG.md, SECURITY.md, CITATION.cff and the issue templates agree with the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import florence_onnx
from florence_onnx.commands.main import app

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def read(name: str) -> str:
    """The text of a file of the repository."""
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name: str) -> None:
    """Every link is either relative, to a file that exists, or to the site that defines a format."""
    for target in re.findall(r"\]\(([^)]+)\)", read(name)):
        if target.startswith("https://"):
            assert target.split("/")[2] in ("keepachangelog.com", "semver.org"), target
        else:
            assert (REPOSITORY / target.partition("#")[0]).is_file(), target


def test_contributing_lists_the_sessions_of_nox() -> None:
    """The table of sessions has those of noxfile.py and no others."""
    functions = [node for node in ast.parse(read("noxfile.py")).body if isinstance(node, ast.FunctionDef)]
    sessions = {function.name for function in functions if function.decorator_list}
    assert set(re.findall(r"^\| `(\w+)` \|", read("CONTRIBUTING.md"), re.M)) == sessions


def test_contributing_has_the_readme_test_command() -> None:
    """The set-up is README's test command, in two lines."""
    command = re.search(r"^python3 -m venv \.venv-test && .*$", read("README.md"), re.M)
    assert command
    assert "\n".join(command[0].rsplit(" && ", 1)) in read("CONTRIBUTING.md")


def test_version_is_stated_alike() -> None:
    """CITATION.cff has this version, and CHANGELOG.md an entry for it."""
    assert f"\nversion: {florence_onnx.__version__}\n" in read("CITATION.cff")
    assert f"\n## [{florence_onnx.__version__}]" in read("CHANGELOG.md")


def test_bug_reports_ask_for_commands_that_exist() -> None:
    """The templates name `doctor` and `info`, which are commands."""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    for name in ("bug_report.yml", "feature_request.yml"):
        named = set(re.findall(r"`florence-onnx (\w+)", read(f".github/ISSUE_TEMPLATE/{name}")))
        assert {"doctor", "info"} <= named <= commands


def test_check_results_are_asked_for_where_the_readme_says() -> None:
    """README names the template by its name, and the template the command."""
    template = read(".github/ISSUE_TEMPLATE/check_results.yml")
    assert 'issue template "Check results"' in read("README.md") and template.startswith("name: Check results\n")
    assert "`florence-onnx-export check`" in template and "`florence-onnx doctor`" in template
