"""tools/setup_env.sh: which interpreter it takes, when it has work to do, and what an interruption leaves behind.

Every test runs the real script on a small copy of the repository. Only the interpreters are stand-ins: their `-m venv`
makes an environment whose pip writes down its arguments instead of downloading anything, and so does a stand-in for uv.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]

# A working interpreter: answers questions with this Python, says it is itself, makes environments of its own kind.
WORKING = f"""#!/bin/sh
case $2 in *_base_executable*) echo "$0 3.12.0"; exit;; esac
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
if [ "$1 $2 $3" = "-m pip config" ]; then printf %s "$PIP_CONFIG"; exit; fi
if [ "$1 $2" = "-m pip" ]; then echo "$@" >> "$PIP_LOG"; sh -c "$PIP_BEHAVIOUR"; exit; fi
case $4 in "import megatron"*) echo "bytecode: ${{PYTHONDONTWRITEBYTECODE-yes}}" >> "$PIP_LOG.import"
  sh -c "${{IMPORT_BEHAVIOUR:-true}}"; exit;; esac
exec {sys.executable} "$@"
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of what the script reads, and folders for PATH, home and pyenv without any Python in them."""
    copy = tmp_path / "repo"
    (copy / "tools").mkdir(parents=True)
    shutil.copy(REPO / "tools" / "setup_env.sh", copy / "tools")
    shutil.copy(REPO / "tools" / "uv_settings.py", copy / "tools")
    shutil.copy(REPO / "setup.py", copy)
    for name in ("bin", "home", "pyenv"):
        (tmp_path / name).mkdir()
    for tool in (
        "bash",
        "sh",
        "cat",
        "cp",
        "rm",
        "mv",
        "mkdir",
        "sed",
        "awk",
        "cksum",
        "df",
        "du",
        "cut",
        "ls",
        "head",
    ):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    return copy


def run_setup(repo: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """Run the script where PATH, home and pyenv are the fixture's; stdout and stderr come back as one text."""
    base = repo.parent
    settings = {"PATH": str(base / "bin"), "HOME": str(base / "home"), "PYENV_ROOT": str(base / "pyenv")}
    settings |= {"PIP_LOG": str(base / "pip.log"), "PIP_BEHAVIOUR": "true", "PIP_CONFIG": ""}
    return subprocess.run(
        ["bash", "tools/setup_env.sh", *flags],
        cwd=repo,
        env=settings | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )


