"""How are the exact versions pinned? Writes constraints.txt and the same list into pyproject.toml.

python tests/pins.py 2026-11-22      # resolve again with what was published before that day
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"# pins: begin\n.*?# pins: end\n", re.DOTALL)


def resolve(before: str) -> list[str]:
    """Names and versions of the full closure, every platform, oldest supported Python."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--group", "dev", "--universal", "--python-version", "3.11"]
    command += ["--no-annotate", "--no-header", "--quiet", "--exclude-newer", f"{before}T00:00:00Z"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def block(pins: list[str], before: str) -> str:
    """The part of pyproject.toml that repeats constraints.txt for uv."""
    listed = "".join(f'    "{pin}",\n' for pin in pins)
    return (
        "# pins: begin\n[tool.uv]\n"
        f'exclude-newer = "{before}T00:00:00Z"\nconstraint-dependencies = [\n{listed}]\n# pins: end\n'
    )


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", argv[0]):
        print("usage: python tests/pins.py YYYY-MM-DD", file=sys.stderr)
        return 2
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    project.write_text(BLOCK.sub("", text))  # or the old pins would constrain the new ones
    try:
        pins = resolve(argv[0])
    except subprocess.CalledProcessError as error:
        project.write_text(text)
        print(error.stderr, file=sys.stderr)
        return 1
    (ROOT / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins))
    project.write_text(project.read_text().rstrip("\n") + "\n\n" + block(pins, argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
