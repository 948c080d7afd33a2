"""All settings, in one frozen tree, with their defaults. `settings_sources.py` fills it."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from app.machine import cores

Positive = Annotated[int, Field(gt=0)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Group):
    name: str = Field(
        "builtin/minilm-context",
        min_length=1,
        description="Hub id, folder in the Hub's layout, or the embedded default",
    )
    served_name: str | None = Field(None, description="Name clients use; absent: the Hub id, or the folder's last part")
    aliases: tuple[str, ...] = Field((), description="More names clients may use")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub; absent: main")
    semantics: Literal["training", "hub"] = Field(
        "training", description="What the weights were trained with, or what the Hub's remote code computes"
    )
    output_residual: bool | None = Field(None, description="Overrides that part of `semantics` (v2)")
    mask_instruction: bool | None = Field(None, description="Overrides that part of `semantics` (v2)")
    first_stage: bool = Field(True, description="false: half the memory, contexts by import only")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="auto: bfloat16 on GPUs that have it, else float32; int8 on CPUs alone, 1 - cos up to about 5e-4",
    )
    context_attention: Literal["exact", "frozen"] = Field(
        "exact", description="frozen: an approximation, much faster for short texts; see `cde-server agreement`"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    cuda_graphs: bool = Field(
        True, description="On a GPU: forwards of up to 4 texts are recorded once a shape, and replayed"
    )
    matryoshka: bool = Field(False, description="Allow smaller `dimensions`: cut first, normalised after")


class ServerSettings(_Group):
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; beyond loopback only with keys")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    allow_unauthenticated: bool = Field(False, description="Listen beyond loopback without keys")
    keys_file: Path | None = Field(None, description="TOML file of API keys (SHA-256 digests); reloaded on change")
    cors_origins: tuple[str, ...] = Field((), description="Origins browsers may call from; none: CORS is off")
    unknown_parameters: Literal["reject", "ignore"] = Field(
        "reject", description="What to do with body fields nobody knows; ignore for gateways that add some"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged")
    log_format: Literal["console", "json"] = Field("console", description="For a person, or one JSON object a line")
    traces: bool = Field(
        False, description="Send OpenTelemetry traces (extra `otel`); the OTEL_* environment variables say where to"
    )
    grace_seconds: float | None = Field(
        None,
        ge=0,
        description="After SIGTERM: how long requests are still taken, with `/ready` at 503; absent: 5, on loopback 0",
    )
    drain_seconds: float = Field(30, ge=0, description="Then: how long what was taken may go on being answered")

    @property
    def grace(self) -> float:
        """On loopback nobody balances load."""
        if self.grace_seconds is not None:
            return self.grace_seconds
        return 0.0 if _is_loopback(self.host) else 5.0


class EngineSettings(_Group):
    workers: int = Field(0, ge=0, description="Threads that run batches; 0: one a core on a CPU, else two a GPU")
    devices: tuple[str, ...] = Field(
        (), description="Several GPUs (cuda:0, cuda:1): every model is loaded on each, with workers of its own"
    )
    batch_tokens: int = Field(
        0, ge=0, description="Tokens of one batch as computed, context rows counted; 0: 1100 on a CPU, else 16384"
    )
    interactive_texts: int = Field(8, ge=0, description="Requests of up to so many texts go before larger ones")
    stuck_seconds: float = Field(
        120.0,
        ge=0,
        description="A forward that takes longer fails its requests, and twice as long ends the process; 0: any",
    )

    def workers_on(self, device: str) -> int:
        """All of them. On a GPU one batch is prepared while another is computed."""
        return self.workers or (cores() if device == "cpu" else 2 * max(1, len(self.devices)))

    def batch_tokens_on(self, device: str) -> int:
        return self.batch_tokens or (1100 if device == "cpu" else 16_384)


class LimitSettings(_Group):
    max_inputs: Positive = Field(2048, description="Inputs in one request")
    max_tokens_per_request: Positive = Field(300_000, description="Tokens of all inputs of one request together")
    max_documents: Positive = Field(100_000, description="Documents in one JSON request; NDJSON takes any number")
    max_body_bytes: Positive = Field(64 * 2**20, description="Body of a JSON request or an import")
    max_body_bytes_in_flight: Positive = Field(
        256 * 2**20,
        description="Bodies of all requests that are being served; a caller that would hold more than it leaves free "
        "(alone, half) gets 429",
    )
    max_answer_bytes_in_flight: Positive = Field(
        512 * 2**20,
        description="Answers of over 64 KiB that are being read; a caller that would hold more than it leaves free "
        "(alone, half) gets 429",
    )
    max_line_bytes: Positive = Field(
        8 * 2**20, description="One line of an NDJSON upload, which is unbounded as a whole, or of a batch"
    )
    max_file_bytes: Positive = Field(200 * 2**20, description="One file of batch lines")
    max_batch_lines: Positive = Field(50_000, description="Lines of one batch")
    max_unfinished_batches: Positive = Field(1000, description="Of one namespace; beyond it new ones get 429")
    max_header_bytes: Positive = Field(64 * 2**10, description="Request line and headers together")
    max_connections: Positive = Field(4096, description="Open connections; beyond it new ones get 503, probes do not")
    idle_seconds: Positive = Field(
        75, description="How long a connection stays open between requests; let a proxy's own time be shorter"
    )
    header_seconds: Positive = Field(20, description="From the first byte of a request to the end of its headers")
    stall_seconds: Positive = Field(
        30, description="How long a body or an answer may stand still before its connection is cut"
    )
    min_bytes_per_second: Positive = Field(100, description="Less than that, on average, is standing still")
    queue_tokens: Positive = Field(4_500_000, description="Tokens waiting, as computed; beyond it requests get 429")
    queue_seconds: float = Field(
        300.0, ge=0, description="A request that would wait longer for its turn gets 429; 0: any"
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="A request that is not answered by then gets 503; `x-timeout-ms` says otherwise"
    )
    vector_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="Vectors kept so that equal texts are not computed again; 0: none"
    )


class ContextSettings(_Group):
    default: str = Field("default", description="Name of the context for requests that name none")
    require_context: bool = Field(False, description="Answer 400 to requests that name none")
    cache_bytes: Positive = Field(256 * 2**20, description="Contexts held in memory, stored and sent with requests")
    database_url: SecretStr | None = Field(
        None,
        description="PostgreSQL (postgresql://USER:PASSWORD@HOST/DATABASE), shared by several servers; absent: "
        "SQLite in `data_dir`",
    )
    stale_seconds: float = Field(
        86_400, ge=0, description="How long the last known version of a name serves while the store does not answer"
    )
    keep_documents: bool = Field(False, description="Keep the chosen texts with each context, not only their vectors")
    diverse_candidates: Positive = Field(
        2048, description="Documents that `diverse` chooses from; all of them go through the first stage"
    )


class Settings(_Group):
    """The whole tree."""

    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(),), min_length=1, description="Models to serve; the first is the default"
    )
    data_dir: Path = Field(Path("data"), description="Folder for everything that is kept")
    truncate: Literal["none", "end"] = Field("none", description="Texts over the max length: a 400, or cut")
    token_ids: Literal["cl100k_base", "model", "reject"] = Field(
        "cl100k_base", description="What integers in `input` are: tiktoken's, the model's own, or a 400"
    )
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()
    contexts: ContextSettings = ContextSettings()

    @property
    def database_url(self) -> str:
        """The secret is out from here on."""
        given = self.contexts.database_url
        return given.get_secret_value() if given else f"sqlite:///{self.database_file}"

    @property
    def database_file(self) -> Path:
        """SQLite's, where no other database is named."""
        return self.data_dir / "contexts.sqlite3"

    @property
    def references_dir(self) -> Path:
        """The self-check's known vectors."""
        return self.data_dir / "selfcheck"

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        server = self.server
        if not (_is_loopback(server.host) or server.keys_file or server.allow_unauthenticated):
            raise ValueError(
                f"server.host {server.host} is open to other machines and no keys are set: "
                f"set server.keys_file, or server.allow_unauthenticated if something in front checks callers"
            )
        if (path := server.keys_file) and not path.is_file():
            raise ValueError(f"server.keys_file {path} {'is not a file' if path.exists() else 'does not exist'}")
        limits = self.limits
        if limits.max_body_bytes_in_flight < 2 * max(limits.max_body_bytes, limits.max_line_bytes):
            raise ValueError(
                "limits.max_body_bytes_in_flight, of which one caller gets half, is less than twice what one body may "
                "have: raise it, or lower limits.max_body_bytes and limits.max_line_bytes"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
