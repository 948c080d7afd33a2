"""The vectors of the self-check that the package ships: `python -m tests.references` makes them anew, on a CPU."""

from pathlib import Path

from app.models.loading import BUILTIN, LoadOptions
from app.offline import Offline
from app.references import SHIPPED, write
from app.selfcheck import compute, key_of
from app.verification.remote import INLINE, Known


def ship() -> Path:
    with Offline(BUILTIN, LoadOptions(dtype="float32", device="cpu")) as offline:
        vectors = {**compute(offline.engine, offline.served), INLINE: Known.computed(offline).vectors}
    path = SHIPPED / f"{key_of(offline.spec)}.safetensors"
    write(path, vectors, offline.spec)
    return path


if __name__ == "__main__":
    print(ship())  # noqa: T201
