"""Who builds a version, which line of a batch is run alone, and files that expire. Listings go by namespace."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("versions", sa.Column("builder", sa.String(32)))
    # With a default: servers of the version before write into these tables until they are replaced.
    op.add_column("batches", sa.Column("alone_line", sa.Integer))
    op.add_column("batches", sa.Column("alone_tries", sa.Integer, nullable=False, server_default="0"))
    op.add_column("batches", sa.Column("output_seconds", sa.BigInteger))
    op.add_column("files", sa.Column("expires_at", sa.BigInteger))
    op.add_column("files", sa.Column("is_partial", sa.Boolean))
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    for table in ("files", "batches"):
        op.create_index(f"ix_{table}_namespace_seq", table, ["namespace", "seq"])
    op.drop_index("ix_batches_status", "batches")
    op.create_index("ix_batches_waiting", "batches", ["status", "namespace", "seq"])
