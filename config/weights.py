"""HF_HOME=FOLDER/hub python config/weights.py FOLDER MODEL REVISION: a checkpoint, and settings that name it.

Loading it once fetches exactly the files that the server reads, and shows that they are whole. Without a MODEL
FOLDER/cde-server.toml stays empty, which serves the embedded default.
"""

import json
import re
import sys
from pathlib import Path

from app.errors import CheckpointError
from app.models.loading import LoadOptions, load_model


def main(folder: Path, model: str, revision: str) -> None:
    """Exits with what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "cde-server.toml"
    settings.touch()
    if not model:
        return
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        sys.exit(f"REVISION must be the commit of {model} to bake in: 40 hexadecimal digits, not {revision!r}")
    try:
        load_model(model, LoadOptions(revision=revision, device="cpu"))
    except CheckpointError as error:
        sys.exit(str(error))
    settings.write_text(f"[[models]]\nname = {json.dumps(model)}\nrevision = {json.dumps(revision)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
