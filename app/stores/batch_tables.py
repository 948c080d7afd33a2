"""The tables of files and batches; `migrations/` creates them."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
)

from app.stores.tables import Serial, metadata

files = Table(
    "files",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("namespace", String(63), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # What a batch put out is not copied: the file is that batch's lines that went well, or those that did not.
    Column("batch_id", String(40)),
    Column("ok", Boolean),
    Column("expires_at", BigInteger, index=True),
    # It is being written, piece by piece, and is not there yet.
    Column("is_partial", Boolean),
    Index("ix_files_namespace_seq", "namespace", "seq"),
    sqlite_autoincrement=True,
)

# The content of what was sent in, in order, in pieces that fit in memory.
file_chunks = Table(
    "file_chunks",
    metadata,
    Column("file_id", String(40), ForeignKey("files.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("crc32", BigInteger),
)

batches = Table(
    "batches",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("namespace", String(63), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(40), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("times", JSON, nullable=False),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("problems", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    # The process that runs it, and its last sign of life in Unix seconds.
    Column("owner", String(64)),
    Column("beat_at", Float, nullable=False),
    # The line that was run alone last, and how often.
    Column("alone_line", Integer),
    Column("alone_tries", Integer, nullable=False, server_default="0"),
    # What its output files have to live.
    Column("output_seconds", BigInteger),
    Index("ix_batches_namespace_seq", "namespace", "seq"),
    Index("ix_batches_waiting", "status", "namespace", "seq"),
    sqlite_autoincrement=True,
)

# The answer to each line, once.
batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(40), ForeignKey("batches.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("ok", Boolean, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("crc32", BigInteger),
)
