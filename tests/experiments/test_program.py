import os
import pathlib
import subprocess
import sys

import pytest

from experiments import program

_PROGRAM = """
from absl import flags
from experiments import program
flags.DEFINE_integer("count", 1, "Of things.", lower_bound=1)
flags.DEFINE_string("raises", "", "Kind of error.")
def main(argv):
    if flags.FLAGS.raises == "value":
        raise ValueError("count is odd")
    if flags.FLAGS.raises == "os":
        open("/no/such/file")
    if flags.FLAGS.raises == "other":
        raise KeyError("a defect")
    print("count", flags.FLAGS.count)
if __name__ == "__main__":
    program.run(main)
"""


@pytest.mark.parametrize(
    ("args", "status", "line"),
    [
        (["--count=3"], 0, ""),
        (["--count=0"], 2, "count"),
        (["--count=x"], 2, "count"),
        (["--cuont=3"], 2, "cuont"),
        (["stray"], 2, "unexpected argument 'stray'"),
        (["--raises=value"], 2, "error: count is odd"),
        (["--raises=os"], 2, "/no/such/file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, args, status, line):
    done = _run(tmp_path, args)
    assert done.returncode == status
    assert line in done.stderr
    assert done.stderr.count("\n") == (1 if status else 0)
    assert "Traceback" not in done.stderr


def test_a_defect_keeps_its_traceback(tmp_path):
    done = _run(tmp_path, ["--raises=other"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_lists_the_flags(tmp_path):
    done = _run(tmp_path, ["--help"])
    assert "--count: Of things." in done.stdout


def _run(folder, args):
    path = folder / "prog.py"
    path.write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(program.__file__).parents[1])}
    return subprocess.run([sys.executable, str(path), *args], env=environment, capture_output=True, text=True, check=False)
