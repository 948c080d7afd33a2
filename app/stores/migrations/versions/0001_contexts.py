"""Contexts: payloads by content, versions by name, and where each name points."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "payloads",
        sa.Column("seq", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("data", sa.LargeBinary),
        sa.Column("sha256", sa.String(64)),
        sa.Column("documents", sa.LargeBinary),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "versions",
        sa.Column("seq", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("id", sa.String(40), sa.ForeignKey("payloads.id"), nullable=False),
        sa.Column("begun_id", sa.String(40), nullable=False),
        sa.Column("model_revision", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("error", sa.String(512)),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("selection", sa.JSON, nullable=False),
        sa.Column("documents", sa.JSON, nullable=False),
        sa.Column("corpus_size", sa.Integer, nullable=False),
        sa.Column("dimensions", sa.Integer, nullable=False),
        sa.Column("usage_bytes", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.UniqueConstraint("namespace", "model", "name", "version"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_versions_id", "versions", ["id"])
    op.create_index("ix_versions_begun_id", "versions", ["begun_id"])
    op.create_table(
        "names",
        sa.Column("namespace", sa.String(63), primary_key=True),
        sa.Column("model", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
    )
