"""Lists the programs: ``python -m dit_jax``."""

import ast
import sys
from pathlib import Path

PROGRAMS = ("main", "sample", "evaluate", "precompute", "export", "report", "doctor", "bench")


def purpose(program: str) -> str:
    """The first line of its module's docstring, for which nothing is imported."""
    path = Path(__file__).parent / program
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]


def main() -> int:
    """Says what there is; the exit code is 2 where something was asked for."""
    lines = ["usage: python -m dit_jax.PROGRAM [flags]; --help shows those of a program", ""]
    lines += [f"  {program:<12}{purpose(program)}" for program in PROGRAMS]
    if asked := [word for word in sys.argv[1:] if word not in ("-h", "--help")]:
        known = asked[0].removeprefix("dit_jax.") in PROGRAMS
        lines.append(f"\n{asked[0]} is " + ("started by python -m dit_jax." + asked[0] if known else "no program"))
        print(*lines, sep="\n", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