def make_python(path: Path, script: str = WORKING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


def pip_calls(repo: Path) -> list[str]:
    log = repo.parent / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def broken(status: int) -> str:
    """An interpreter that fails as one of another version (2) or without its venv module (3) does."""
    return f"#!/bin/sh\n[ $1 = --version ] && echo Python 3.10.1\nexit {status}\n"


def test_takes_python_on_path_after_skipping_those_that_do_not_work(repo):
    make_python(repo.parent / "bin" / "python3.12", broken(127))  # such as pyenv's shim of a version that is not active
    wanted = make_python(repo.parent / "bin" / "python3.13")
    make_python(repo.parent / "pyenv" / "versions" / "3.12.9" / "bin" / "python")
    result = run_setup(repo, "--dry-run")
    assert (result.returncode, result.stdout) == (0, f"set-up: would create .venv with {wanted} 3.12.0\n")
    assert not (repo / ".venv").exists()
    assert pip_calls(repo) == []


def test_finds_pyenv_versions_that_are_not_on_path(repo):
    make_python(repo.parent / "bin" / "python3", broken(2))
    make_python(repo.parent / "pyenv" / "versions" / "3.11.4" / "bin" / "python")
    wanted = make_python(repo.parent / "pyenv" / "versions" / "3.13.2" / "bin" / "python")
    assert f"with {wanted} " in run_setup(repo, "--dry-run").stdout


def test_asks_uv_last(repo):
    wanted = make_python(repo.parent / "managed" / "python")
    make_python(repo.parent / "bin" / "uv", f'#!/bin/sh\n[ "$*" = "python find 3.13" ] && echo {wanted}\n')
    assert f"with {wanted} " in run_setup(repo, "--dry-run").stdout


def test_python_variable_wins_over_everything_on_path(repo):
    make_python(repo.parent / "bin" / "python3.12")
    wanted = make_python(repo.parent / "elsewhere" / "python")
    assert f"with {wanted} " in run_setup(repo, "--dry-run", PYTHON=str(wanted)).stdout


def test_python_variable_that_differs_from_the_one_used_rebuilds(repo):
    make_python(repo.parent / "bin" / "python3.12")
    other = make_python(repo.parent / "elsewhere" / "python")
    run_setup(repo)
    assert f"would recreate .venv with {other} " in run_setup(repo, "--dry-run", PYTHON=str(other)).stdout
    assert "would" not in run_setup(repo, "--dry-run").stdout


def test_python_variable_that_cannot_be_used_is_an_error_not_a_fallback(repo):
    make_python(repo.parent / "bin" / "python3.12")
    old = make_python(repo.parent / "old" / "python", broken(2))
    result = run_setup(repo, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} is not a Python 3.12 or 3.13 with the venv module (Python 3.10.1)" in result.stdout
    assert not (repo / ".venv").exists()


def test_no_interpreter_says_what_to_install(repo):
    make_python(repo.parent / "bin" / "python3", broken(2))
    result = run_setup(repo)
    assert result.returncode == 1
    assert "no Python 3.12 or 3.13 found" in result.stdout
    for way in ("apt install python3.12 python3.12-venv", "pyenv install 3.12", "make PYTHON=/path/to/python3.12"):
        assert way in result.stdout


def test_python_without_venv_module_is_named(repo):
    python = make_python(repo.parent / "bin" / "python3.12", broken(3))
    result = run_setup(repo)
    assert result.returncode == 1
    assert f"{python} has no venv module: install it (Debian, Ubuntu: apt install python3-venv)" in result.stdout


def test_installs_torch_then_the_package_and_a_second_call_does_nothing(repo):
    make_python(repo.parent / "bin" / "python3.12")
    first = run_setup(repo)
    assert first.returncode == 0, first.stdout
    torch, package = pip_calls(repo)
    assert " torch>=2.8,<3" in torch and "--index-url" not in torch
    assert package.endswith("-e .[dev]")
    second = run_setup(repo)
    assert (second.returncode, second.stdout) == (0, "")
    assert len(pip_calls(repo)) == 2


def test_a_changed_setup_py_installs_again_into_the_same_environment(repo):
    make_python(repo.parent / "bin" / "python3.12")
    run_setup(repo)
    (repo / ".venv" / "keep").touch()
    with open(repo / "setup.py", "a") as setup:
        setup.write("# one more dependency\n")
    result = run_setup(repo)
    assert "setup.py has changed" in result.stdout
    assert len(pip_calls(repo)) == 4
    assert (repo / ".venv" / "keep").exists()
    assert run_setup(repo).stdout == ""


def test_another_torch_index_rebuilds_and_reaches_pip(repo):
    make_python(repo.parent / "bin" / "python3.12")
    run_setup(repo)
    (repo / ".venv" / "old").touch()
    result = run_setup(repo, EMOE_TORCH_INDEX="https://wheels.example/cpu")
    assert result.returncode == 0, result.stdout
    assert pip_calls(repo)[2].endswith("torch>=2.8,<3 --index-url https://wheels.example/cpu")
    assert not (repo / ".venv" / "old").exists()
    assert run_setup(repo).stdout == ""  # a later call without the variable keeps what there is


def test_a_moved_checkout_rebuilds(repo):
    make_python(repo.parent / "bin" / "python3.12")
    run_setup(repo)
    moved = repo.rename(repo.parent / "moved")
    result = run_setup(moved, "--dry-run")
    assert f".venv was made for {repo}" in result.stdout
    assert "would recreate .venv" in result.stdout


def test_a_failed_install_is_reported_and_never_taken_for_a_finished_one(repo):
    make_python(repo.parent / "bin" / "python3.12")
    failing = "echo \"WARNING: Location 'x' is ignored\" >&2; echo 'ERROR: no such wheel' >&2; exit 7"
    result = run_setup(repo, PIP_BEHAVIOUR=failing)
    assert result.returncode == 1
    assert "ERROR: no such wheel" in result.stdout
    assert "is ignored" not in result.stdout
    assert "pip could not install torch>=2.8,<3 (exit status 7" in result.stdout
    (repo / ".venv" / "half").touch()
    again = run_setup(repo)
    assert again.returncode == 0
    assert "an earlier set-up was interrupted" in again.stdout
    assert not (repo / ".venv" / "half").exists()


def test_a_set_up_at_work_elsewhere_is_left_alone(repo):
    make_python(repo.parent / "bin" / "python3.12")
    (repo / ".venv").mkdir()
    (repo / ".venv" / ".emoe-unfinished").write_text(str(os.getpid()))
    result = run_setup(repo)
    assert result.returncode == 1
    assert f"process {os.getpid()} is setting .venv up" in result.stdout
    assert pip_calls(repo) == []


def test_a_folder_of_someone_else_is_not_deleted(repo):
    make_python(repo.parent / "bin" / "python3.12")
    (repo / ".venv").mkdir()
    (repo / ".venv" / "precious").touch()
    result = run_setup(repo)
    assert result.returncode == 1
    assert "its bin/python is not a Python 3.12 or 3.13: remove it or set VENV" in result.stdout
    assert (repo / ".venv" / "precious").exists()


def test_too_little_disk_is_said_before_anything_is_made(repo):
    make_python(repo.parent / "bin" / "python3.12")
    (repo.parent / "bin" / "df").unlink()
    make_python(repo.parent / "bin" / "df", "#!/bin/sh\necho header\necho disk 9000000 6000000 2500000 70% /\n")
    result = run_setup(repo)
    assert result.returncode == 1
    assert ".venv needs 8 GB of disk, 2 GB are free" in result.stdout
    assert not (repo / ".venv").exists()


# uv as far as the script asks: its list of interpreters is empty, an installation is written down with its settings.
UV = """#!/bin/sh
[ "$1" = python ] && exit 1
echo "$@" >> "$PIP_LOG.uv"
env | sort | sed -n 's/^\\(UV_[^=]*=.*\\|SSL_CERT_FILE=.*\\)/  \\1/p' >> "$PIP_LOG.uv"
sh -c "${UV_BEHAVIOUR:-true}"
"""


def with_uv(repo: Path) -> Path:
    """uv and an interpreter on PATH; where uv's calls are written down."""
    make_python(repo.parent / "bin" / "python3.12")
    make_python(repo.parent / "bin" / "uv", UV)
    for tool in ("env", "sort"):
        (repo.parent / "bin" / tool).symlink_to(shutil.which(tool))
    return repo.parent / "pip.log.uv"


def test_uv_installs_where_it_is_there_and_pip_is_not_asked(repo):
    log = with_uv(repo)
    result = run_setup(repo)
    assert result.returncode == 0, result.stdout
    into = "pip install -q --python .venv/bin/python --index-strategy unsafe-best-match"
    assert log.read_text().splitlines() == [f"{into} torch>=2.8,<3", f"{into} -e .[dev]"]
    assert pip_calls(repo) == [] and run_setup(repo).stdout == ""


def test_uv_is_told_what_pip_is_configured_to_do(repo):
    log = with_uv(repo)
    config = """global.cert='/ca.pem'
global.constraint='/of-the-file.txt'
global.extra-index-url='https://one.example/simple\\nfile:///two'
global.find-links='/wheels /more wheels'
install.index-url='https://of-install.example'
freeze.timeout='1'
:env:.constraint='/a.txt /b.txt'
:env:.disable-pip-version-check='1'
:env:.default-timeout='180'
"""
    result = run_setup(repo, PIP_CONFIG=config)
    assert result.returncode == 0, result.stdout
    settings = sorted({line.strip() for line in log.read_text().splitlines() if line.startswith("  ")})
    assert settings == [
        "SSL_CERT_FILE=/ca.pem",
        "UV_CONSTRAINT=/a.txt /b.txt",  # the environment's, which wins over the file's as it does in pip
        "UV_DEFAULT_INDEX=https://of-install.example",
        "UV_FIND_LINKS=/wheels,/more,wheels",  # pip splits at white space
        "UV_HTTP_TIMEOUT=180",
        "UV_INDEX=https://one.example/simple file:///two",
    ]
    assert pip_calls(repo) == []


def test_uv_keeps_settings_of_its_own(repo):
    log = with_uv(repo)
    run_setup(repo, PIP_CONFIG="global.index-url='https://pip.example'\n", UV_DEFAULT_INDEX="https://uv.example")
    assert "UV_DEFAULT_INDEX=https://uv.example" in log.read_text() and "pip.example" not in log.read_text()


def test_a_setting_that_uv_cannot_be_told_leaves_it_to_pip(repo):
    log = with_uv(repo)
    result = run_setup(repo, PIP_CONFIG="global.no-index='1'\n")
    assert result.returncode == 0, result.stdout
    assert "set-up: pip installs, not uv: pip's setting no-index has no counterpart in uv\n" in result.stdout
    assert len(pip_calls(repo)) == 2 and not log.exists()


def test_where_uv_fails_pip_tries(repo):
    with_uv(repo)
    result = run_setup(repo, UV_BEHAVIOUR="echo no such wheel >&2; exit 2")
    assert result.returncode == 0, result.stdout
    assert (
        "no such wheel\nset-up: uv could not install torch>=2.8,<3 (its message is above): pip tries" in result.stdout
    )
    assert len(pip_calls(repo)) == 2  # uv is not asked for the second part


def test_another_torch_index_reaches_uv_for_torch_alone(repo):
    log = with_uv(repo)
    run_setup(repo, EMOE_TORCH_INDEX="https://wheels.example/cpu")
    torch, package = log.read_text().splitlines()
    assert torch.endswith("torch>=2.8,<3 --default-index https://wheels.example/cpu")
    assert "wheels.example" not in package


def test_pip_leaves_byte_code_to_the_first_import(repo):
    make_python(repo.parent / "bin" / "python3.12")
    run_setup(repo)
    assert [" --no-compile " in call for call in pip_calls(repo)] == [True, True]


def test_the_first_import_writes_byte_code_even_where_imports_should_not(repo):
    make_python(repo.parent / "bin" / "python3.12")
    run_setup(repo, PYTHONDONTWRITEBYTECODE="1")
    assert (repo.parent / "pip.log.import").read_text() == "bytecode: yes\n"


def test_large_packages_are_compiled_where_they_are_installed(repo):
    make_python(repo.parent / "bin" / "python3.12")
    package = repo / ".venv" / "lib" / "python3.12" / "site-packages" / "lm_eval"
    behaviour = f"mkdir -p {package}; echo 'x = 1' > {package}/tasks.py"
    done = run_setup(repo, PYTHONDONTWRITEBYTECODE="1", IMPORT_BEHAVIOUR=behaviour)
    assert done.returncode == 0, done.stdout
    assert list(package.glob("__pycache__/tasks.*.pyc"))


def test_an_environment_that_cannot_be_imported_is_not_finished(repo):
    make_python(repo.parent / "bin" / "python3.12")
    failing = "echo Traceback; echo 'ImportError: no such library'; exit 1"
    result = run_setup(repo, IMPORT_BEHAVIOUR=failing)
    assert result.returncode == 1
    assert "set-up: what was installed in .venv cannot be imported: ImportError: no such library\n" in result.stdout
    assert "interrupted" in run_setup(repo, "--dry-run").stdout
