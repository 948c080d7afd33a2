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

_Serial = BigInteger().with_variant(Integer, "sqlite")

# One row for each content, shared by all names that hold it. `seq` orders listings.
payloads = Table(
    "payloads",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("data", LargeBinary, nullable=False),
    Column("sha256", String(64), nullable=False),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("model", String(255), nullable=False),
    Column("name", String(63), nullable=False),
    Column("version", Integer, nullable=False),
    Column("id", String(40), ForeignKey("payloads.id"), nullable=False),
    Column("model_revision", String(64), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("selection", JSON, nullable=False),
    Column("documents", JSON, nullable=False),
    Column("corpus_size", Integer, nullable=False),
    Column("dimensions", Integer, nullable=False),
    Column("usage_bytes", BigInteger, nullable=False),
    Column("metadata", JSON, nullable=False),
    UniqueConstraint("model", "name", "version"),
    Index("ix_versions_id", "id"),
    sqlite_autoincrement=True,
)

names = Table(
    "names",
    metadata,
    Column("model", String(255), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("version", Integer, nullable=False),
    # Versions are never used twice, not even after the newest one was deleted.
    Column("last_version", Integer, nullable=False),
)
