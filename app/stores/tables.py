"""The tables, as SQLAlchemy sees them; `migrations/` creates them."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()

Serial = BigInteger().with_variant(Integer, "sqlite")

# One row for each content, shared by all names that hold it; no data while it is being built.
payloads = Table(
    "payloads",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("data", LargeBinary),
    Column("sha256", String(64)),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("namespace", String(63), nullable=False),
    Column("model", String(255), nullable=False),
    Column("name", String(63), nullable=False),
    Column("version", Integer, nullable=False),
    Column("id", String(40), ForeignKey("payloads.id"), nullable=False),
    # The id it was begun under: another one where what is chosen is only known after the first stage.
    Column("begun_id", String(40), nullable=False),
    Column("model_revision", String(64), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("status", String(16), nullable=False),
    Column("error", String(512)),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    # Who builds it, and their last sign of life.
    Column("builder", String(32)),
    Column("beat_at", DateTime(timezone=True), nullable=False),
    Column("selection", JSON, nullable=False),
    Column("documents", JSON, nullable=False),
    Column("corpus_size", Integer, nullable=False),
    Column("dimensions", Integer, nullable=False),
    Column("usage_bytes", BigInteger, nullable=False),
    Column("metadata", JSON, nullable=False),
    UniqueConstraint("namespace", "model", "name", "version"),
    Index("ix_versions_id", "id"),
    Index("ix_versions_begun_id", "begun_id"),
    sqlite_autoincrement=True,
)

# The chosen texts, where the operator keeps them: zlib over a JSON list. Of a version, and not of its content: texts
# that are equal as far as the model reads them make one content.
texts = Table(
    "version_texts",
    metadata,
    Column(
        "version_seq", Serial, ForeignKey("versions.seq", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("data", LargeBinary, nullable=False),
)

names = Table(
    "names",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("model", String(255), primary_key=True),
    Column("name", String(63), primary_key=True),
    # 0: the name was deleted.
    Column("version", Integer, nullable=False),
    # Versions are never used twice, not even after the newest one, or the name, was deleted.
    Column("last_version", Integer, nullable=False),
)
