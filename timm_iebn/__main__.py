"""`python -m timm_iebn SCRIPT ARGUMENTS`: runs a script that builds its networks with timm, with IEBN's registered."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    if not sys.argv or not Path(sys.argv[0]).is_file():
        sys.exit(f"usage: python -m timm_iebn SCRIPT [ARGUMENTS], where SCRIPT is a file; got {sys.argv[:1]}")
    folder = str(Path(sys.argv[0]).resolve().parent)  # as `python SCRIPT` has it
    if not sys.flags.safe_path:
        sys.path[0] = folder
    runpy.run_path(sys.argv[0], run_name="__main__")
