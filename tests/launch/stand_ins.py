"""Stand-in machines for the launch scripts: a PATH with nothing on it but what a test puts there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = [
    "bash",
    "basename",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "gzip",
    "head",
    "mkdir",
    "mktemp",
    "nohup",
    "rm",
    "sleep",
    "tar",
]

# Answers the scripts' questions as Python 3.12 does; of what it is asked to run it keeps a record.
STAND_IN_PYTHON = """
echo "$*" >>"$RECORD"
case "$*" in
  *version_info*) echo 3.12 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m dit_jax.evaluate "*)
    echo "one line before"
    echo "shapes: one_object=0.50 two_objects=0.25 new_combinations=0.10" ;;
esac
"""

# Has everything installed already: makes environments whose python is the one that runs the tests.
READY_PYTHON = f"""
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""


class Machine:
    """A machine on which only `NEEDED` and the programs added to it exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        for name in NEEDED:
            (self.path / name).symlink_to(shutil.which(name))
        self.record = folder / "record.txt"

    def add(self, name: str, script: str) -> Path:
        """A program on PATH."""
        program = self.path / name
        program.write_text(f"#!{self.path / 'bash'}\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        return program

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/ with the environment given on top of a nearly empty one."""
        keep = {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_", "HF_"))}
        return subprocess.run(
            ["bash", str(REPOSITORY / "launch" / script), *arguments],
            env={
                "PATH": str(self.path),
                "HOME": str(self.folder),
                "RECORD": str(self.record),
                "DIT_JAX_VENV": str(self.folder / "environment"),
                **keep,
                **environment,
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[str]:
        """What the stand-in Python was asked to do since the last time, its answers about itself left out."""
        lines = self.record.read_text(encoding="utf-8").splitlines()
        self.record.unlink()
        return [line for line in lines if line.startswith("-m ")]
