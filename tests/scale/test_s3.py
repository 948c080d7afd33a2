"""A corpus and an output in S3, from a server of moto's, through pyarrow's own client."""

from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
import pytest

from app.scale.folders import Output, filesystem, text_files
from app.scale.parts import Corpus, cut, read

TEXTS = [f"Text {i}" for i in range(20)]


@pytest.fixture
def query(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a URL ends in to lead there."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: make test-ray")
    for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "key"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    yield f"?region=us-east-1&scheme=http&allow_bucket_creation=true&endpoint_override=127.0.0.1:{port}"
    running.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of moto's dependencies
def test_parts_in_s3(query: str) -> None:
    system, _ = filesystem(f"s3://lake/{query}")
    system.create_dir("lake/in/deep")
    for name in ("a.txt", "deep/b.txt"):
        with system.open_output_stream(f"lake/in/{name}") as file:
            file.write("\n".join(TEXTS).encode())
    url = f"s3://lake/in/*/*.txt{query}"
    folder, names = text_files(url)
    assert names == ["deep/b.txt"]
    corpus = Corpus(url, folder, tuple(names), (), 6)
    parts = list(cut(corpus, "deep/b.txt"))
    assert list(chain.from_iterable(read(corpus, part)[0] for part in parts)) == TEXTS

    output = Output(f"s3://lake/out{query}")
    made_of = {"fingerprint": "fp"}
    assert output.begin(made_of) == set()
    for part in parts:
        output.write(part.output, pa.table({"_path": [part.name]}))
    assert output.begin(made_of) == {part.output for part in parts}
