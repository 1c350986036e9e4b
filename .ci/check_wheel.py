"""Check that a wheel has every file of the package and no others.

python .ci/check_wheel.py FILE.whl
"""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    package = ROOT / "dit_video"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and not any(part == "__pycache__" or part[0] == "." for part in path.relative_to(ROOT).parts)
    }
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        packed = set(wheel.namelist())
    missing = sorted(expected - packed)
    unexpected = sorted(name for name in packed - expected if ".dist-info/" not in name)
    if missing or unexpected:
        sys.exit(f"error: the wheel lacks {missing} and has {unexpected}, which the package does not have")
    if not any(name.endswith("/LICENSE") for name in packed):
        sys.exit("error: the wheel has no LICENSE")
    print(f"the wheel has all {len(expected)} files of dit_video")


if __name__ == "__main__":
    main()
