"""The command line as a stranger meets it."""

import subprocess
import sys

import pytest

import vbdl
from vbdl.cli import main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vbdl {vbdl.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], [], ["demo", "--help"], ["info", "--help"]])
def test_help_ends_well(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "usage: vbdl" in said
    if "demo" in arguments:
        for option in ("--out", "--seed", "--tasks", "--effort", "--no-timing", "--threads"):
            assert option in said


@pytest.mark.parametrize("arguments", [["train"], ["demo", "--outt", "x"], ["demo", "--seed", "one"]])
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["demo", "--tasks", "mnist"], "no task 'mnist'"),
        (["demo", "--effort", "0"], "effort"),
        (["demo", "--threads", "-1"], "threads"),
    ],
)
def test_an_error_is_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.delenv("VBDL_TRACEBACK", raising=False)
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    assert said.err.startswith("vbdl: ") and named in said.err


def test_an_error_shows_its_place_when_asked(monkeypatch):
    monkeypatch.setenv("VBDL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="effort"):
        main(["demo", "--effort", "-1"])


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert "taken" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_what_to_install_is_named(missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install 'vbdl[demo]'" in capsys.readouterr().err


def test_info_names_versions_and_compiler(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert vbdl.__version__ in said and "C++ compiler" in said


def test_help_does_not_wait_for_torch():
    """The seconds are torch's, so that is what is looked for: a time would depend on who else is running."""
    code = (
        "import sys; from vbdl.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
