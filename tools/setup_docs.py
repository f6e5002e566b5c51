"""Make a virtual environment that builds the documentation: the extra `docs` of pyproject.toml.

    python3 tools/setup_docs.py [--venv .venvs/docs]

Needs only the standard library.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import argparse
import tomllib
from pathlib import Path

from environment import PROJECT, Environment, require_python, run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venvs" / "docs")
    env = Environment(parser.parse_args().venv.absolute())
    require_python("kvplug is")
    env.create()
    stated = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    wanted = stated["project"]["optional-dependencies"]["docs"]
    env.pip(*wanted, advice="mkdocs-material must be on pip's index")
    say(f"mkdocs {env.version('mkdocs')}, ready in {env.folder}")


if __name__ == "__main__":
    run(main)
