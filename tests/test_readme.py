"""The README's two commands have the promised shape, and `.ci/run` runs them as they stand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^<!-- command: (\w+) -->\n```sh\n(.*?)^```$", README, re.M | re.S))


def steps(command: str) -> list[list[str]]:
    """A chained command as the words of each step."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&|;()<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_both_commands_stand_at_the_top() -> None:
    assert list(COMMANDS) == ["edit", "test"]
    assert README.count("<!-- command:") == 2
    assert README.index("<!-- command: test -->") < README.index("\n## ")


@pytest.mark.parametrize("name", ["edit", "test"])
def test_a_command_is_one_chain_from_a_new_environment(name: str) -> None:
    lines = COMMANDS[name].splitlines()
    assert all(line.endswith((" &&", " \\")) for line in lines[:-1]), "a failed step must end it"
    words = steps(COMMANDS[name])
    assert words[:2] == [["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]]
    assert words[2][:4] == ["pip", "install", "-c", "constraints.txt"]
    assert not {";", "|", "&", "||"} & {word for step in words for word in step}
    extras = re.search(r"\[(.*)\]", words[2][-1])
    declared = set(re.findall(r'^    "(\w+)": \[$', (ROOT / "setup.py").read_text(), re.M))
    assert extras is not None
    assert set(extras[1].split(",")) <= declared


def test_the_first_command_edits_a_picture_that_is_there() -> None:
    edit = steps(COMMANDS["edit"])[-1]
    assert edit[:2] == ["fluxkontext", "edit"]
    assert (ROOT / edit[2]).is_file()
    assert edit[-2:] == ["-o", "edited.png"]


def test_the_second_command_runs_all_tests() -> None:
    assert steps(COMMANDS["test"])[-1] == ["pytest"]


@pytest.mark.parametrize("name", ["edit", "test"])
def test_ci_runs_the_command_as_it_stands(name: str) -> None:
    """Its own extraction gives the README's text, it runs that, and it has no copy of it."""
    extraction = re.search(r"^readme_command\(\) \{.*?^\}$", CI, re.M | re.S)
    assert extraction is not None
    script = f"{extraction[0]}\nreadme_command {name}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == COMMANDS[name]
    assert re.search(rf"^run_readme {name}$", CI, re.M)
    assert not [step for step in steps(COMMANDS[name])[2:] if f"\n{shlex.join(step)}" in CI]
